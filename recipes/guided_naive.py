"""A baseline that fails: distil the conditional and the unconditional branch separately, and guide the students.

    hasten distill fashion --method 'guided:steps=(16,8,4)' --data /usr/share/datasets/fashion-mnist --out runs/guided
    python -m recipes.guided_naive --student runs/guided --out runs/naive

A guided teacher evaluates its network twice per step, with the class and without. It seems natural to halve the steps
of each branch by progressive distillation, and to guide with the two students, `x0 = x0_u + s (x0_c - x0_u)`. But the
result of two steps is not linear in the model outputs: the state at the second step depends on the scale. On the
mixture of the tests, for a jump from the angle pi/4 to pi/8, the two differ by .061, .34, 1.03 and 2.6 at w = s - 1 =
.3, 1, 2 and 4, for values of 1 to 2.4 (`tests/distillers/test_naive.py`); without guidance they agree. These errors
accumulate over the halvings. The correct students have the scale as an input and no branches (Meng et al. 2023,
arXiv:2210.03142).

Both branches are one network here, with the class for half of the samples, trained for as many model evaluations as the
correct student, and sampled with two evaluations per step. For every scale one line for each of the two, and for the
teacher at the same number of steps: root mean square distance to the teacher's images from the same noise in
`--against` steps of DDIM, Frechet distance to the test images, class accuracy, model evaluations per image.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten.distillers import DistillTask
from hasten.distillers._dry_run import DryRun, allocate
from hasten.distillers.progressive import Progressive
from hasten.metrics import evaluate_images
from hasten.model import Model
from hasten.train.data import Batches, open_data

from .fashion_teacher import DATA

SCALES = (1.0, 1.3, 2.0, 3.0, 5.0)
SEED, BATCH = 0, 128


class Branches(DistillTask):
    """A task with the class for half of the samples and the null label for the others."""

    def cond(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        label = batch["label"]
        none = torch.full_like(label, self.denoiser.null_label)  # type: ignore[arg-type]
        return {"label": torch.where(torch.rand(len(label), device=label.device) < 0.5, none, label)}


class Trial(Branches, DryRun):
    """The same for the dry run, which measures the cost of the stages."""


def distil(teacher: Model, out: Path, steps: tuple[int, ...], evaluations: float, data: str, precision: str) -> Model:
    """The naive student of `steps[-1]` steps, trained for `evaluations` of the network for one image; goes on from
    `out` where it was stopped."""
    denoiser = teacher.denoiser.requires_grad_(False).eval()
    batches = Batches(open_data(data, split="train"), BATCH, seed=SEED)
    common: dict[str, Any] = {
        "teacher": denoiser,
        "denoiser": denoiser,
        "batches": batches,
        "shape": teacher.shape,
        "out": out,
        "seed": SEED,
        "precision": precision,
    }
    trial, method = Trial(**common), Progressive(steps)
    method.distill(trial)
    allocate(trial.stages, None, None, evaluations)
    planned = {stage.name: stage.steps for stage in trial.stages}
    print(json.dumps({"stages": planned, "evaluations": evaluations}), flush=True)
    student = method.distill(Branches(**common, steps=planned))
    model = Model(
        student.denoiser.cpu(),
        "naive",
        teacher.shape,
        teacher.classes,
        sampler="ddim",
        times="trailing",
        steps=student.steps,
        guidance_scale=2.0,
        card={"summary": "the naive baseline of recipes/guided_naive.py"},
    )
    model.save(out)
    return model


def compare(
    teacher: Model, models: dict[str, Model], n: int, steps: int, against: int, runtime: str
) -> list[dict[str, Any]]:
    """A row for each model and scale: `n` images, classes in turn, the same noise for all."""
    rows = []
    labels = teacher.labels(n)
    for scale in SCALES:
        options: dict[str, Any] = {"guidance_scale": scale, "precision": runtime, "batch_size": 100}
        target = teacher.sample(n, sampler="ddim", times="trailing", steps=against, **options)
        for name, model in models.items():
            sampler = model.sampler if name == "right" else "ddim"
            images = model.sample(n, sampler=sampler, times="trailing", steps=steps, **options)
            measures = evaluate_images(images, labels, bootstrap=0)
            calls = 1 if model.denoiser.guidance_range is not None or scale == 1 else 2
            rows.append(
                {
                    "model": name,
                    "guidance_scale": scale,
                    "steps": steps,
                    "evaluations": calls * steps,
                    "to the teacher": round(float((images - target).square().mean().sqrt()), 4),
                    "frechet": round(measures["frechet"].value, 4),
                    "accuracy": round(measures["accuracy"].value, 4),
                    "n": n,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="the correct student, a folder written by `hasten distill`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--teacher", default="fashion", help="the model that both were distilled from")
    parser.add_argument("--data", default=DATA, help="folder with the four IDX files")
    parser.add_argument("--start", type=int, default=16, help="steps of the first naive student")
    parser.add_argument("--nfe-budget", type=float, help="budget; left out: what the right student took")
    parser.add_argument("--n", type=int, default=2000, help="images a row")
    parser.add_argument("--against", type=int, default=64, help="steps of the teacher whose images are the target")
    parser.add_argument("--precision", default="bf16", help="fp32 or bf16, for training and sampling")
    args = parser.parse_args()
    teacher, right = hasten.load(args.teacher), hasten.load(args.student)
    record = right.card.get("distilled", {})
    budget = record.get("evaluations") if args.evaluations is None else args.evaluations
    if budget is None:
        parser.error(f"{args.student} does not say what it cost: give --evaluations")
    steps = tuple(n for n in (args.start // 2**k for k in range(args.start.bit_length())) if n >= right.steps)
    if not steps or steps[-1] != right.steps:
        parser.error(f"--start {args.start} is not {right.steps}, the steps of {args.student}, times a power of 2")
    naive = distil(teacher, args.out, steps, budget, args.data, args.precision)
    models = {"right": right, "naive": naive, "teacher": teacher}
    rows = compare(teacher, models, args.n, right.steps, args.against, args.precision)
    (args.out / "figures.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
