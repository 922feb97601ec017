"""Errors on four closed-form mixtures: deterministic samplers, diffusers' best, optimised steps and fitted plans.

    python -m benchmarks.mixtures                          all, about twenty minutes on one idle core
    python -m benchmarks.mixtures --only fixed diffusers   the parts that are named
    python -m benchmarks.mixtures --out mixtures.jsonl     one JSON line per cell; existing cells are not repeated

Mixtures, on DDPM's linear table and the cosine one (1000 entries):

- M2, M64: `hasten.exact`.
- R6, R24: `random_mixture(seed, d, K, b, a)` with (22, 6, 25, .15, .3) and (21, 24, 12, .2, .7): g = default_rng(seed);
  s_j = (j + 1)^-a; w = .5 + g.random(K), normalised; mu = g.standard_normal((K, d)) s;
  V = b^2 s^2 (.5 + g.random((K, d))), drawn in this order.

256 samples: n = default_rng(0).standard_normal((256, d)), start y = n sqrt(1 + q_0^2), y = z/alpha, q = sigma/alpha,
q_0 that of the table's last entry. The exact denoiser is evaluated at the level of each sampler. Reference: DOP853,
relative tolerance 1e-10, at q = 0. A cell is the RMS over all entries and the median over samples of a sample's RMS.

Fixed: each sampler with the best of eight grids *for these noises*, likewise each of diffusers' schedulers with the
best of its spacings: selected in favour of both. Optimised steps and fitted plans use other noises, default_rng(1000),
default_rng(1001), ..., one per sample; "local" uses the deviation of 1,000 samples of the data, the preconditioned
sampler their mean and covariance, and "bound" nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import TABLES, theirs
from hasten.exact import GaussianMixture, _masked, m2, m64
from hasten.files import append_json_line, read_json_lines
from hasten.pick import format_spec
from hasten.plan import Plan, plan
from hasten.samplers import DDIM, DEIS, PLMS, DPMSolver, Heun, UniPC
from hasten.samplers.sa import SASolver
from hasten.sampling import Noise
from hasten.schedules import Discrete, Schedule
from hasten.times import CosineAngle, Karras, Quadratic, TimeGrid, Trailing, UniformLambda, UniformTime
from hasten.tuning import TuningTask
from hasten.tuning.optimized_steps import OptimizedSteps

COUNTS = (5, 6, 8, 10, 15, 20)
SAMPLES = 256
CALIBRATION = {"M2": 512, "M64": 512, "R6": 2048, "R24": 2048}  # the random ones have more modes to end in
RANDOM = {"R6": (22, 6, 25, 0.15, 0.3), "R24": (21, 24, 12, 0.2, 0.7)}
PROBLEMS = tuple(f"{name} {table}" for name in ("M2", "M64", *RANDOM) for table in TABLES)
PARTS = ("diffusers", "fixed", "preconditioned", "bound", "local", "trajectory", "fitted")

SPACINGS: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "beta": {"timestep_spacing": "linspace", "use_beta_sigmas": True},
    "lu": {"timestep_spacing": "linspace", "use_lu_lambdas": True},
}
NO_LU = ("linspace", "trailing", "karras", "exponential", "beta")
SCHEDULERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "UniPC-2": ("UniPCMultistepScheduler", {"solver_order": 2}, NO_LU),
    "UniPC-3": ("UniPCMultistepScheduler", {"solver_order": 3}, NO_LU),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}, tuple(SPACINGS)),
    "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}, tuple(SPACINGS)),
    "DEIS-2": ("DEISMultistepScheduler", {"solver_order": 2}, NO_LU),
    "DEIS-3": ("DEISMultistepScheduler", {"solver_order": 3}, NO_LU),
    "Heun": ("HeunDiscreteScheduler", {}, NO_LU),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, ("linspace", "trailing")),
}

SAMPLERS: tuple[Any, ...] = (
    UniPC(2),
    UniPC(3),
    UniPC(4),
    UniPC(2, "bh1"),
    DPMSolver(2),
    DPMSolver(3),
    DPMSolver(3, third="compat"),
    DPMSolver(2, multistep=False),
    DPMSolver(3, multistep=False),
    DPMSolver(3, predict="eps"),
    DEIS(2),
    DEIS(3),
    DEIS(3, "rho"),
    DEIS(3, "log_rho"),
    PLMS(4, "ramp"),
    SASolver(3, 4, tau=0.0),
    Heun(),
    DDIM(),
)
FAMILY = (UniPC(2), UniPC(3))


def fixed_grids(schedule: Schedule) -> dict[str, TimeGrid]:
    """The fixed grids: all of hasten's, that in lambda also with a larger last level, q = .03."""
    low = float(schedule.time(-math.log(0.03)))
    return {
        "lambda": UniformLambda(),
        "lambda to q .03": UniformLambda(low=low),
        "uniform": UniformTime(),
        "quadratic": Quadratic(),
        "karras": Karras(),
        "trailing": Trailing(),
        "angle": CosineAngle(),
        "angle .5": CosineAngle(scale=0.5),
    }


