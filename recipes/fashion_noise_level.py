"""Train the noise estimator of the bundled Fashion-MNIST teacher, and measure its effect on sampling.

    python -m recipes.fashion_noise_level --out fashion-noise-level --measure

Writes a model folder with the part "noise_level" (76,577 weights) and, with --measure, `figures.json`: Frechet
distance and accuracy of 2,000 images (seeds 0 .. 1999, guidance 1, bf16) with and without the adjustment, on linear and
Fibonacci betas and on the default grid.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import hasten
from hasten.metrics import evaluate_images
from hasten.workflows.tune import tune_model

DATA = Path("/usr/share/datasets/fashion-mnist")  # Debian package dataset-fashion-mnist
GRID = "lambda:low=0.03"
SAMPLERS = (
    "ddim",
    "noise_level:family=linear,updates=()",
    "noise_level:family=linear",
    "noise_level:family=times,updates=()",
    "noise_level:family=times",
    "noise_level:family=fibonacci,updates=()",
    "noise_level:family=fibonacci",
)


def measure(folder: Path, samplers: list[str], counts: list[int], n: int) -> None:
    """Add missing entries to `folder/figures.json` and print each."""
    model = hasten.load(folder)
    file = folder / "figures.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for steps in counts:
        for sampler in samplers:
            key = f"{sampler} | {GRID} | {steps} | {n}"
            if key in results:
                continue
            start = time.process_time()
            images = model.sample(
                n, sampler=sampler, times=GRID, steps=steps, guidance_scale=1.0, precision="bf16", batch_size=100
            )
            measures = evaluate_images(images, model.labels(n), "fashion", "fashion", range(n))
            results[key] = {name: measures[name].value for name in ("frechet", "accuracy", "precision", "recall")}
            results[key] |= {"interval": measures["frechet"].interval, "cpu_seconds": time.process_time() - start}
            file.write_text(json.dumps(results, indent=1) + "\n")
            print(key, results[key], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the four IDX .gz files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model with its estimator")
    parser.add_argument("--steps", type=int, default=4000, help="of training")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 6, 8, 10, 20], help="numbers of sampling steps")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--n", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.out / "model.json").exists():
        start = time.process_time()
        method = f"noise_level:steps={args.steps},minutes=600"
        record = tune_model(hasten.load("fashion"), args.out, method, data=args.data, seed=args.seed)
        print(record["figures"], f"cpu {time.process_time() - start:.0f} s", flush=True)
    if args.measure:
        measure(args.out, args.samplers, args.counts, args.n)


if __name__ == "__main__":
    main()
