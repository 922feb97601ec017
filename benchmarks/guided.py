"""Guidance within a budget of evaluations: fitted plans over both branches, guidance, intervals and reused differences.

    python -m benchmarks.guided                       three conditional mixtures, about ten minutes on one idle core
    python -m benchmarks.guided --fashion --nfe 8     the bundled model, ten minutes a count on one idle core
    python -m benchmarks.guided --problems M2 --nfe 8

An evaluation is one of a single branch: guidance with N / 2 steps has N. Root mean squared distance to the fine guided
path (UniPC-3, 256 steps; `fashion` 40) over starts that no fit has seen (mixtures 256, default_rng(0); `fashion` 64,
seeds from 0), guidance scale 2.

- CFG: UniPC-2 or -3 with N / 2 steps, the best of four grids *on these starts*.
- interval: the same samplers and grids, both branches in some consecutive steps, the conditional one in the others; the
  best of all places *on these starts*.
- reuse: both branches in some steps, the last difference in the others; the best of all places considered by
  `guided_plan` *on these starts*.
- fitted: `hasten.tuning.guided_plan`, fitted on other starts (M2, M64: 512 and 256 held out; R24: 8,192 of a pool of
  32,768, and 4,096, six groups of directions; `fashion`: 64 and 64, from the sampler on the model's grid, 40
  iterations of the mean square).

On `fashion` UniPC-2 on the model's own grid stands for the other methods; for CFG also UniPC-3 and two more grids.

Mixtures with exact branches: M2 and M64 of `hasten.exact`, R24 of `benchmarks.mixtures`, component k in class k mod 3
(M2: k // 2), on DDPM's linear table.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.mixtures import FAMILY, Given, fast_mixture, fixed_grids
from hasten.guides import CFG
from hasten.plan import Plan, guided_plan, plan
from hasten.samplers import UniPC
from hasten.schedules import Discrete
from hasten.times import UniformLambda
from hasten.tuning import TuningTask, _fit
from hasten.tuning.guided_plan import GuidedPlan, uncond_placements

SCALE = 2.0
COUNTS = (8, 10, 12)
KINDS = ("CFG", "interval", "reuse")
PROBLEMS = ("M2", "M64", "R24")
STARTS = 256
GRIDS = ("lambda to q .03", "quadratic", "angle", "angle .5")


class Mixture:
    """A conditional mixture under guidance, its test starts and their fine guided ends."""

    def __init__(self, name: str) -> None:
        schedule = Discrete.linear()
        count = {"M2": 6, "M64": 10, "R24": 12}[name]
        labels = [k // 2 if name == "M2" else k % 3 for k in range(count)]
        self.title = name
        self.guided = CFG(SCALE).wrap(fast_mixture(name, schedule, labels))
        self.shape = self.guided.shape
        self.x = torch.from_numpy(np.random.default_rng(0).standard_normal((STARTS, *self.shape)))
        self.label = torch.arange(STARTS) % 3
        self.end = self.run(plan(UniPC(3), schedule, UniformLambda(low=0.002)(schedule, 256)))
        self.options = GuidedPlan(held_out=256, iterations=60, warm=2, batch=1024)
        self.n = 512
        if name == "R24":  # has separate modes
            self.options = GuidedPlan(
                held_out=4096, iterations=160, warm=2, patience=8, batch=8192, pool=32768, directions=6
            )
            self.n = 8192

    def run(self, table: Plan) -> Tensor:
        """The results of a plan from the test starts."""
        return table(self.guided, self.x, label=self.label)

    def settings(self, kind: str) -> list[tuple[Any, str]]:
        """The samplers and grids that are compared."""
        return [(sampler, name) for name in GRIDS for sampler in FAMILY]

    def task(self, count: int) -> TuningTask:
        """The fit's own starts, default_rng(1000), ..., float64."""

        class Calibration(TuningTask):
            def noise(self, first: int, count: int, dtype: torch.dtype = torch.float64) -> Given:
                return Given(range(self.seed + first, self.seed + first + count), self.shape, torch.float64)

        times = UniformLambda()(self.guided.schedule, count)
        about = (self.guided, UniPC(3), times, self.shape, lambda n: torch.arange(n) % 3)
        return Calibration(*about, seed=1000, n=self.n)


