"""Old import paths and method names still work, each with a DeprecationWarning that has the new name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.distributed.ranks import DEPRECATED, Ranks


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("hasten.ranks", "Ranks", "hasten.distributed.ranks"),
        ("hasten.parallel_cost", "Device", "hasten.performance.parallel"),
        ("hasten.distill", "distill_model", "hasten.workflows.distill"),
        ("hasten.model", "load", "hasten.loading"),
        ("hasten.sampling", "draw", "hasten.plan.draw"),
    ],
)
def test_moved_names(module: str, name: str, home: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{module}.{name} has moved to {home}"):
        value = getattr(importlib.import_module(module), name)
    assert value is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        importlib.import_module(module).no_such_name  # noqa: B018


def test_moved_names_are_imported_by_statement() -> None:
    with pytest.warns(DeprecationWarning):
        from hasten.model import load
    with pytest.warns(DeprecationWarning):
        from hasten.sampling import draw
    assert load is hasten.load and callable(draw)


def test_old_method_names_of_ranks() -> None:
    ranks = Ranks(torch.device("cpu"))
    for old, new in DEPRECATED.items():
        with pytest.warns(DeprecationWarning, match=f"Ranks.{old} is now Ranks.{new}"):
            assert getattr(ranks, old) == getattr(ranks, new)
    with pytest.raises(AttributeError, match="'Ranks' object has no attribute 'no_such_name'"):
        ranks.no_such_name  # noqa: B018


def test_pipelines_that_name_the_old_module_of_the_scheduler(tmp_path: Path) -> None:
    """diffusers looks classes up in the module that model_index.json names, which must have been imported."""
    diffusers = pytest.importorskip("diffusers")
    from .adapters import tiny

    pipe = tiny.ddpm_pipeline()
    pipe.scheduler = hasten.as_scheduler("unipc:order=3", like=pipe)
    pipe.save_pretrained(tmp_path)
    index: dict[str, Any] = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["hasten", "PlanScheduler"]
    index["scheduler"] = ["hasten.adapters._scheduler", "PlanScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    importlib.import_module("hasten.adapters._scheduler")
    with pytest.warns(DeprecationWarning, match="hasten.adapters._scheduler.PlanScheduler has moved to"):
        again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is hasten.PlanScheduler and again.scheduler.config.sampler == "unipc:order=3"
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["scheduler"] == ["hasten", "PlanScheduler"]
    with pytest.warns(DeprecationWarning):
        assert hasten.load(tmp_path).shape == (3, 8, 8)


def test_export_keep_is_exclude(tmp_path: Path) -> None:
    from hasten.adapters import openvino

    with pytest.warns(DeprecationWarning, match="exclude"), pytest.raises(Exception):  # noqa: B017
        openvino.export(None, tmp_path / "a.xml", keep=("conv",))  # type: ignore[arg-type]
