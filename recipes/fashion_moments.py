"""Measure the noise moments of the bundled Fashion-MNIST teacher, and samplers with better variances.

python -m recipes.fashion_moments --out hasten/zoo/fashion
python -m recipes.fashion_moments --out hasten/zoo/fashion --compare results.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import hasten
from hasten.files import read_json_lines
from hasten.metrics.evaluate import evaluate_images
from hasten.pick import pick
from hasten.samplers import UniPC
from hasten.train import open_data
from hasten.train.data import to_float
from hasten.tuning import TuningTask
from hasten.tuning._bound import variational_bound
from hasten.tuning.moments import Moments, data_moments, statistic_at
from hasten.tuning.second_moment import SecondMomentTuner

DATA = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
STATISTICS, PART, CARD = "statistics.safetensors", "second_moment.safetensors", "second_moment.json"
SAMPLERS = (
    "ddpm",
    "ddpm:variance=large",
    "analytic",
    "analytic:pixels=0",
    "analytic:form=ddim",
    "ddim",
    "sn",
    "sn:form=ddim",
    "fast",
)
GRIDS = ("lambda:low=0.03", "uniform")


def real(data: Path, seed: int = 0) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    """The first n training images in a shuffled order, and their labels."""
    images = open_data(data, "train", channels=1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))

    def first(n: int) -> tuple[Tensor, Tensor | None]:
        indices = order[:n]
        return to_float(images.images(indices)), None if images.labels is None else images.labels[indices]

    return first


def task(data: Path, seed: int = 0) -> TuningTask:
    """The bundled teacher with its training images."""
    model = hasten.load("fashion")
    return TuningTask(
        denoiser=model.denoiser,
        sampler=UniPC(),
        times=torch.tensor([1.0, 0.0], dtype=torch.float64),
        shape=model.shape,
        labels=model.labels,
        images=real(data, seed),
        seed=seed,
    )


def measure(args: argparse.Namespace) -> None:
    """Write `statistics.safetensors` into the folder."""
    tuning_task, start = task(args.data, args.seed), time.process_time()
    tuning_task.tick = lambda what, done, total, value: print(
        f"{what} {done}/{total} gamma {value:.6f} cpu {time.process_time() - start:.0f} s", flush=True
    )
    result = Moments(times=args.times, images=args.images).tune(tuning_task)
    result.statistics |= data_moments(real(args.data, args.seed)(20_000)[0])  # cheap: no model evaluations
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / STATISTICS).write_bytes(save({k: v.contiguous() for k, v in result.statistics.items()}))
    print(result.figures)


def train(args: argparse.Namespace) -> None:
    """Train the network of SN-DPM and write `second_moment.safetensors` into the folder."""
    tuning_task, start = task(args.data, args.seed), time.process_time()
    tuning_task.tick = lambda what, done, total, value: (
        print(f"{what} {done}/{total} loss {value:.4f} cpu {time.process_time() - start:.0f} s", flush=True)
        if done % 20 == 0
        else None
    )
    with torch.autocast("cpu", torch.bfloat16):
        result = SecondMomentTuner(steps=args.head, batch=32).tune(tuning_task)
    args.out.mkdir(parents=True, exist_ok=True)
    net = result.parts["second_moment"]
    (args.out / PART).write_bytes(save({k: v.contiguous() for k, v in net.state_dict().items()}))
    (args.out / CARD).write_text(json.dumps({"config": net.config, "figures": result.figures}, indent=2) + "\n")
    print(result.figures)


def compare(args: argparse.Namespace) -> None:
    """Frechet distance and bound per sampler, grid and number of steps, one JSON line each; existing lines are kept."""
    model = hasten.load("fashion")
    statistics = load_file(args.out / STATISTICS)
    parts: dict[str, torch.nn.Module] = {}
    if (args.out / PART).is_file():
        from hasten.nets.second_moment import SecondMoment as Net

        net = Net(**json.loads((args.out / CARD).read_text())["config"])
        net.load_state_dict(load_file(args.out / PART))
        parts["second_moment"] = net.eval().requires_grad_(False)
    model = replace(model, statistics=statistics, parts=parts, plan=None)
    done = set()
    if args.compare.is_file():
        lines = read_json_lines(args.compare)
        done = {(row["sampler"], row["times"], row["steps"]) for row in lines}
    for steps in args.steps:
        for grid in args.grids:
            for sampler in args.samplers:
                if (sampler, grid, steps) in done or (sampler.startswith("sn") and not parts):
                    continue
                row: dict[str, Any] = {"sampler": sampler, "times": grid, "steps": steps, "n": args.n, "seeds": "0.."}
                row["bound"] = bound(model, sampler, grid, steps)
                start = time.process_time()
                images = model.sample(
                    args.n, sampler=sampler, times=grid, steps=steps, guidance_scale=1.0, precision="bf16"
                )
                result = evaluate_images(images, model.labels(args.n), "fashion", "fashion", range(args.n))
                row |= {name: round(m.value, 5) for name, m in result.items()}
                row["interval"] = result["frechet"].interval
                row["cpu_seconds"] = round(time.process_time() - start, 1)
                with args.compare.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps({k: row[k] for k in ("sampler", "times", "steps", "frechet", "bound")}), flush=True)


def bound(model: hasten.Model, sampler: str, grid: str, steps: int) -> float | None:
    """Bits per dimension of an ancestral chain on the measured training images; None for another chain."""
    schedule = model.denoiser.schedule
    times = pick("times", grid)(schedule, steps)
    mse = statistic_at(model.statistics, "mse", schedule, times[:-1])
    power = float(model.statistics["spectrum"].mean() + model.statistics["mean"].square().mean())
    method = pick("samplers", sampler)
    if sampler.startswith("ddpm"):
        variance: str | Tensor = method.variance
    elif sampler.startswith("analytic") and method.form == "ddpm":
        variance = method.bind(model.statistics, {}).variances(schedule, times)
    else:
        return None
    return variational_bound(schedule, times, mse, variance, power=power).total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four IDX .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is measured and trained")
    parser.add_argument("--times", type=int, default=56)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--head", type=int, default=0, help="train the network of second moments for this number of steps"
    )
    parser.add_argument("--compare", type=Path, default=None, help="append the comparison to this file")
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--grids", nargs="+", default=GRIDS)
    parser.add_argument("--steps", type=int, nargs="+", default=(10, 25, 50))
    parser.add_argument("--n", type=int, default=1000)
    args = parser.parse_args()
    if args.head:
        train(args)
    elif args.compare:
        compare(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
