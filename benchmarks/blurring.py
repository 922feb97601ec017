"""Blurring and soft diffusion against plain diffusion: equal network, equal training minutes, 10, 25 and 100 steps.

    python -m benchmarks.blurring --data FASHION --out runs/blurring --minutes 75
    python -m benchmarks.blurring --out runs/blurring --models plain,soft --images 2000
    python -m benchmarks.blurring --out runs/blurring --resolve

Trains a U-Net of the same size (`--widths`, `--patch`) for `--minutes` with each process on the training images, and
prints a line for each model, sampler and number of steps: the Frechet distance to the test images in the bundled
features, with its interval. An interrupted run resumes;
lines that `results.jsonl` in the folder has are not measured again. `--resolve` prints, for each model, the relative
error of the estimated clean image in four bands of frequency at six times: what blurring promises is that the low
bands are resolved earlier.
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
from hasten.files import read_json_lines
from hasten.metrics.evaluate import evaluate_images
from hasten.processes._base import Process
from hasten.processes.blurring import Blurring
from hasten.train import open_data
from hasten.train.data import to_float
from hasten.utils.dct import dct2
from hasten.workflows.train import TrainConfig, train_model

DATA = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
COUNTS = (10, 25, 100)
# by model: the process, and the samplers with their grids
MODELS: dict[str, tuple[str | None, tuple[tuple[str, str], ...]]] = {
    "plain": (None, (("ddpm", "uniform"), ("ddim", "uniform"), ("unipc", "angle"))),
    "blurring0": ("blurring:sigma_max=0", (("blurring", "uniform"), ("blurring:eta=0", "uniform"))),
    "blurring": ("blurring:sigma_max=7", (("blurring", "uniform"), ("blurring:eta=0", "uniform"))),
    "blurring20": ("blurring:sigma_max=20", (("blurring", "uniform"), ("blurring:eta=0", "uniform"))),
    "soft": ("soft", (("soft:form=naive", "uniform"), ("soft", "uniform"), ("soft:form=ode", "uniform"))),
    "mask": ("soft:corruption=mask", (("soft:form=naive", "uniform"), ("soft", "uniform"))),
    "cold": ("cold", (("soft:form=naive,noise=0", "uniform"), ("soft:form=cold", "uniform"))),
    "heat": ("heat", tuple((f"soft:form=naive,noise={n:g}", "uniform") for n in (0.5, 1.0, 1.25, 2.0))),
}


def train(name: str, args: argparse.Namespace) -> Any:
    """The model of this name, trained to its end."""
    config = TrainConfig(
        minutes=args.minutes,
        widths=args.widths,
        patch=args.patch,
        batch_size=args.batch_size,
        process=MODELS[name][0],
        seed=args.seed,
    )
    return train_model(open_data(args.data, "train", channels=1), args.out / name, config)


def measure(name: str, model: Any, args: argparse.Namespace) -> None:
    """A line of `results.jsonl` for each sampler and number of steps that it has not."""
    path = args.out / "results.jsonl"
    done = {(row["model"], row["sampler"], row["steps"]) for row in read_json_lines(path)} if path.is_file() else set()
    labels = torch.arange(args.images) % len(model.classes) if model.classes else None
    for sampler, times in MODELS[name][1]:
        for steps in args.steps:
            if (name, sampler, steps) in done:
                continue
            began = time.perf_counter()
            label = None if labels is None else labels.tolist()
            images = model.sample(
                args.images, label=label, seed=args.seed, sampler=sampler, times=times, steps=steps, guidance_scale=1.0
            )
            result = evaluate_images(images, labels, seeds=range(args.seed, args.seed + args.images))["frechet"]
            row = {
                "model": name,
                "sampler": sampler,
                "times": times,
                "steps": steps,
                "frechet": result.value,
                "interval": result.interval,
                "floor": result.floor,
                "images": args.images,
                "minutes": args.minutes,
                "seconds": time.perf_counter() - began,
            }
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name:10} {sampler:28} {steps:4} steps: {result.value:8.3f}  {result.interval}", flush=True)


def resolved(name: str, model: Any, images: Tensor, labels: Tensor | None) -> None:
    """Print the relative error of the estimated clean image, by band of frequency and time."""
    process, label = model.denoiser.schedule, {} if labels is None else {"label": labels}
    H, W = images.shape[-2:]
    radius = torch.hypot(torch.arange(H)[:, None] / H, torch.arange(W) / W)
    edges = (0.0, 0.08, 0.2, 0.45, 2.0)
    print(f"{name}: relative error of x in the bands of frequency {edges[:-1]} of the largest, by time")
    for t in (0.95, 0.8, 0.6, 0.4, 0.2, 0.05):
        at = torch.full((len(images),), t, dtype=torch.float64)
        eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        if isinstance(process, Process):
            z = process.corrupt(images, at, eps)
        else:
            z = float(process.alpha(t)) * images + float(process.sigma(t)) * eps
        with torch.no_grad():
            u = dct2(model.denoiser(z, t, **label).double())
        if isinstance(process, Blurring):  # its output is the blurred image
            u = u / process.factor(torch.tensor(t, dtype=torch.float64), process.keys)
        x = dct2(images.double())
        bands = [(low <= radius) & (radius < high) for low, high in zip(edges, edges[1:])]
        errors = [float((u - x)[..., b].square().sum() / x[..., b].square().sum()) for b in bands]
        print(f"  t {t:4.2f}  " + "  ".join(f"{e:10.4f}" for e in errors), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA, help="folder with the four IDX files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=75.0, help="of training, for each model")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--steps", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--widths", type=int, nargs="+", default=(32, 64))
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolve", action="store_true", help="print the errors by frequency and do not measure")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models.split(","):
        model = hasten.load(args.out / name) if args.resolve else train(name, args)
        if args.resolve:
            data = open_data(args.data, "test", channels=1)
            rows = torch.arange(256)
            resolved(name, model, to_float(data.images(rows)), None if data.labels is None else data.labels[rows])
        else:
            measure(name, model, args)


if __name__ == "__main__":
    main()
