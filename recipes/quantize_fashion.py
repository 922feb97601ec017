"""Quantize the bundled teacher with all configurations of `hasten.accelerators.quantize`, and measure its quality.

    python -m recipes.quantize_fashion --out runs/quantized                                   # all rows
    python -m recipes.quantize_fashion --out runs/quantized --n 200 --iterations 100 --only w8a8,w4a8-adaround

A row per configuration: relative error of x0 on the model evaluations of held-out images; squared error of AdaRound
relative to nearest rounding, mean over the blocks; size of the weights file relative to fp32; time of a model
evaluation relative to the float network (one thread, interleaved, medians of CPU time); and the Frechet distance of `n`
images to the test images with each sampler, as the change from the float network's with the same seeds.

Models are saved in `out/<row>`, so that an interrupted run resumes. Rows are appended to `out/rows.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import hasten
from hasten.metrics import evaluate_images, feature_net, reference
from hasten.model import Model
from hasten.nets.quantized import execution
from hasten.workflows.quantize import quantize_model

ROWS: dict[str, dict[str, Any]] = {
    "w8a8": {"weights": 8},
    "w8a8-unsplit": {"weights": 8, "split": False},
    "w8a8-groups1": {"weights": 8, "groups": 1},
    "w8a8-groups3": {"weights": 8, "groups": 3},
    "w8a8-uncorrected": {"weights": 8, "correct": False},
    "w8a8-all": {"weights": 8, "keep": ()},
    "w8a8-minmax": {"weights": 8, "ranges": "minmax"},
    "w4a8-nearest": {"weights": 4, "rounding": "nearest"},
    "w4a8-nearest-all": {"weights": 4, "rounding": "nearest", "keep": ()},
    "w4a8-rank8": {"weights": 4, "rounding": "nearest", "rank": 8},
    "w4a8-rank16": {"weights": 4, "rounding": "nearest", "rank": 16},
    "w4a8-adaround": {"weights": 4, "rounding": "adaround"},
    "w4a8-adaround-unsplit": {"weights": 4, "rounding": "adaround", "split": False},
    "w4a8-adaround-steps": {"weights": 4, "rounding": "adaround", "learn_steps": True},
    "w4a8-adaround-rank4": {"weights": 4, "rounding": "adaround", "rank": 4},
    "w4a8-adaround-rank16": {"weights": 4, "rounding": "adaround", "rank": 16},
    "w4a8-nearest-mixed": {"weights": 4, "rounding": "nearest", "eight": 0.06},
    "w4a8-adaround-mixed": {"weights": 4, "rounding": "adaround", "eight": 0.06},
    "w4a8-adaround-mixed-groups1": {"weights": 4, "rounding": "adaround", "eight": 0.06, "groups": 1},
    "w4a8-adaround-groups1": {"weights": 4, "rounding": "adaround", "groups": 1},
}
CONFIGS = {
    "unipc-12": {"sampler": "unipc", "steps": 12},
    "ddim-50": {"sampler": "ddim", "times": "trailing", "steps": 50},
}


def quantize_or_load(teacher: Model, name: str, out: Path, iterations: int, images: int | None) -> dict[str, Any]:
    """The card of a row's model, which is quantized if it does not exist."""
    options = dict(ROWS[name])
    learned = options.get("rounding") == "adaround" or options.get("learn_steps")
    if learned:
        options |= {"iterations": iterations, "images": images}
    return quantize_model(teacher, out / name, say=lambda line: print(f"{name}: {line}", flush=True), **options)


def left_of_nearest(card: dict[str, Any]) -> float | None:
    """The squared error of AdaRound relative to nearest rounding, mean over the blocks."""
    blocks = card["blocks"].get("rounding")
    return None if not blocks else sum(b["error"] / b["nearest"] for b in blocks.values()) / len(blocks)


@torch.no_grad()
def times(models: dict[str, Model], batch: int, rounds: int) -> dict[str, float]:
    """CPU seconds of a model evaluation, median, for each model, interleaved, on one thread."""
    threads, seconds_by_model = torch.get_num_threads(), {name: [] for name in models}  # type: ignore[var-annotated]
    torch.set_num_threads(1)
    try:
        for turn in range(rounds + 1):
            for name, model in models.items():
                x = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(turn))
                start = time.process_time()
                model.denoiser(x, 0.5, **model.cond(batch))
                seconds_by_model[name] += [time.process_time() - start] if turn else []  # the first round warms up
    finally:
        torch.set_num_threads(threads)
    return {name: median(seconds) for name, seconds in seconds_by_model.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--model", default="fashion", help="the model to quantise")
    parser.add_argument("--n", type=int, default=5000, help="images a row; 0: no Frechet distances")
    parser.add_argument("--iterations", type=int, default=300, help="of AdaRound, a block")
    parser.add_argument("--images", type=int, help="calibration images where something is learned (32)")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="of the sampled images")
    parser.add_argument("--batch", type=int, default=64, help="of the timing")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing")
    parser.add_argument("--only", help="names of rows, with commas")
    parser.add_argument("--ways", default=",".join(CONFIGS), help="sampling configurations, comma-separated")
    args = parser.parse_args()
    teacher = hasten.load(args.model)
    names = list(ROWS) if args.only is None else args.only.split(",")
    cards: dict[str, dict[str, Any]] = {
        name: quantize_or_load(teacher, name, args.out, args.iterations, args.images) for name in names
    }
    models = {"plain": teacher, **{name: hasten.load(args.out / name) for name in names}}
    seconds = times(models, args.batch, args.rounds) if args.rounds else dict.fromkeys(models, float("nan"))
    statistics = reference(teacher.card["reference"])
    net, labels = feature_net(statistics.features), teacher.labels(args.n) if args.n else None
    plain: dict[str, float] = {}
    for name, model in models.items():
        row: dict[str, Any] = {"row": name, "n": args.n, "guidance_scale": args.guidance_scale}
        row["time_ratio"] = round(seconds[name] / seconds["plain"], 3)
        if name in cards:
            bytes_ = (args.out / name / "weights.safetensors").stat().st_size / cards[name]["bytes_fp32"]
            left = left_of_nearest(cards[name])
            row |= {
                "error": round(cards[name]["error"], 5),
                "bytes": round(bytes_, 4),
                "execution": execution(model.denoiser.net),
            }
            row |= {} if left is None else {"left_of_nearest": round(left, 3)}
        for config in args.ways.split(",") if args.n else ():
            images = model.sample(args.n, guidance_scale=args.guidance_scale, batch_size=100, **CONFIGS[config])
            distance = evaluate_images(images, labels, net, statistics, bootstrap=0)["frechet"].value
            plain.setdefault(config, distance)
            row |= {config: round(distance, 4), f"{config} change": round(distance / plain[config] - 1, 4)}
        print(json.dumps(row), flush=True)
        with open(args.out / "rows.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
