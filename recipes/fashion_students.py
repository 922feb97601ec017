"""Distil the bundled teacher into the bundled students: one mainly for 8 and 4 steps, one for a single step.

    hasten distill fashion --data DATA --method 'guided:steps=(8,4,2,1)' ... --out runs/guided    the stage `guidance`
    python -m recipes.fashion_students fashion_student --teacher runs/guided/guidance --out runs/few --minutes 9
    python -m recipes.fashion_students fashion_one_step --teacher runs/guided/guidance --out runs/one --minutes 65
    python -m recipes.fashion_students fashion_student --out runs/few --bundle-to hasten/zoo/fashion_student

Both are one network for all four numbers of steps and for guidance scales 1 to 5 (`guided:shared=true`), from the same
first stage, which took ten minutes; with --teacher fashion it is trained first, in a fraction of the minutes. They
differ in the targets and in the distribution of images (see METHODS): the second has three times the images for 2 steps
and 1 step. An interrupted run resumes from `--out`.

Measured on 2026-11-21, guidance scale 2, 1,000 images (the teacher's 256 steps of two evaluations: .678):

    steps                    8      4      2      1
    fashion_student       .655   .704   .977   2.31     800 steps of 64 images, 10 minutes on two cores
    fashion_one_step      .653   .776   .960   1.27   4,506 steps of 64 images, 98 minutes on one busy core
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cyclopts

import hasten
from hasten.plan import plan
from hasten.workflows.distill import distill_model

DATA = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
METHODS = {
    "fashion_student": ("guided:steps=(8,4,2,1),start=32,shared=true,last=1", 4),
    "fashion_one_step": ("guided:steps=(8,4,2,1),start=16,order=2,shared=true,last=3", 1),
}


def bundle(name: str, run: Path, folder: Path) -> None:
    """Save the student of a run as a model, in fp16, with its number of steps recommended."""
    student = hasten.load(run)
    steps, (low, high) = METHODS[name][1], student.denoiser.guidance_range  # type: ignore[misc]
    times = hasten.pick("times", student.times)(student.denoiser.schedule, steps)
    counts = "1 step (or 2, 4, 8)" if steps == 1 else "8, 4, 2 or 1 steps"
    card = {
        **student.card,
        "recipe": "recipes/fashion_students.py",
        "summary": f"student of fashion for {counts} of one evaluation, guidance scales {low:g} to {high:g}",
    }
    compiled = plan(hasten.pick("samplers", student.sampler), student.denoiser.schedule, times)
    dataclasses.replace(student, name=name, steps=steps, plan=compiled, card=card).save(folder, half=True)


def main(
    name: str,
    /,
    *,
    out: Path,
    teacher: str = "fashion",
    data: str = DATA,
    minutes: float = 60,
    batch_size: int = 64,
    bundle_to: Path | None = None,
) -> None:
    """Train the student of this name, or with --bundle-to write what was trained."""
    if bundle_to is not None:
        bundle(name, out, bundle_to)
        return
    distill_model(
        hasten.load(teacher),
        out,
        METHODS[name][0],
        data,
        minutes=minutes,
        guidance_scale=2.0,
        batch_size=batch_size,
        precision="bf16",
        say=print,
    )


if __name__ == "__main__":
    cyclopts.run(main)
