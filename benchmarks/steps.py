"""Fréchet distance of the bundled model at equal NFE: fixed grids, optimised steps, fitted plans.

    python -m benchmarks.steps --out steps.jsonl [--guidance-scale 1] [--n 10000] [--part 0/2]

First the best fixed grid for each number of steps is selected among `GRIDS` (order 2 and 3 of UniPC on each) with 1,000
images of separate seeds; then (`--no-choose`) that grid and the model's own plans with the same number of evaluations
generate `n` images of the seeds 0, 1, ... Existing rows are not repeated; with `--part k/m` only every m-th row is
computed, for several processes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import cyclopts

import hasten
from hasten.files import append_json_line, read_json_lines
from hasten.metrics import evaluate_images, feature_net, reference

STEPS = (4, 5, 6, 8, 10)
GRIDS = ("lambda:low=0.03", "lambda:low=0.05", "lambda:low=0.08", "karras:low=0.03")
CHOOSING = 1_000
FIRST = 2_000_000  # seed of the images that choose among grids
PLANS = ("optimized_steps", "local_steps", "fitted_plan")


def rows(guidance_scale: float) -> list[dict[str, Any]]:
    """The rows of the selection."""
    return [
        {"kind": "grid", "steps": steps, "sampler": f"unipc:order={order}", "times": times}
        for steps in STEPS
        for times in GRIDS
        for order in (2, 3)
    ]


def measured(model: hasten.Model, row: dict[str, Any], n: int, seed: int, guidance_scale: float) -> dict[str, Any]:
    """The row with its metrics."""
    start = time.perf_counter()
    config = {key: row[key] for key in ("sampler", "times", "plan") if key in row}
    images = model.sample(
        n, seed=seed, steps=row["steps"], guidance_scale=guidance_scale, batch_size=100, precision="bf16", **config
    )
    statistics = reference(model.card["reference"])
    measures = evaluate_images(
        images, model.labels(n), feature_net(statistics.features), statistics, range(seed, seed + n)
    )
    figures = {name: measures[name].value for name in ("frechet", "kid", "accuracy", "precision", "recall", "coverage")}
    low, high = measures["frechet"].interval or (None, None)
    return {
        **row,
        "n": n,
        "seed": seed,
        "guidance_scale": guidance_scale,
        **figures,
        "low": low,
        "high": high,
        "floor": measures["frechet"].floor,
        "seconds": time.perf_counter() - start,
    }


def best(existing: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The best fixed grid for a number of steps."""
    return min((r for r in existing if r["kind"] == "grid" and r["steps"] == steps), key=lambda r: r["frechet"])


def main(
    *,
    out: Path,
    guidance_scale: float = 1.0,
    n: int = 10_000,
    part: str = "0/1",
    model: str = "fashion",
    choose: bool = True,
) -> None:
    """Compute the missing rows, one JSON line each. With --no-choose: the final ones, after the selection."""
    loaded = hasten.load(model)
    mine, parts = (int(x) for x in part.split("/"))
    existing = read_json_lines(out)
    existing = [row for row in existing if row["guidance_scale"] == guidance_scale]
    todo = [(row, CHOOSING, FIRST) for row in rows(guidance_scale)]
    if not choose:
        suffix = "" if guidance_scale == 1 else f"-g{guidance_scale:g}"
        todo = []
        for steps in STEPS:
            selected = best(existing, steps)
            todo += [({"kind": "best", "steps": steps, **{k: selected[k] for k in ("sampler", "times")}}, n, 0)]
            for name in PLANS:
                if f"{name}-{steps}{suffix}" in loaded.plans:
                    todo.append(({"kind": name, "steps": steps, "plan": f"{name}-{steps}{suffix}"}, n, 0))
    for row, count, seed in todo[mine::parts]:
        same = {**row, "n": count, "seed": seed, "guidance_scale": guidance_scale}
        if any(all(old.get(key) == value for key, value in same.items()) for old in existing):
            continue
        done = measured(loaded, row, count, seed, guidance_scale)
        append_json_line(out, done)
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    cyclopts.run(main)
