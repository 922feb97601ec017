"""Comparisons of a model with others: students beside their teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.compare import compare
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.plan import plan
from hasten.predictions import V
from hasten.samplers import DDIM
from hasten.schedules import VPCosine
from hasten.times import Trailing

SET = """
n = 10
rounds = 1
[reference]
sampler = "ddim"
steps = 4
guidance_scale = 2.0
[[variant]]
name = "student"
model = "{0}"
[[variant]]
name = "student, guidance 3"
model = "{0}"
guidance_scale = 3.0
[[variant]]
name = "student by DDIM"
model = "{0}"
sampler = "ddim"
times = "trailing"
steps = 2
"""


def model(folder: Path, shape: tuple[int, int, int] = (1, 8, 8), **more: object) -> Model:
    torch.manual_seed(0)
    net = UNet(1, widths=(8,), classes=3, embedding=16, **more)  # type: ignore[arg-type]
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    made = Model(Denoiser(net, VPCosine(offset=0.0), V()), folder.name, shape, ("a", "b", "c"))
    if more:
        made.plan = plan(DDIM(), made.denoiser.schedule, Trailing()(made.denoiser.schedule, 2))
        made.steps = 2
    made.save(folder)
    return made


def test_a_student_is_a_row_beside_its_teacher(tmp_path: Path) -> None:
    teacher, student = model(tmp_path / "teacher"), model(tmp_path / "student", guidance=(1.0, 3.0))
    (tmp_path / "set.toml").write_text(SET.format(tmp_path / "student"))
    rows = {row["name"]: row for row in compare(teacher, tmp_path / "set.toml", out=tmp_path / "out", show=False)}
    assert rows["reference"]["nfe"] == 8  # two branches
    assert rows["student"]["nfe"] == rows["student by DDIM"]["nfe"] == 2
    assert rows["student"]["model"] == str(tmp_path / "student")
    assert rows["student"]["rms"] == pytest.approx(rows["student by DDIM"]["rms"], rel=1e-4)
    assert rows["student"]["rms"] != pytest.approx(rows["student, guidance 3"]["rms"], rel=1e-4)
    assert rows["student"]["macs_per_image"] > 0
    # other weights are another row, though all else is the same
    keys = {row["key"] for row in rows.values()}
    with torch.no_grad():
        next(student.denoiser.parameters()).add_(0.1)
    student.save(tmp_path / "student")
    again = compare(teacher, tmp_path / "set.toml", out=tmp_path / "out", show=False)
    assert {row["key"] for row in again} & keys == {rows["reference"]["key"], *(
        row["key"] for row in rows.values() if row["role"] == "equal-cost")}  # fmt: skip


def test_students_alone_can_be_compared(tmp_path: Path) -> None:
    student = model(tmp_path / "student", guidance=(1.0, 3.0))
    text = '[reference]\nsampler = "ddim"\nsteps = 4\n[[variant]]\nname = "two"\nsampler = "ddim"\nsteps = 2\n'
    (tmp_path / "set.toml").write_text(text)
    rows = compare(student, tmp_path / "set.toml", n=10, rounds=1, out=tmp_path / "out", show=False)
    assert [row["nfe"] for row in rows[:2]] == [4, 2]


@pytest.mark.parametrize(
    "line, message",
    [
        ('model = "nowhere"', "nowhere"),
        ("model = 3", "must be text"),
        ('model = "{0}"\nsteps = 0', "steps must be an integer of at least 1"),
        ('model = "{1}"', "other images or classes"),
        ('model = "{0}"\nguidance_scale = 9.0', "distilled for guidance_scale 1 to 3"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path: Path, line: str, message: str) -> None:
    teacher = model(tmp_path / "teacher")
    model(tmp_path / "student", guidance=(1.0, 3.0))
    model(tmp_path / "large", (1, 16, 16))
    line = line.format(tmp_path / "student", tmp_path / "large")
    text = f'[reference]\nsampler = "ddim"\nsteps = 4\n[[variant]]\nname = "x"\n{line}\n'
    (tmp_path / "set.toml").write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        compare(teacher, tmp_path / "set.toml", n=10, out=tmp_path / "out", show=False)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
