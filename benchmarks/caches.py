"""Output-level caches, as plans, against plans that are fitted for as many model evaluations.

    python -m benchmarks.caches --out caches.jsonl                 four mixtures, exact denoisers
    python -m benchmarks.caches --teacher --out caches.jsonl       the bundled model
    python -m benchmarks.caches --problems "M2 linear" --nfe 6     a trial
    python -m benchmarks.near_discrete --problems R6 R24 --save plans
    python -m benchmarks.caches --problems "R6 linear" "R24 linear" --plans plans     with these plans, without fits

A cache decides on calibration noises at which evaluations of a long sampling the network runs; its threshold is
searched until these are as many as the row says. That makes it a plan (`hasten.plan.cached`), which is run on other
noises. Caches: TeaCache-like (reuse of the output) and EasyCache-like (reuse of its difference from the input), in
terms of eps and v, on 50 steps of DDIM, uniform in t, and of UniPC-2, uniform in lambda; of the bundled model in terms
of v, which it predicts, with DDIM.

Mixtures and protocol are those of `benchmarks.mixtures`: RMS to the exact end over 256 starts, and the median over
starts. On the bundled model: RMS to the end of 24 steps of UniPC-3, over 8 noises. Its fitted plans are the bundled
ones; for the counts that have none one is fitted on 6 noises, or with `--no-fits` that of fewer evaluations is taken,
which handicaps it. `--plans` does the same on mixtures, with plans NAME-NFE.json.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from torch import Tensor

import hasten
from benchmarks.mixtures import Calibration, Problem
from hasten.accelerators.output_cache import RULES, OutputCache, OutputCached
from hasten.plan import Plan, plan
from hasten.plan.cached import cached_plan
from hasten.predictions import prediction_from
from hasten.samplers import DDIM, UniPC
from hasten.sampling import Noise
from hasten.times import Trailing, UniformLambda
from hasten.tuning import TuningTask
from hasten.tuning.fitted_plan import FittedPlan

PROBLEMS = ("M2 linear", "M64 cosine", "R6 linear", "R24 cosine")
COUNTS = tuple(range(4, 13))
STEPS, TRIALS = 50, 14
LONG: tuple[tuple[Any, Any], ...] = ((DDIM(), Trailing()), (UniPC(2), UniformLambda()))
LOW = 0.038  # of the fine path of the bundled model, as its plans were fitted


def decided(denoiser: Any, full: Plan, x: Tensor, rule: str, terms: Any, counts: Any, **cond: Any) -> dict[int, Any]:
    """The computed evaluations for each count that a threshold leads to, by bisections that share their trials."""
    trials: dict[float, list[int]] = {}

    def run(threshold: float) -> list[int]:
        cache = OutputCached(denoiser, OutputCache(threshold, rule), full.nfe, terms)
        full(cache, x, cond=cond)
        return cache.computed

    for count in counts:
        for _ in range(TRIALS):
            if any(len(found) == count for found in trials.values()):
                break
            low = max((t for t, found in trials.items() if len(found) > count), default=1e-3)
            high = min((t for t, found in trials.items() if len(found) < count), default=10.0)
            middle = math.sqrt(low * high)
            trials[middle] = run(middle)
    return {len(found): found for found in trials.values() if len(found) in counts}


def nearest_plan(plans: dict[int, Plan], count: int) -> Plan | None:
    """The plan of this many evaluations, or of the most below; None where all have more."""
    return max(((nfe, found) for nfe, found in plans.items() if nfe <= count), default=(0, None))[1]


def mixture(title: str, counts: tuple[int, ...], iterations: int, plans: dict[int, Plan]) -> Iterator[dict[str, Any]]:
    """Rows of one mixture; `plans`, by their evaluations, in place of fits."""
    problem = Problem(title)
    for (sampler, grid), rule, terms in itertools.product(LONG, RULES, ("eps", "v")):
        times = grid(problem.schedule, STEPS)
        task = Calibration(problem.model, sampler, times, problem.shape, seed=1000)
        full, prediction = plan(sampler, problem.schedule, times), prediction_from(terms)
        x = task.noise(0, 32).initial()
        for count, computed in sorted(decided(problem.model, full, x, rule, prediction, counts).items()):
            made = cached_plan(full, computed, prediction, RULES[rule])
            cell = problem.run("caches", f"{full.sampler} {grid.name} {rule} {terms}", "", count, made)
            yield {"problem": title, "method": cell.method, "nfe": cell.nfe, "rms": cell.rms, "median": cell.median}
    for count in counts:
        fitted = nearest_plan(plans, count)
        if fitted is None:
            times = UniformLambda()(problem.schedule, count)
            task = Calibration(problem.model, UniPC(3), times, problem.shape, seed=1000, n=64)
            fitted = FittedPlan(iterations=iterations, warm=2, batch=128).tune(task).plan
            assert fitted is not None
        cell = problem.run("fitted", "fitted plan", "", count, fitted)
        row = {"problem": title, "method": cell.method, "nfe": count, "rms": cell.rms, "median": cell.median}
        yield {**row, "plan": fitted.nfe}


@torch.no_grad()
def teacher(counts: tuple[int, ...], n: int, fits: bool) -> Iterator[dict[str, Any]]:
    """Rows of the bundled model, guidance 1; without `fits` its bundled plans alone."""
    model: Any = hasten.load("fashion")
    denoiser, schedule = model.denoiser, model.denoiser.schedule
    noise, label = Noise(range(n), model.shape).initial(), model.labels(n)
    solver: Any = UniPC(3)
    fine = plan(solver, schedule, UniformLambda(low=LOW)(schedule, 24))(denoiser, noise, cond={"label": label})

    def row(method: str, made: Plan, count: int) -> dict[str, Any]:
        end = made(denoiser, noise, cond={"label": label})
        each = (end - fine).flatten(1).square().mean(1)
        rms, median = float(each.mean().sqrt()), float(each.sqrt().median())
        named = {"problem": "fashion", "method": method, "nfe": count, "rms": rms, "median": median}
        return {**named, "plan": made.nfe}

    for sampler, grid in LONG[:1]:
        full = plan(sampler, schedule, grid(schedule, STEPS))
        x = Noise(range(1_000_000, 1_000_004), model.shape).initial()
        for rule in RULES:
            found = decided(denoiser, full, x, rule, denoiser.prediction, counts, label=model.labels(4))
            for count, computed in sorted(found.items()):
                made = cached_plan(full, computed, denoiser.prediction, RULES[rule])
                yield row(f"{full.sampler} {rule}", made, count)
    bundled = {made.nfe: made for name, made in model.plans.items() if name.startswith("fitted_plan-")}
    for count in counts:
        made = bundled.get(count) if fits else nearest_plan(bundled, count)
        if made is None:
            times = UniformLambda(low=0.03)(schedule, count)
            task = TuningTask(denoiser, UniPC(3), times, model.shape, labels=model.labels, seed=1_000_000, n=6)
            options = FittedPlan(gradient="frozen", held_out=2, fine=24, low=LOW, iterations=1, batch=8)
            made = options.tune(task).plan
            assert made is not None
        yield row("fitted plan", made, count)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a problem per block, a method per line, `RMS (median)` by count."""
    counts = sorted({row["nfe"] for row in rows})
    lines = ["| problem | method | " + " | ".join(map(str, counts)) + " |", "|---" * (2 + len(counts)) + "|"]
    for problem, method in dict.fromkeys((row["problem"], row["method"]) for row in rows):
        cells = {row["nfe"]: row for row in rows if (row["problem"], row["method"]) == (problem, method)}
        texts = [f"{cells[k]['rms']:.4f} ({cells[k]['median']:.4f})" if k in cells else "-" for k in counts]
        lines.append(f"| {problem} | {method} | " + " | ".join(texts) + " |")
    for problem in dict.fromkeys(row["problem"] for row in rows):
        texts = []
        for k in counts:
            fitted = [r["rms"] for r in rows if (r["problem"], r["nfe"], r["method"]) == (problem, k, "fitted plan")]
            caches = [
                r["rms"] for r in rows if (r["problem"], r["nfe"]) == (problem, k) and r["method"] != "fitted plan"
            ]
            texts.append(f"{min(caches) / min(fitted):.2f}" if fitted and caches else "-")
        lines.append(f"| {problem} | best cache / fitted plan | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main(
    *,
    problems: Annotated[list[str], cyclopts.Parameter(negative=(), consume_multiple=True)] = [*PROBLEMS],  # noqa: B006
    nfe: Annotated[list[int], cyclopts.Parameter(negative=(), consume_multiple=True)] = [*COUNTS],  # noqa: B006
    teacher_: Annotated[bool, cyclopts.Parameter(name="--teacher")] = False,
    n: int = 8,
    iterations: int = 12,
    plans: Path | None = None,
    fits: bool = True,
    out: Path | None = None,
) -> None:
    """Measure the mixtures, or with --teacher the bundled model; `iterations` of the fits on mixtures."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for title in ["fashion"] if teacher_ else problems:
        files = [] if plans is None else plans.glob(f"{title.split()[0]}-*.json")
        saved = {found.nfe: found for found in (Plan.from_json(file.read_text()) for file in files)}
        for row in teacher(tuple(nfe), n, fits) if teacher_ else mixture(title, tuple(nfe), iterations, saved):
            rows.append(row)
            print(json.dumps(row), f"{time.process_time():.0f} s", flush=True)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    cyclopts.run(main)
