"""Train, distil and bundle `aerial`: super-resolution of aerial photographs by 4, and its student.

    python -m recipes.aerial_super_resolution train --data aerial.zip --out runs/aerial --minutes 60
    python -m recipes.aerial_super_resolution distil --data aerial.zip --teacher runs/aerial --out runs/students
    python -m recipes.aerial_super_resolution bundle --teacher runs/aerial --students runs/students

The data are 500 aerial photographs of 256x256 pixels at 60 cm a pixel (NAIP 2020, eight Californian cities), crops by
Ventura et al. 2024 (github.com/jonathanventura/urban-tree-detection-data, CC BY 4.0; NAIP is in the public domain), in
`train/` of a zip or folder, and 104 of other places in `test/`. Random crops of 64 pixels in their eight symmetries.

Each step is also one command of hasten: `train --task super-resolution --factor 4 --crop 64 --flip`, and `distill
--method progressive:steps=(4,2,1)`. An interrupted run resumes from `--out`. Figures: benchmarks/RESULTS.md.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cyclopts

import hasten
from hasten.workflows.distill import distill_model
from hasten.workflows.train import train_model

ZOO = Path(hasten.__file__).parent / "zoo"
TEMPERATURES = {"aerial": 0.7, "aerial_student": 0.85}  # a student of one step is smoother at the same
DATA = "NAIP 2020, crops by Ventura et al. 2024 (github.com/jonathanventura/urban-tree-detection-data), CC BY 4.0"
app = cyclopts.App(help=__doc__)


@app.command
def train(*, data: str, out: Path, minutes: float = 60.0) -> None:
    """Train the teacher."""
    process = "super_resolution:factor=4"
    options = {"crop": 64, "flip": True, "batch_size": 16, "precision": "fp32", "lr": 1e-3}
    train_model(data, out, process=process, minutes=minutes, **options)  # type: ignore[arg-type]


@app.command
def distil(*, data: str, teacher: Path, out: Path, minutes: float = 22.0) -> None:
    """Distil it into students of 4, 2 and 1 steps."""
    model = dataclasses.replace(hasten.load(teacher), start=f"temperature:value={TEMPERATURES['aerial']}")
    method = "progressive:steps=(4,2,1),start=8"
    distill_model(model, out, method, data, minutes=minutes, batch_size=16, precision="fp32", say=print)


@app.command
def bundle(*, teacher: Path, students: Path, student: str = "steps1", folder: Path = ZOO) -> None:
    """Save both as fp16, with what they recommend."""
    count = int(student.removeprefix("steps"))
    for name, run, text, steps in (
        ("aerial", teacher, "aerial photographs 4 times larger: LWTDM of 1.4 M weights", 10),
        ("aerial_student", students / student, "student of aerial, for a single step", count),
    ):
        model = hasten.load(run)
        card = {**model.card, "recipe": "recipes/aerial_super_resolution.py", "summary": text, "data": DATA}
        if "distilled" in card:
            left_out = ("command", "data", "teacher")  # paths of the machine that it was distilled on
            card["distilled"] = {key: value for key, value in card["distilled"].items() if key not in left_out}
            card["distilled"]["teacher"] = "aerial"
        start = f"temperature:value={TEMPERATURES[name]}"
        saved = dataclasses.replace(model, name=name, card=card, start=start, steps=steps)
        saved.save(folder / name, half=True)


if __name__ == "__main__":
    app()