class Fashion(Mixture):
    """The bundled model under guidance."""

    def __init__(self) -> None:
        import hasten

        self.title, self.model = "fashion", hasten.load("fashion")
        self.guided = CFG(SCALE).wrap(self.model.denoiser)
        self.shape = self.model.shape
        noise = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(FASHION[0])]
        self.x, self.label = torch.stack(noise), self.model.labels(FASHION[0])
        self.end = self.run(plan(UniPC(3), self.model.denoiser.schedule, self.grid(FASHION[3])))
        solve, solved = _fit.fine_trajectories, list[Any]()

        def once(*args: Any, **options: Any) -> Any:  # the same for every count; states are kept to compare starts
            solved.append(solved[0] if solved else solve(*args, **{**options, "keep": True}))
            return solved[0]

        _fit.fine_trajectories = once
        self.options = GuidedPlan(
            held_out=FASHION[2], iterations=FASHION[4], fine=FASHION[3], warm=0, robust=0, teleport=False,
            search="sampler",
        )  # fmt: skip
        self.n = FASHION[1]

    def settings(self, kind: str) -> list[tuple[Any, str]]:
        """The samplers and grids that are compared."""
        own = [(UniPC(2), "own")]
        more = [(UniPC(3), "own"), (UniPC(2), "angle .5"), (UniPC(2), "quadratic")]
        return own + (more if kind == "CFG" else [])

    def grid(self, count: int) -> Tensor:
        return UniformLambda(low=0.03)(self.guided.schedule, count)

    def task(self, count: int) -> TuningTask:
        return TuningTask(
            self.guided, UniPC(2), self.grid(count), self.shape, self.model.labels, seed=1_000_000, n=self.n
        )


FASHION = (64, 64, 64, 40, 40)  # test starts, calibration, held out, fine steps, iterations


def tables(problem: Mixture, kind: str, count: int) -> Iterator[tuple[str, Plan]]:
    """Every plan of one kind with `count` evaluations of single branches."""
    schedule = problem.guided.schedule
    grids = {**fixed_grids(schedule), "own": UniformLambda(low=0.03)}
    for evaluated in range(1, count // 2 + 1):
        steps = count - evaluated
        if kind == "CFG" and steps != evaluated:
            continue
        places = uncond_placements(steps, evaluated)
        if kind == "interval":
            places = [tuple(range(k, k + evaluated)) for k in range(steps - evaluated + 1)]
        for sampler, name in problem.settings(kind):
            table = plan(sampler, schedule, grids[name](schedule, steps))
            for at in places if steps != evaluated else [tuple(range(steps))]:
                where = "" if kind == "CFG" else f" at {at}"
                yield f"{table.sampler} {name}{where}", guided_plan(table, SCALE, at, reuse=kind != "interval")


def distance(problem: Mixture, table: Plan) -> float:
    return float((problem.run(table) - problem.end).double().square().mean().sqrt())


def best(problem: Mixture, kind: str, count: int) -> tuple[float, str]:
    return min((distance(problem, table), name) for name, table in tables(problem, kind, count))


def cell(problem: Mixture, count: int, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """All methods with `count` evaluations."""
    row: dict[str, Any] = {"problem": problem.title, "nfe": count}
    for kind in kinds:
        row[kind], row[f"{kind} how"] = best(problem, kind, count)
    began = time.process_time()
    tuned = replace(problem.options, evaluations=count).tune(problem.task(count))
    assert tuned.plan is not None and tuned.plan.branches is not None
    row["fitted"] = distance(problem, tuned.plan)
    row["fitted how"] = f"{''.join(b[0] for b in tuned.plan.branches)}, {tuned.figures['kept']}"
    row["CPU seconds"], row["plan"] = time.process_time() - began, tuned.plan
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--fashion", action="store_true", help="the bundled model instead")
    parser.add_argument("--nfe", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--fit-only", action="store_true", help="not the other methods")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the fitted plans there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| problem | evaluations | UniPC + CFG | interval | reuse | fitted | CFG / fitted |\n" + "|---" * 7 + "|")
    for problem in [Fashion()] if args.fashion else map(Mixture, args.problems):
        for count in args.nfe:
            row = cell(problem, count, () if args.fit_only else KINDS)
            row = dict.fromkeys(KINDS, math.nan) | {f"{kind} how": "not run" for kind in KINDS} | row
            print(
                f"| {row['problem']} | {count} | {row['CFG']:.4f} | {row['interval']:.4f} | {row['reuse']:.4f} | "
                f"{row['fitted']:.4f} | {row['CFG'] / row['fitted']:.2f} |",
                flush=True,
            )
            how = "; ".join(f"{k}: {row[f'{k} how']}" for k in (*KINDS, "fitted"))
            print(f"    {how}; {row['CPU seconds']:.0f} CPU seconds", flush=True)
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                (args.save / f"{row['problem']}-{count}.json").write_text(row["plan"].to_json())


if __name__ == "__main__":
    main()
