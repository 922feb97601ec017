"""Time grids by dynamic programming for the bundled Fashion-MNIST teacher: likelihood bound and image quality.

    python -m recipes.fashion_dynamic_programming --out dp.json --measure

Bits per dimension of the likelihood bound for each number of steps, against uniform, quadratic, Karras and lambda times
snapped to the same 500 candidates (none can be better); with --measure also the Frechet distance of 2,000 images
(seeds 0 .. 1999, guidance 1, bf16), compared with the default grid, lambda:low=0.03.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hasten
from hasten.metrics import evaluate_images
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.sampling import Noise
from hasten.times import Karras, Quadratic, UniformLambda, UniformTime
from hasten.tuning import TuningTask
from hasten.tuning.dynamic_programming import DynamicProgramming, candidate_times, shortest_paths
from hasten.tuning.moments import Moments
from recipes.fashion_moments import task

DATA = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
GRID = "lambda:low=0.03"
SPACINGS = {"uniform": UniformTime(), "quadratic": Quadratic(), "karras": Karras(), "lambda": UniformLambda()}
ROWS = (("ddpm", "small"), ("ddim", "small"), ("analytic", "analytic"))


def snap(grid: Tensor, times: Tensor) -> list[int]:
    """Distinct nodes of the candidates `grid` nearest to these ascending times, both ends included."""
    path = [0]
    for k, t in enumerate(times[1:-1].tolist()):
        nearest = int((grid - t).abs().argmin())
        path.append(min(max(nearest, path[-1] + 1), len(grid) - len(times) + 1 + k))
    return [*path, len(grid) - 1]


def bounds(statistics: dict[str, Tensor], variance: str, most: int) -> tuple[dict[int, dict[str, float]], float]:
    """Bits per dimension of the chain without the prior, by steps, and the smallest gain over a fixed spacing."""
    schedule = hasten.load("fashion").denoiser.schedule
    tuner = DynamicProgramming(variance).bind(statistics, {})
    grid = candidate_times(schedule, schedule.t_max, tuner.candidates)
    costs = tuner.costs(schedule, grid, tuner.errors(schedule)) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    best = shortest_paths(costs, most).cost[:, -1].tolist()
    table = {}
    for N in range(1, most + 1):
        paths = {name: snap(grid, spacing(schedule, N).flip(0)) for name, spacing in SPACINGS.items()}
        table[N] = {name: sum(costs[s, r].item() for s, r in zip(path, path[1:])) for name, path in paths.items()}
        table[N]["dynamic_programming"] = best[N]
    gains = [row[name] - best[N] for N, row in table.items() for name in SPACINGS if N > 1]  # one step has no free node
    return table, min(gains)


def measure(statistics: dict[str, Tensor], counts: list[int], n: int, results: dict[str, Any], save: Any) -> None:
    """Add the missing measurements."""
    model = hasten.load("fashion")
    schedule, labels = model.denoiser.schedule, torch.arange(n) % 10
    for steps in counts:
        for name, variance in ROWS:
            for tuned in (False, True):
                key = f"{name} | {'dynamic_programming:variance=' + variance if tuned else GRID} | {steps} | {n}"
                if key in results:
                    continue
                sampler, times = pick("samplers", name), pick("times", GRID)(schedule, steps)
                if hasattr(sampler, "bind"):
                    sampler = sampler.bind(statistics, {})
                tuning_task = TuningTask(denoiser=model.denoiser, sampler=sampler, times=times, shape=model.shape)
                if tuned:
                    best_plan = DynamicProgramming(variance).bind(statistics, {}).tune(tuning_task).plan
                    assert best_plan is not None
                    times = best_plan.times
                images = []
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    for part in torch.arange(n).split(100):
                        noise = Noise(part.tolist(), model.shape)
                        images.append(draw(model.denoiser, sampler, times, noise, label=labels[part]).float())
                figures = evaluate_images(torch.cat(images).clamp(-1, 1), labels, "fashion", "fashion", range(n))
                results[key] = {k: figures[k].value for k in ("frechet", "accuracy")}
                results[key]["interval"] = figures["frechet"].interval
                print(key, results[key], flush=True)
                save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four IDX .gz files")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures; goes on where it stopped")
    parser.add_argument("--most", type=int, default=64, help="steps of the bound's table")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--n", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"bits": {}, "images": {}}
    model = hasten.load("fashion")
    statistics = model.statistics
    if "mse" not in statistics:
        start = time.process_time()
        statistics = Moments(times=40, images=300).tune(task(args.data)).statistics
        print(f"squared errors measured on 300 images: cpu {time.process_time() - start:.0f} s", flush=True)
    for variance in ("small", "large", "analytic"):
        table, gain = bounds(statistics, variance, args.most)
        results["bits"][variance] = table
        print(f"{variance}: least gain over a grid on the same candidates {gain:.3g} bits per dimension")
        for N in (n for n in (4, 8, 16, 32, 64) if n <= args.most):
            print(f"  {N:3d} steps", {name: float(f"{value:.4g}") for name, value in table[N].items()})

    def save() -> None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    save()
    if args.measure:
        measure(statistics, args.counts, args.n, results["images"], save)


if __name__ == "__main__":
    main()
