"""The contract of every distiller: its spelling, its docstring, a dry run, a test of its own."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hasten.distillers import Student
from hasten.distillers._dry_run import DryRun, allocate
from hasten.pick import format_spec, method_names, pick
from tests.distillers._images import image_task
from tests.distillers._toy import task

HERE = Path(__file__).parent
# what needs images: feature maps of a U-Net
IMAGES = {"dsno"}
OPTIONS = {"dsno": "pairs=16", "denoising_student": "pairs=64", "reflow": "pairs=64"}


@pytest.mark.parametrize("name", method_names("distillers"))
def test_it_is_a_frozen_dataclass_with_a_reference_and_a_test(name: str) -> None:
    method = pick("distillers", name)
    assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert isinstance(method.needs_data, bool)
    assert re.search(r"\d{4}\.\d{4,5}", type(method).__doc__ or ""), "no arXiv id"
    assert (HERE / f"test_{name}.py").is_file()
    assert pick("distillers", format_spec(method)) == method


@pytest.mark.parametrize("name", method_names("distillers"))
def test_a_dry_run_measures_the_cost_of_each_stage(name: str, tmp_path: Path) -> None:
    job = image_task(tmp_path) if name in IMAGES else task(tmp_path, batch_size=32)
    keys = ("teacher", "denoiser", "batches", "shape", "out")
    dry_run = DryRun(**{key: getattr(job, key) for key in keys}, show=False)
    options = OPTIONS.get(name)
    last = pick("distillers", name + (f":{options}" if options else "")).distill(dry_run)
    assert isinstance(last, Student) and last.steps >= 1
    pick("samplers", last.sampler), pick("times", last.times)
    assert dry_run.stages and all(s.evaluations > 0 and s.seconds > 0 for s in dry_run.stages)
    allocate(dry_run.stages, steps=1000, minutes=None, evaluations=None)
    assert all(stage.steps >= 1 for stage in dry_run.stages)
    assert not any(tmp_path.iterdir()), "a dry run writes nothing"
