"""What a run may begin from: teachers that know some times only, other first weights; and pictures of many classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hasten
from hasten.cli import main
from hasten.denoiser import Denoiser
from hasten.distillers import Distiller
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.pick import method_names, pick
from hasten.predictions import V
from hasten.schedules import VPCosine
from hasten.workflows.distill import distill_model

COMMON: Any = {"steps": 12, "batch_size": 8, "precision": "fp32", "show": False}


def tiny(classes: int, seed: int = 0, width: int = 8, schedule: Any = None) -> Model:
    torch.manual_seed(seed)
    net = UNet(1, widths=(width,), classes=classes, embedding=16)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    labels = tuple(f"c{k}" for k in range(classes))
    return Model(Denoiser(net, schedule or VPCosine(offset=0.0), V()), f"tiny{seed}", (1, 8, 8), labels or None)


def data(folder: Path, classes: int) -> Path:
    file = folder / f"data{classes}.npz"
    count = max(classes, 24)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    np.savez(file, images=pixels, **({"labels": np.arange(count) % classes} if classes else {}))  # type: ignore[arg-type]
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its student of 4 steps, and the stage `guidance` of another run."""
    folder = tmp_path_factory.mktemp("start")
    tiny(3).save(folder / "teacher")
    distill_model(hasten.load(folder / "teacher"), folder / "few", "progressive:steps=(4,)", data(folder, 3), **COMMON)
    guided = "guided:steps=(4,),guidance=(1,3)"
    distill_model(hasten.load(folder / "teacher"), folder / "guided", guided, data(folder, 3), **COMMON)
    return folder


ANY_TIME = [
    "dmd:steps=4", "consistency", "adversarial:steps=4", "reflow:pairs=16,pair_steps=16", "denoising_student:pairs=16",
    "dsno:pairs=16",
]  # fmt: skip
OTHER_STEPS = [
    "tract:phases=(64,8,1)", "progressive:steps=(4,2)", "rcfd:steps=(4,2)", "prodiff:steps=(4,)", "encoder:steps=(4,)",
    "mmd:steps=2", "reflow:pairs=16,pair_steps=8,sampler=ddim,times=trailing", "guided:steps=(4,2)",
]  # fmt: skip
RIGHT = [
    "progressive:steps=(2,1)", "progressive:steps=(1,),start=4", "tract:phases=(4,2)", "sft_pg:steps=4", "diffusion_gan",
    "consistency:mode=training", "adversarial:steps=4,strength=0", "mmd:steps=2,anchor=0,features=random",
    "reflow:pairs=16,pair_steps=4,sampler=ddim,times=trailing",
]  # fmt: skip


@pytest.mark.parametrize("method", ANY_TIME + OTHER_STEPS)
def test_a_teacher_of_four_times_is_not_evaluated_at_others(place: Path, tmp_path: Path, method: str) -> None:
    what = "at any time" if method in ANY_TIME else r"at the times of \d+ steps|makes images from noise"
    with pytest.raises(BadInput, match=what) as caught:
        distill_model(hasten.load(place / "few"), tmp_path / "o", method, data(tmp_path, 3), **COMMON)
    output = str(caught.value)
    assert "student of 4 steps" in output and "--init" in output or method.startswith("encoder")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("method", RIGHT)
def test_a_teacher_that_knows_the_times_is_taken(place: Path, tmp_path: Path, method: str) -> None:
    distill_model(hasten.load(place / "few"), tmp_path / "o", method, data(tmp_path, 3), dry_run=True, **COMMON)


def test_the_stage_guidance_knows_every_time(place: Path, tmp_path: Path) -> None:
    model = hasten.load(place / "guided" / "guidance")
    assert model.card["distilled"]["any_time"] is True
    common = {**COMMON, "guidance_scale": 1.5, "dry_run": True}
    distill_model(model, tmp_path / "o", "dmd:steps=4", data(tmp_path, 3), **common)


def test_fields_of_the_protocol_have_their_defaults() -> None:
    for name in method_names("distillers"):
        method = pick("distillers", name)
        steps = method.teacher_steps
        assert steps is None or (isinstance(steps, int) and steps >= 0)
        assert method.direction in ("decode", "encode") and isinstance(method.keeps_guidance_range, bool)

    class Plain(Distiller):
        needs_data = False

    assert Plain().teacher_steps is None and Plain().direction == "decode"
    assert not (Plain().keeps_guidance_range or Plain().adds_inputs or Plain().compares_batch)


