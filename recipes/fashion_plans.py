"""Fit few-step plans of the bundled teacher.

    python -m recipes.fashion_plans --out hasten/zoo/fashion/plans
    python -m recipes.fashion_plans --out hasten/zoo/fashion/plans --guidance-scale 1.25

Writes `fitted-N.json`, with guidance `fitted-N-gS.json`, for N in `--steps`. Existing plans are not fitted again.
Calibration noises have seeds from 1,000,000, disjoint from those of evaluations. A guided plan is fitted on the guided
denoiser. The target is 24 steps of UniPC-3 that end at q = .06 (t = .038).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from hasten.loading import load
from hasten.plan import Plan
from hasten.samplers import UniPC
from hasten.times import UniformLambda
from hasten.train.data import open_data
from hasten.tuning import TuningTask
from hasten.tuning.fitted_plan import FittedPlan

SEED, LOW = 1_000_000, 0.038
DATA = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist


def fit(steps: int, guidance_scale: float, n: int, options: FittedPlan, data: str) -> tuple[Plan, dict[str, float]]:
    """The fitted plan for one number of steps, and its figures."""
    model, real = load("fashion"), open_data(data, split="train")

    def images(count: int) -> tuple[torch.Tensor, None]:
        indices = torch.randperm(60_000, generator=torch.Generator().manual_seed(SEED))[:count]
        return real.images(indices).float() / 127.5 - 1, None

    task = TuningTask(
        model.guided(guidance_scale),
        UniPC(3),
        UniformLambda(low=0.03)(model.denoiser.schedule, steps),
        model.shape,
        labels=lambda count: torch.arange(count) % 10,
        images=images,
        seed=SEED,
        n=n,
        identity=model.sha256 or "",
    )
    with torch.autocast("cpu", torch.bfloat16):
        tuned = options.tune(task)
    assert tuned.plan is not None
    return tuned.plan, tuned.figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--data", default=DATA, help="folder with the four IDX files")
    parser.add_argument("--finish", type=float, default=3.0, help="see FittedPlan")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 5, 6, 8, 10])
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--n", type=int, default=64, help="noises to fit on")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    options = FittedPlan(
        gradient="frozen",
        held_out=32,
        fine=24,
        low=LOW,
        iterations=args.rounds,
        patience=2,
        finish=args.finish,
        batch=64,
        search="sampler",
    )
    for steps in args.steps:
        scale = "" if args.guidance_scale == 1 else f"-g{args.guidance_scale:g}"
        file = args.out / f"fitted-{steps}{scale}.json"
        if file.exists():
            continue
        start = time.process_time()
        plan, figures = fit(steps, args.guidance_scale, args.n, options, args.data)
        file.write_text(plan.to_json() + "\n")
        summary = ", ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in figures.items())
        print(f"{file.name}: {summary}, {time.process_time() - start:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