@dataclass(frozen=True)
class Cell:
    """One measured number: part, problem, method (and which grid, spacing or order), NFE allowed and used."""

    part: str
    problem: str
    method: str
    detail: str
    budget: int
    nfe: int
    rms: float
    median: float


def random_mixture(seed: int, d: int, K: int, b: float, a: float, schedule: Schedule) -> GaussianMixture:
    """The recipe above."""
    g = np.random.default_rng(seed)
    s = (np.arange(d) + 1.0) ** -a
    w = 0.5 + g.random(K)
    mu = g.standard_normal((K, d)) * s
    V = b**2 * s**2 * (0.5 + g.random((K, d)))
    return GaussianMixture(*map(torch.from_numpy, (w / w.sum(), mu, V)), schedule)


class FastMixture(GaussianMixture):
    """The same denoiser by products of matrices, several times faster; rounding errors of 1e-12 instead of 1e-15."""

    def _x0(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
        if alpha.numel() > 1:
            return super()._x0(x, alpha, sigma, label)
        precision = 1 / (alpha**2 * self.variances + sigma**2)
        scaled = alpha * self.means * precision
        constant = torch.log(self.weights) - 0.5 * (alpha * self.means * scaled - torch.log(precision)).sum(-1)
        log_p = torch.addmm(constant, x * x, precision.T, alpha=-0.5) + x @ scaled.T
        p = torch.softmax(log_p + _masked(self.labels, label, self.null_label), 1)
        return p @ (self.means - alpha * self.variances * scaled) + x * (p @ (alpha * self.variances * precision))


def fast_mixture(name: str, schedule: Schedule, labels: list[int] | None = None) -> FastMixture:
    """A mixture by its name, with classes of its components."""
    named = {"M2": m2, "M64": m64}
    model = named[name](schedule) if name in named else random_mixture(*RANDOM[name], schedule)
    shape = (-1, *model.shape)
    return FastMixture(model.weights, model.means.reshape(shape), model.variances.reshape(shape), schedule, labels)


class Problem:
    """A mixture on a table, its start and its exact result."""

    def __init__(self, title: str) -> None:
        self.title = title
        name, self.table = title.split()
        self.schedule = _table(self.table)
        named = {"M2": m2, "M64": m64}
        self.model = named[name](self.schedule) if name in named else random_mixture(*RANDOM[name], self.schedule)
        self.shape = self.model.shape
        self.noise = torch.from_numpy(np.random.default_rng(0).standard_normal((SAMPLES, *self.shape)))
        self.exact = self.model.ode(self.noise, 1.0)  # variance-preserving tables: z = noise at t = 1

    def errors(self, end: Tensor) -> tuple[float, float]:
        """RMS, and the median over samples."""
        each = (end - self.exact).square().mean(1).sqrt()
        return each.square().mean().sqrt().item(), each.median().item()

    def run(self, part: str, method: str, detail: str, budget: int, table: Plan) -> Cell:
        end = table(self.model, self.noise)
        return Cell(part, self.title, method, detail, budget, table.nfe, *self.errors(end))

    def images(self, n: int) -> tuple[Tensor, None]:
        return self.model.sample(n, torch.Generator().manual_seed(1)), None


@cache
def _table(name: str) -> Discrete:
    import diffusers

    base = diffusers.UniPCMultistepScheduler(**TABLES[name])
    return Discrete(tuple(base.alphas_cumprod.double().tolist()), "log_q")


class Given(Noise):
    """Calibration noise of the protocol, in place of the library's: default_rng(seed), one per sample."""

    def initial(self) -> Tensor:
        drawn = [np.random.default_rng(seed).standard_normal(self.shape) for seed in self.seeds]
        return torch.stack([torch.from_numpy(one) for one in drawn])


class Calibration(TuningTask):
    """A task whose noises are `Given`, float64."""

    def noise(self, first: int, count: int, dtype: torch.dtype = torch.float64) -> Noise:
        return Given(range(self.seed + first, self.seed + first + count), self.shape, torch.float64)


def task(problem: Problem, sampler: Any, count: int, n: int | None) -> TuningTask:
    times = UniformLambda()(problem.schedule, count)
    return Calibration(problem.model, sampler, times, problem.shape, images=problem.images, seed=1000, n=n)


# ---- the parts ------------------------------------------------------------------------------------------------------


def peers(problem: Problem, count: int) -> Iterator[Cell]:
    """diffusers, every scheduler at each spacing it has."""
    import diffusers

    for method, (name, options, spacings) in SCHEDULERS.items():
        steps = (count + 1) // 2 if method == "Heun" else count
        for spacing in spacings:
            scheduler = getattr(diffusers, name)(**TABLES[problem.table], **SPACINGS[spacing], **options)
            try:
                scheduler.set_timesteps(steps)
                y = problem.noise
                if method == "Heun":
                    y = y * math.sqrt(1 + float(scheduler.sigmas[0]) ** 2)
                end = theirs(scheduler, problem.model, y)
            except (IndexError, ValueError, RuntimeError) as error:
                print(f"diffusers {method} {spacing} {count}: {type(error).__name__}: {error}")
                continue
            rms, median = problem.errors(end)
            if math.isfinite(rms):
                yield Cell("diffusers", problem.title, method, spacing, count, len(scheduler.timesteps), rms, median)


def fixed(problem: Problem, count: int) -> Iterator[Cell]:
    """Our samplers on each of the grids."""
    for sampler in SAMPLERS:
        steps = (count + 1) // 2 if isinstance(sampler, Heun) else count
        for name, grid in fixed_grids(problem.schedule).items():
            table = plan(sampler, problem.schedule, grid(problem.schedule, steps))
            if table.nfe <= count:
                yield problem.run("fixed", format_spec(sampler), name, count, table)


def preconditioned(problem: Problem, count: int) -> Iterator[Cell]:
    """The preconditioned sampler with the moments of 1,000 samples, with its other defaults."""
    from hasten.samplers.preconditioned import Preconditioned

    data = problem.images(1000)[0]
    sampler = Preconditioned(moments="full").bind({"mean": data.mean(0), "covariance": torch.cov(data.T)}, {})
    table = plan(sampler, problem.schedule, UniformLambda()(problem.schedule, count))
    yield problem.run("preconditioned", "preconditioned", "", count, table)


def optimised(objective: Any) -> Callable[[Problem, int], Iterator[Cell]]:
    """UniPC on optimised steps. The paper's are for order 3; ours select between 2 and 3 by their own figure."""

    def part(problem: Problem, count: int) -> Iterator[Cell]:
        noises = CALIBRATION[problem.title.split()[0]]
        tuner = OptimizedSteps(objective, chunk=noises, searches=2)
        figure = "J" if objective == "bound" else "error"
        candidates = []
        for sampler in FAMILY[1:] if objective == "bound" else FAMILY:
            tuned = tuner.tune(task(problem, sampler, count, noises))
            assert tuned.plan is not None
            candidates.append((tuned.figures[figure], format_spec(sampler), tuned.plan))
        _, name, table = min(candidates, key=lambda entry: entry[0])
        yield problem.run(objective, f"steps: {objective}", name, count, table)

    return part


def fitted(problem: Problem, count: int) -> Iterator[Cell]:
    """The fitted plan, from UniPC-3, with its own defaults."""
    if importlib.util.find_spec("hasten.tuning.fitted_plan") is None:
        return
    from hasten.tuning.fitted_plan import FittedPlan

    tuned = FittedPlan().tune(task(problem, UniPC(3), count, None))
    assert tuned.plan is not None
    yield problem.run("fitted", "fitted plan", "", count, tuned.plan)


WORK: dict[str, Callable[[Problem, int], Iterator[Cell]]] = {
    "diffusers": peers,
    "fixed": fixed,
    "preconditioned": preconditioned,
    "bound": optimised("bound"),
    "local": optimised("local"),
    "trajectory": optimised("trajectory"),
    "fitted": fitted,
}


# ---- what is said ---------------------------------------------------------------------------------------------------


def best(cells: list[Cell]) -> Cell | None:
    return min(cells, key=lambda cell: cell.rms, default=None)


def table(cells: list[Cell]) -> str:
    """Markdown: a row per method, `RMS (median) which`, with the best grid or spacing of each cell."""
    counts = sorted({cell.budget for cell in cells})
    lines = ["| problem | method | " + " | ".join(f"NFE {n}" for n in counts) + " |", "|---" * (2 + len(counts)) + "|"]
    for problem, part, method in dict.fromkeys((c.problem, c.part, c.method) for c in cells):
        row = []
        for n in counts:
            candidates = best(
                [c for c in cells if (c.problem, c.part, c.method, c.budget) == (problem, part, method, n)]
            )
            row.append(
                "-"
                if candidates is None
                else f"{candidates.rms:.4f} ({candidates.median:.4f}) {candidates.detail}".rstrip()
            )
        lines.append(f"| {problem} | {'diffusers ' if part == 'diffusers' else ''}{method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def summary(cells: list[Cell]) -> str:
    """Markdown: diffusers' best and UniPC's best fixed grid, and how many times smaller our errors are."""
    counts = sorted({cell.budget for cell in cells})
    lines = ["| problem | | " + " | ".join(f"NFE {n}" for n in counts) + " |", "|---" * (2 + len(counts)) + "|"]
    family = {format_spec(sampler) for sampler in FAMILY}
    # of the fixed grids, those of the family that is optimised
    mine = [cell for cell in cells if cell.part != "fixed" or cell.method in family]
    for problem in dict.fromkeys(cell.problem for cell in cells):
        at = {
            (part, n): best([c for c in mine if (c.problem, c.part, c.budget) == (problem, part, n)])
            for part in PARTS
            for n in counts
        }
        rows = {"diffusers' best": [_shown(at["diffusers", n]) for n in counts]}
        rows["UniPC, best fixed grid"] = [_shown(at["fixed", n]) for n in counts]
        for bar, parts in (("fixed", PARTS[3:6]), ("diffusers", PARTS[2:])):
            for part in parts:
                name = f"{'UniPC, best fixed grid' if bar == 'fixed' else bar} / {part}"
                rows[name] = [_ratio(at[part, n], at[bar, n]) for n in counts]
        lines += [
            f"| {problem} | {name} | " + " | ".join(row) + " |" for name, row in rows.items() if set(row) != {"-"}
        ]
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    return "-" if cell is None else f"{cell.rms:.4f} ({cell.median:.4f}) {cell.method} {cell.detail}"


def _ratio(ours: Cell | None, bar: Cell | None) -> str:
    return "-" if ours is None or bar is None else f"{bar.rms / ours.rms:.2f} ({bar.median / ours.median:.2f})"


def main() -> None:
    import diffusers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="'MIXTURE TABLE'")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--nfe", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--out", type=Path, help="JSON lines, a line per cell; existing cells are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    cells: list[Cell] = []
    if args.out is not None and args.out.exists():
        cells = [Cell(**line) for line in read_json_lines(args.out)]
    problems = cache(Problem)
    for title in args.problems:
        for part in args.only:
            for count in args.nfe:
                if any((c.part, c.problem, c.budget) == (part, title, count) for c in cells):
                    continue
                new = list(WORK[part](problems(title), count))
                cells += new
                if args.out is not None:
                    for c in new:
                        append_json_line(args.out, asdict(c))
    wanted = [c for c in cells if c.problem in args.problems and c.part in args.only and c.budget in args.nfe]
    order = {key: k for k, key in enumerate((p, part) for p in args.problems for part in PARTS)}
    wanted.sort(key=lambda c: order[c.problem, c.part])
    print(table(wanted) + "\n\n" + summary(wanted))


if __name__ == "__main__":
    main()