@pytest.mark.parametrize(
    "method",
    [
        "progressive:steps=(4,),lr=1e-9", "tract:phases=(8,4),lr=1e-9", "consistency:lr=1e-9", "dmd:steps=4,lr=1e-9",
        "prodiff:steps=(4,),lr=1e-9", "denoising_student:pairs=16,pair_steps=2,lr=1e-9", "adversarial:steps=4,lr=1e-9",
        "diffusion_gan:lr=1e-9", "mmd:steps=2,features=random,lr=1e-9", "sft_pg:steps=4,lr=1e-9", "rcfd:steps=(2,),lr=1e-9",
        "reflow:pairs=16,pair_steps=2,lr=1e-9",
    ],
)  # fmt: skip
def test_the_first_student_begins_as_init(place: Path, tmp_path: Path, method: str) -> None:
    """Without a step of learning it stays what it began as: the other model, not the teacher."""
    other = tiny(3, seed=1, width=16)  # of another size too
    common = {**COMMON, "init": other, "steps": 40 if method.startswith("rcfd") else 6}
    distill_model(hasten.load(place / "teacher"), tmp_path / "o", method, data(tmp_path, 3), **common)
    result, want = hasten.load(tmp_path / "o").denoiser.net.state_dict(), other.denoiser.net.state_dict()
    assert result.keys() == want.keys() and all(torch.allclose(result[key], want[key], atol=1e-6) for key in want)


def test_guided_begins_as_init_with_the_scale_as_a_further_input(place: Path, tmp_path: Path) -> None:
    other = tiny(3, seed=1)
    method = "guided:steps=(4,),guidance=(1,3),lr=1e-9"
    distill_model(hasten.load(place / "teacher"), tmp_path / "o", method, data(tmp_path, 3), init=other, **COMMON)
    result = hasten.load(tmp_path / "o")
    assert torch.allclose(result.denoiser.net.conv_in.weight, other.denoiser.net.conv_in.weight)
    # and from a student that takes the scale already, its teacher the stage that does
    teacher, init = hasten.load(place / "guided" / "guidance"), hasten.load(place / "guided")
    distill_model(teacher, tmp_path / "p", "guided:steps=(2,),lr=1e-9", data(tmp_path, 3), init=init, **COMMON)
    again = hasten.load(tmp_path / "p").denoiser.net.state_dict()
    assert all(torch.allclose(again[key], value, atol=1e-6) for key, value in init.denoiser.net.state_dict().items())


def test_a_student_is_polished_against_its_teacher_from_the_command_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["distill", str(place / "teacher"), "--init", str(place / "few"), "--data", str(data(tmp_path, 3)), "--steps",
             "6", "--batch-size", "8", "--precision", "fp32", "--device", "cpu", "--method", "adversarial:steps=4"]  # fmt: skip
    assert main([*arguments, "--out", str(tmp_path / "o")]) == 0
    card = hasten.load(tmp_path / "o").card["distilled"]
    assert card["teacher"] == hasten.load(place / "teacher").name and "--init" in card["command"]
    # the same run with another beginning is another run
    arguments[3] = str(place / "teacher")
    assert main([*arguments, "--out", str(tmp_path / "o")]) == 1
    assert "is a run with init" in capsys.readouterr().err


def test_an_init_that_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    teacher, file = hasten.load(place / "teacher"), data(tmp_path, 3)
    renamed = tiny(3)
    renamed.classes = ("c1", "c0", "c2")
    for init, message in (
        (tiny(2), "has classes 2, .* has 3"),
        (renamed, "in another order"),
        (tiny(3, schedule=VPCosine(offset=0.008)), "on another schedule"),
    ):
        with pytest.raises(BadInput, match=message):
            distill_model(teacher, tmp_path / "o", "progressive:steps=(4,)", file, init=init, **COMMON)


@pytest.mark.parametrize("classes", [1, 64, 65, 300])
def test_many_classes_have_a_picture(tmp_path: Path, classes: int) -> None:
    """One of at most 64 images, whatever the number of classes."""
    from PIL import Image

    distill_model(tiny(classes), tmp_path / "o", "progressive:steps=(2,)", data(tmp_path, classes), **COMMON)
    assert hasten.load(tmp_path / "o").sample(2).shape == (2, 1, 8, 8)
    with Image.open(tmp_path / "o" / "steps2.png") as image:
        assert image.width * image.height <= 64 * (8 + 2) ** 2


def test_a_failed_preview_loses_no_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr("hasten.workflows.students.sample_grid", fails)
    distill_model(tiny(3), tmp_path / "o", "progressive:steps=(4,2)", data(tmp_path, 3), **COMMON)
    for name in ("steps4", "steps2", "."):
        assert hasten.load(tmp_path / "o" / name).sample(1).shape == (1, 1, 8, 8)
    output = capsys.readouterr()
    assert "no preview" in output.err and "steps4.png: out of memory" in output.err and "and more" not in output.err
    assert not output.out
    monkeypatch.undo()  # and the same call again draws what is missing
    distill_model(tiny(3), tmp_path / "o", "progressive:steps=(4,2)", data(tmp_path, 3), **COMMON)
    assert (tmp_path / "o" / "steps4.png").is_file()


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = tiny(3)
    hasten.quantize_model(model, tmp_path / "small", images=2, steps=2)
    with pytest.raises(BadInput, match="is quantised or exported, which cannot be trained"):
        distill_model(hasten.load(tmp_path / "small"), tmp_path / "o", "progressive", data(tmp_path, 3), **COMMON)
