"""Comparisons of a model with others: students beside their teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.compare import compare
from hasten.errors import BadInput
from hasten.model import Model
from hasten.plan import plan
from hasten.samplers import DDIM
from hasten.schedules import VPCosine
from hasten.times import Trailing

from .factories import tiny_model

NETWORK = {"embedding": 16, "std": 0.1}
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


def saved_model(folder: Path, shape: tuple[int, int, int] = (1, 8, 8), **network: Any) -> Model:
    """A tiny model, saved in a folder; with options of its network a student of two steps."""
    model = tiny_model("abc", folder.name, shape, schedule=VPCosine(offset=0.0), network={**NETWORK, **network})
    if network:
        model.plan = plan(DDIM(), model.denoiser.schedule, Trailing()(model.denoiser.schedule, 2))
        model.steps = 2
    model.save(folder)
    return model


def test_a_student_is_a_row_beside_its_teacher(tmp_path: Path) -> None:
    teacher, student = saved_model(tmp_path / "teacher"), saved_model(tmp_path / "student", guidance=(1.0, 3.0))
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
    student = saved_model(tmp_path / "student", guidance=(1.0, 3.0))
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
    teacher = saved_model(tmp_path / "teacher")
    saved_model(tmp_path / "student", guidance=(1.0, 3.0))
    saved_model(tmp_path / "large", (1, 16, 16))
    line = line.format(tmp_path / "student", tmp_path / "large")
    text = f'[reference]\nsampler = "ddim"\nsteps = 4\n[[variant]]\nname = "x"\n{line}\n'
    (tmp_path / "set.toml").write_text(text)
    with pytest.raises(BadInput, match=message) as error:
        compare(teacher, tmp_path / "set.toml", n=10, out=tmp_path / "out", show=False)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
