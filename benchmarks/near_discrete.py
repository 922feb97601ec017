"""Fitted plans against fixed grids on mixtures of separate modes, where starts at the border of two rule the mean.

    python -m benchmarks.near_discrete                     four mixtures, 5, 6, 8 and 10 evaluations
    python -m benchmarks.near_discrete --problems R24 --nfe 8 --directions 6 --save runs/plans
    python -m benchmarks.near_discrete --check runs/plans  the plans saved there on 8,192 further starts

Mixtures (`benchmarks.mixtures.random_mixture`), on DDPM's linear table: R6 and R24 as there, R12 and R48 with
(31, 12, 16, .15, .5) and (32, 48, 20, .2, .6).

256 test starts, default_rng(0), and their exact ends (DOP853). UniPC: the best of orders 2 and 3 on eight grids, and
diffusers: the best of eight schedulers on all their spacings, both chosen *on the test starts*. Kept plan:
`fitted_plan:figure=mean` with 8,192 calibration starts out of a pool of 65,536 and 8,192 held-out ones, none of them a
test start; what it keeps is decided by the held-out ones. A cell is the RMS, the median over starts, and the share of
starts whose nearest component mean is another one than that of their exact end.

With `--check` the starts are 8,192 from default_rng(5), against which nothing was fitted, and their ends those of UniPC
of order 3 with 96 steps uniform in lambda; the fixed grids are chosen on these starts again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.mixtures import FAMILY, RANDOM, Problem, fast_mixture, fixed_grids, peers
from hasten.plan import Plan, plan
from hasten.samplers import UniPC
from hasten.times import UniformLambda
from hasten.tuning import TuningTask
from hasten.tuning.fitted_plan import FittedPlan

COUNTS = (5, 6, 8, 10)
PROBLEMS = ("R6", "R24", "R12", "R48")
RANDOM |= {"R12": (31, 12, 16, 0.15, 0.5), "R48": (32, 48, 20, 0.2, 0.6)}
OPTIONS: dict[str, Any] = {
    "held_out": 8192, "iterations": 160, "warm": 2, "patience": 8, "batch": 8192, "pool": 65536, "fine": 64
}  # fmt: skip


class NearDiscrete(Problem):
    """One of the mixtures, with the denoiser that is faster."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} linear")
        self.fast = self.model = fast_mixture(name, self.schedule)
        self.shares: dict[tuple[float, float], float] = {}

    def errors(self, end: Tensor) -> tuple[float, float]:
        """RMS and median; the share in another mode is remembered for them."""
        found = super().errors(end)
        self.shares[found] = self.other(end)
        return found

    def other(self, end: Tensor) -> float:
        """The share of ends that belong to another component than the exact ones."""
        mine, exact = (torch.cdist(each, self.model.means).argmin(1) for each in (end, self.exact))
        return float((mine != exact).double().mean())

    def row(self, table: Plan) -> dict[str, float]:
        return self.cell(self.errors(table(self.fast, self.noise)))

    def cell(self, errors: tuple[float, float]) -> dict[str, float]:
        """RMS, median and share of a method that has been run."""
        return {"rms": errors[0], "median": errors[1], "other mode": self.shares[errors]}

    def task(self, count: int, n: int) -> TuningTask:
        """Calibration starts from one stream, default_rng(1000)."""
        shape = self.shape

        class Stream(TuningTask):
            def noise(self, first: int, count: int, dtype: torch.dtype = torch.float64) -> Any:
                drawn = np.random.default_rng(1000).standard_normal((first + count, *shape))[first:]
                return type("Drawn", (), {"initial": lambda self: torch.from_numpy(drawn)})()

        return Stream(self.fast, UniPC(3), UniformLambda()(self.schedule, count), shape, n=n)


class Fresh(NearDiscrete):
    """The mixture with many further starts, whose ends are those of a fine path."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.noise = torch.from_numpy(np.random.default_rng(5).standard_normal((8192, *self.shape)))
        low = float(self.schedule.time(-math.log(0.03)))
        self.exact = plan(UniPC(3), self.schedule, UniformLambda(low=low)(self.schedule, 96))(self.fast, self.noise)
        self.model = self.fast


def unipc(problem: NearDiscrete, count: int) -> tuple[str, dict[str, float]]:
    """UniPC on its best fixed grid."""
    rows = {}
    for sampler in FAMILY:
        for name, grid in fixed_grids(problem.schedule).items():
            table = plan(sampler, problem.schedule, grid(problem.schedule, count))
            rows[f"{table.sampler} {name}"] = problem.row(table)
    return min(rows.items(), key=lambda item: item[1]["rms"])


def kept(problem: NearDiscrete, count: int, **options: Any) -> tuple[str, dict[str, float], Plan]:
    """The plan that the fit keeps."""
    tuned = FittedPlan(**{**OPTIONS, **options}).tune(problem.task(count, 8192))
    assert tuned.plan is not None
    held = f"held-out RMS {tuned.figures['held_out_rms']:.4f}"
    return f"{tuned.figures['kept']}, {held}", problem.row(tuned.plan), tuned.plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--nfe", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--directions", type=int, default=0, help="groups of directions of the fitted plan")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the kept plans there")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="measure the plans of an earlier --save")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.problems:
        problem = NearDiscrete(name) if args.check is None else Fresh(name)
        for count in args.nfe:
            file = None if args.check is None else args.check / f"{name}-{count}.json"
            if file is not None and not file.is_file():
                continue
            began = time.process_time()
            theirs = min(peers(problem, count), key=lambda cell: cell.rms)
            row: dict[str, Any] = {"problem": name, "nfe": count, "UniPC": unipc(problem, count)}
            row["diffusers"] = [f"{theirs.method} {theirs.detail}", problem.cell((theirs.rms, theirs.median))]
            if file is None:
                row["how"], row["kept"], table = kept(problem, count, directions=args.directions)
            else:
                table = Plan.from_json(file.read_text())
                row["kept"] = problem.row(table)
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                (args.save / f"{name}-{count}.json").write_text(table.to_json())
            bar = min(row["UniPC"][1]["rms"], theirs.rms)
            row["times"] = bar / row["kept"]["rms"]
            row["CPU seconds"] = time.process_time() - began
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
