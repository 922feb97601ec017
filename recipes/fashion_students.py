"""Distil the bundled teacher and bundle its student for 1, 2, 4 and 8 steps.

    python -m recipes.fashion_students --out runs/students --minutes 60
    python -m recipes.fashion_students --out runs/students --bundle-to hasten/zoo/fashion_student

One network for all four counts of steps and for guidance scales 1 to 5 (`guided:shared=true`): stage one for a ninth of
the time, the rest for the student itself. It goes on from `--out` when it is stopped. `--teacher` may be what a stage
one left, which then is not done again.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cyclopts

import hasten
from hasten.distill import distill_model

DATA = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts it
METHOD = "guided:steps=(8,4,2,1),start=16,order=2,shared=true,last=3"


def bundle(run: Path, folder: Path) -> None:
    """Write the student of a run as a model, in fp16."""
    student = hasten.load(run)
    model = dataclasses.replace(
        student, name=folder.name, card={**student.card, "recipe": "recipes/fashion_students.py"}
    )
    model.save(folder, half=True)


def main(
    *, out: Path, teacher: str = "fashion", data: str = DATA, minutes: float = 60, batch_size: int = 64,
    bundle_to: Path | None = None,
) -> None:  # fmt: skip
    """Train, or with --bundle-to write what was trained."""
    if bundle_to is not None:
        bundle(out, bundle_to)
        return
    distill_model(
        hasten.load(teacher), out, METHOD, data, minutes=minutes, guidance_scale=2.0, batch_size=batch_size,
        runtime="bf16", say=print,
    )  # fmt: skip


if __name__ == "__main__":
    cyclopts.run(main)
