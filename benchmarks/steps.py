"""Fréchet distance of the bundled model at equal network evaluations: fixed grids, optimised steps, fitted plans.

    python -m benchmarks.steps --out steps.jsonl [--guidance-scale 1] [--n 10000] [--part 0/2]

First the best fixed grid of each count of steps is chosen among `GRIDS` (order 2 and 3 of UniPC on each) with 1,000
images of seeds that are used for nothing else; then (`--no-choose`) that grid and the model's own plans of as many
evaluations draw `n` images of the seeds 0, 1, ... Rows that are in the file are not made again; with `--part k/m` only
every m-th row is made, for several processes.
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
    """The rows that choose."""
    return [
        {"kind": "grid", "steps": steps, "sampler": f"unipc:order={order}", "times": times}
        for steps in STEPS
        for times in GRIDS
        for order in (2, 3)
    ]


def measured(model: hasten.Model, row: dict[str, Any], n: int, seed: int, guidance_scale: float) -> dict[str, Any]:
    """The row with its figures."""
    began = time.perf_counter()
    way = {key: row[key] for key in ("sampler", "times", "plan") if key in row}
    images = model.sample(
        n, seed=seed, steps=row["steps"], guidance_scale=guidance_scale, batch_size=100, runtime="bf16", **way
    )
    known = reference(model.card["reference"])
    seen = evaluate_images(images, model.labels(n), feature_net(known.features), known, range(seed, seed + n))
    told = {name: seen[name].value for name in ("frechet", "kid", "accuracy", "precision", "recall", "coverage")}
    low, high = seen["frechet"].interval or (None, None)
    return {
        **row,
        "n": n,
        "seed": seed,
        "guidance_scale": guidance_scale,
        **told,
        "low": low,
        "high": high,
        "floor": seen["frechet"].floor,
        "seconds": time.perf_counter() - began,
    }


def best(found: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The best fixed grid of a count of steps, among those that chose."""
    return min((r for r in found if r["kind"] == "grid" and r["steps"] == steps), key=lambda r: r["frechet"])


def main(
    *,
    out: Path,
    guidance_scale: float = 1.0,
    n: int = 10_000,
    part: str = "0/1",
    model: str = "fashion",
    choose: bool = True,
) -> None:
    """Make the rows that the file lacks, one JSON line each. With --no-choose: the final ones, once all have chosen."""
    loaded = hasten.load(model)
    mine, parts = (int(x) for x in part.split("/"))
    found = read_json_lines(out)
    found = [row for row in found if row["guidance_scale"] == guidance_scale]
    todo = [(row, CHOOSING, FIRST) for row in rows(guidance_scale)]
    if not choose:
        suffix = "" if guidance_scale == 1 else f"-g{guidance_scale:g}"
        todo = []
        for steps in STEPS:
            chosen = best(found, steps)
            todo += [({"kind": "best", "steps": steps, **{k: chosen[k] for k in ("sampler", "times")}}, n, 0)]
            for name in PLANS:
                if f"{name}-{steps}{suffix}" in loaded.plans:
                    todo.append(({"kind": name, "steps": steps, "plan": f"{name}-{steps}{suffix}"}, n, 0))
    for row, count, seed in todo[mine::parts]:
        same = {**row, "n": count, "seed": seed, "guidance_scale": guidance_scale}
        if any(all(old.get(key) == value for key, value in same.items()) for old in found):
            continue
        done = measured(loaded, row, count, seed, guidance_scale)
        append_json_line(out, done)
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    cyclopts.run(main)
