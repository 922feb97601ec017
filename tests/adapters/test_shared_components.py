"""Pipeline folders that take components from another pipeline's folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import BadInput
from hasten.model import Model

from . import tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.sd_pipeline().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def student(base: Path) -> Model:
    """The pipeline with other weights of the network."""
    model = hasten.load(base)
    with torch.no_grad():
        for p in model.denoiser.parameters():
            p.mul_(1.01)
    return model


def same_pictures(one: Model, two: Model) -> bool:
    options: Any = {"seed": 3, "steps": 2, "guidance_scale": 2.0}
    return bool(torch.equal(one.sample(1, "a red cat", **options), two.sample(1, "a red cat", **options)))


def test_only_the_network_and_the_scheduler_are_written_and_the_pictures_are_the_same(base: Path) -> None:
    model = student(base)
    model.sample(1, "a red cat", steps=1)  # which changes what its tokenizer writes
    model.save(base.parent / "student", components_from=base)
    assert {p.name for p in (base.parent / "student").iterdir() if p.is_dir()} == {"unet", "scheduler"}
    assert same_pictures(hasten.load(base.parent / "student"), model)
    assert not same_pictures(hasten.load(base), model)


def test_stock_diffusers_loads_it_as_its_readme_says(base: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = student(base).save(base.parent / "student", components_from=base)
    lines = (folder / "README.md").read_text().splitlines()
    code = "\n".join(line for line in lines if line.startswith(("base =", "pipe =")))
    names: dict[str, Any] = {"DiffusionPipeline": DiffusionPipeline, "BASE": str(base), "FOLDER": str(folder)}
    exec(code, names)
    assert names["pipe"].vae is names["base"].vae and names["pipe"].unet is not names["base"].unet


def test_both_folders_can_be_moved_together(base: Path) -> None:
    student(base).save(base.parent / "student", components_from=base)
    moved = base.parent / "elsewhere"
    moved.mkdir()
    for name in ("base", "student"):
        shutil.move(base.parent / name, moved / name)
    assert same_pictures(hasten.load(moved / "student"), student(moved / "base"))


def test_a_component_that_differs_is_written(base: Path) -> None:
    model = student(base)
    with torch.no_grad():
        next(model.decoder.vae.parameters()).mul_(2)  # type: ignore[union-attr]
    folder = model.save(base.parent / "student", components_from=base)
    assert (folder / "vae").is_dir() and not (folder / "text_encoder").exists()
    assert same_pictures(hasten.load(folder), model)


def test_a_base_that_is_missing_or_changed_is_refused(base: Path) -> None:
    folder = student(base).save(base.parent / "student", components_from=base)
    config = base / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 7.0}))
    with pytest.raises(BadInput, match=r"takes its vae from .*config\.json is not the file"):
        hasten.load(folder)
    shutil.rmtree(base)
    with pytest.raises(BadInput, match="no folder of a pipeline"):
        hasten.load(folder)


def test_bases_that_do_not_fit_are_refused_before_anything_is_written(base: Path) -> None:
    model, out = student(base), base.parent / "out"
    with pytest.raises(BadInput, match="no folder of a pipeline"):
        model.save(out, components_from=base.parent / "nothing")
    with pytest.raises(BadInput, match="takes components from"):
        model.save(out, components_from=model.save(base.parent / "student", components_from=base))
    with pytest.raises(BadInput, match="not saved as the folder of a pipeline"):
        hasten.load("fashion").save(out, components_from=base)
    assert not out.exists()


def test_a_saved_copy_without_a_base_is_whole(base: Path) -> None:
    folder = student(base).save(base.parent / "student", components_from=base)
    whole = hasten.load(folder).save(base.parent / "whole")
    shutil.rmtree(base)
    assert same_pictures(hasten.load(whole), hasten.load(whole)) and (whole / "vae").is_dir()
