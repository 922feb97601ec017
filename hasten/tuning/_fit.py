"""One fit of a plan: starts, distances to the fine solution, the search with and without the network's gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..plan.table import Plan
from ..utils.devices import as_float64, float64_device
from ._basis import data_basis
from ._finish import fit_last_row
from ._reference import FineTrajectories, fine_trajectories
from ._rows import PlanCoefficients, PlanParametrization, coordinate, difference_grams, run_plan
from ._sweep import fit_rows, pattern_search
from ._task import Tuned, TuningTask

__all__ = ["PlanFit", "figure_of"]

FINISH = 500  # noises, and ten times as many real images, to fit the last row
START_SAMPLES = 32  # to compare starts
COMPARED = 6  # starts that are compared again after a least squares fit of their rows, and unfitted at the end
FITTED = ("times", "start", "a", "B")


def figure_of(name: str) -> float | None:
    """The quantile of a figure: .5 for "median", .9 for "q90"; None for "mean" and for anything else."""
    if name == "median":
        return 0.5
    digits = name.removeprefix("q")
    return float(f"0.{digits}") if name.startswith("q") and digits.isdigit() and int(digits) > 0 else None


class PlanFit:
    """One run; `calibration` and `held_out` are slices of the fine trajectories.

    Args:
        options: a `FittedPlan`.
        task: to fit for.
    """

    def __init__(self, options: Any, task: TuningTask) -> None:
        self.options, self.task, self.denoiser = options, task, task.denoiser
        self.quantile = figure_of(options.figure)
        n = task.n or 128
        self.calibration, self.held_out = slice(0, n), slice(n, n + options.held_out)
        self.top = float(task.times[0])
        dtype = next((p.dtype for p in task.denoiser.parameters()), torch.float64)
        self.keep = options.gradient == "frozen" or options.warm > 0
        self.weight = torch.ones(n, dtype=torch.float64)
        pool = max(options.pool, n)
        self.pool = pool if pool > n else 0
        count = pool + options.held_out
        self.x = task.noise(0, count, dtype).initial() * float(task.schedule.prior_std(self.top))
        self.cond = task.cond(count)
        self.fine = self.solve(torch.arange(count), self.keep and not self.pool)
        self.low = float(self.fine.times[-1])
        self.basis = data_basis(self.fine.end, options.directions) if options.directions else None
        self.tau = math.inf
        self.done = 0

    @torch.no_grad()
    def run(self, candidates: Iterable[tuple[str, Plan]], baseline: Plan) -> Tuned:
        """Fit from the best of the candidates; returns the best on the held-out samples of all that was seen.

        Args:
            candidates: plans to start from, by name, the sampler on its grid first.
            baseline: the plan of the sampler, for the figures.
        """
        candidates = list(candidates)
        if self.pool:
            self.draw_hard_starts(self.starts(candidates, slice(0, self.pool))[0][1])
        starts = self.starts(candidates, self.calibration)
        initial = starts[0][1].plan(starts[0][1].initial)
        best = [
            (self.figure(rows.plan(rows.initial)), name, rows.plan(rows.initial)) for name, rows in starts[:COMPARED]
        ]
        used = starts[0][1].free
        for name, rows in self.chosen(starts):
            best += [(value, f"fitted from {name}", fitted) for value, fitted in self.fit(rows)]
        value, kept, fitted = min(best, key=lambda entry: entry[0])
        fitted = detach_plan(fitted)
        if self.options.finish is not None:
            fitted = self.fit_last_row(fitted, used[-1, :-1], self.options.finish)
        figures = {
            "held_out_rms": self.distance(fitted, self.held_out),
            "held_out_rms_of_sampler": self.distance(baseline, self.held_out),
            "held_out_rms_of_start": self.distance(initial, self.held_out),
            "calibration_rms": self.distance(fitted, self.calibration),
            f"held_out_{self.options.figure}": value,
            "kept": kept,
            "calibrated_on": self.calibration.stop,
            "held_out": self.options.held_out,
            "iterations": self.done,
        }
        return Tuned(plan=fitted, figures=figures)

    def fit(self, rows: PlanParametrization) -> list[tuple[float, Plan]]:
        """Fit from one start; returns plans with their figures on the held-out samples."""
        options, self.done = self.options, 0
        numbers = rows.coefficients(rows.initial)
        if options.gradient == "frozen":
            found = [self.scan(rows, numbers, options.iterations)]
        else:
            if options.warm:
                numbers = self.scan(rows, numbers, options.warm)
            found = self.descend(rows, numbers)
        plans = [detach_plan(rows.compose(numbers)) for numbers in found]
        return [(self.figure(fitted), fitted) for fitted in plans]

    def fit_last_row(self, fitted: Plan, free: Tensor, weight: float) -> Plan:
        """The plan with its last row fitted to the statistics of real images, on further noises."""
        task, batch, first = self.task, self.options.batch, len(self.x)
        assert task.images is not None
        outputs = []
        for i in range(0, FINISH, batch):
            count = min(batch, FINISH - i)
            noise = task.noise(first + i, count, self.fine.start.dtype)
            x = noise.initial() * float(task.schedule.prior_std(self.top))
            outputs.append(torch.stack(run_plan(fitted, self.denoiser, x, **task.cond(count, first + i))[1]))
            task.tick("finish", i + count, FINISH, 0.0)
        B = fitted.B.clone()
        real = task.images(10 * FINISH)[0].to(task.device)
        with torch.autocast(task.device.type, enabled=False):  # contrasts need more precision than bf16
            B[-1] = fit_last_row(torch.cat(outputs, 1), B[-1], free, real, weight)
        return replace(fitted, B=B)

    # ---- starts ------------------------------------------------------------------------------------------------------

    def solve(self, index: Tensor, keep: bool) -> FineTrajectories:
        """The fine trajectories of these of all noises."""
        task, options, times = self.task, self.options, self.task.times
        return fine_trajectories(
            task.denoiser,
            self.x[index.to(self.x.device)],
            {key: value[index.to(value.device)] for key, value in self.cond.items()},
            start=self.top,
            low=min(float(times[-2]), 0.03) if options.low is None else options.low,
            end=float(times[-1]),
            steps=options.fine,
            batch=options.batch,
            keep=keep,
            tick=lambda done, total: task.tick("fine trajectories", done, total, 0.0),
        )

    def draw_hard_starts(self, rows: PlanParametrization) -> None:
        """Choose the calibration samples from the pool: half are those that this plan gets wrong most, half any others.

        Weights make means over them those of the pool. Samples that end in another mode are rare and rule a mean: so
        there are many of them.
        """
        n, pool = self.calibration.stop, self.pool
        errors = self.run_over(rows.plan(rows.initial), slice(0, pool), square).cpu()
        order = errors.argsort(descending=True)
        generator = torch.Generator().manual_seed(self.task.seed)
        hard, others = order[: n // 2], order[n // 2 :]
        others = others[torch.randperm(len(others), generator=generator)[: n - n // 2]]
        weight = torch.cat([torch.ones(n // 2), torch.full((len(others),), (pool - n // 2) / len(others))]) * (n / pool)
        shuffled = torch.randperm(n, generator=generator)
        self.weight = weight.double()[shuffled]
        index = torch.cat([torch.cat([hard, others])[shuffled], torch.arange(pool, pool + self.options.held_out)])
        self.fine = self.solve(index, self.keep)

    def starts(self, candidates: Iterable[tuple[str, Plan]], of: slice) -> list[tuple[str, PlanParametrization]]:
        """The candidates, closest to the fine solution first; those that cannot be fitted are left out.

        Args:
            candidates: plans by name.
            of: compared on the first of these samples.
        """
        samples = slice(0, min(max(START_SAMPLES, of.stop // 8), of.stop))
        starts: list[tuple[float, int, str, PlanParametrization]] = []
        for name, compiled in candidates:
            rows = self.rows(compiled)
            loss = self.loss(rows.plan(rows.initial), samples)
            if math.isfinite(loss) or not starts:
                starts.append((loss, len(starts), name, rows))
        return [(name, rows) for _, _, name, rows in sorted(starts, key=lambda entry: entry[:2])]

    def chosen(self, starts: list[tuple[str, PlanParametrization]]) -> list[tuple[str, PlanParametrization]]:
        """The starts to fit: of the closest those that are closest after one least squares fit of their rows."""
        count = self.options.starts
        if self.fine.states is None or len(starts) <= count:
            return starts[:count]

        def after(rows: PlanParametrization) -> float:
            n, _ = self.least_squares(rows, rows.coefficients(rows.initial))
            loss = self.loss(rows.compose(n), self.held_out)
            return loss if math.isfinite(loss) else math.inf

        return sorted(starts[: max(COMPARED, count)], key=lambda start: after(start[1]))[:count]

    def rows(self, compiled: Plan) -> PlanParametrization:
        """The parametrisation around a plan."""
        options = self.options
        rows = PlanParametrization(
            compiled,
            top=self.top,
            teleport=options.teleport,
            shift=options.shift,
            answers=options.answers,
            basis=self.basis,
        )
        rows.highest = float(coordinate(self.task.schedule, self.fine.times[-1]))
        return rows

    # ---- distances ---------------------------------------------------------------------------------------------------

    def batches(self, samples: slice) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Start, fine end and conditions of the samples, in batches."""
        for first in range(samples.start, samples.stop, self.options.batch):
            yield self.fine.select(slice(first, min(first + self.options.batch, samples.stop)))

    @torch.no_grad()
    def run_over(self, compiled: Plan, samples: slice, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`measure(result, fine end)` of each sample, (n,)."""
        return torch.cat(
            [
                measure(run_plan(compiled, self.denoiser, x, **cond)[0][-1], end)
                for x, end, cond in self.batches(samples)
            ]
        )

    def distance(self, compiled: Plan, samples: slice) -> float:
        """Root mean squared distance to the fine ends."""
        squares = self.run_over(compiled, samples, square)
        return float((squares * self.weights(samples)).mean().sqrt())

    def figure(self, compiled: Plan) -> float:
        """The figure by which plans are compared, of the distances of the held-out samples."""
        squares = self.run_over(compiled, self.held_out, square)
        value = squares.mean() if self.quantile is None else torch.quantile(squares, self.quantile)
        return float(value.sqrt()) if bool(torch.isfinite(value)) else math.inf

    def loss(self, compiled: Plan, samples: slice) -> float:
        """The mean loss."""
        return float((self.run_over(compiled, samples, self.losses) * self.weights(samples)).mean())

    def weights(self, samples: slice) -> Any:
        """The weights of calibration samples; 1 for others."""
        return self.weight[samples].to(float64_device(self.x.device)) if samples.stop <= self.calibration.stop else 1.0

    def losses(self, result: Tensor, end: Tensor) -> Tensor:
        """The loss of each sample (B,)."""
        return self.robust(square(result, end))

    def robust(self, squares: Tensor) -> Tensor:
        """`tau log(1 + e / tau)`: the influence of samples that end in another mode is bounded."""
        return squares if math.isinf(self.tau) else self.tau * torch.log1p(squares / self.tau)

    def set_tau(self, compiled: Plan) -> None:
        """Set tau from the errors of this plan."""
        if self.options.robust > 0:
            samples = self.held_out if self.pool else self.calibration
            squares = self.run_over(compiled, samples, square)
            self.tau = self.options.robust * float(torch.quantile(squares, self.quantile or 0.5)) + 1e-300

    # ---- with gradients of the network -------------------------------------------------------------------------------

    def descend(self, rows: PlanParametrization, numbers: PlanCoefficients) -> list[PlanCoefficients]:
        """L-BFGS in two rounds, and for the mean a third one of the mean square; the numbers after each round.

        Before each round the basis of the weights is changed and tau is set.
        """
        options, self.done, found = self.options, 0, []
        ends = [options.iterations // 2, options.iterations]
        if self.quantile is None and options.robust > 0:
            ends.append(options.iterations + options.iterations // 2)
        for until in ends:
            if until <= self.done:  # of a fit of one iteration
                continue
            theta, compiled = rows.theta_of(numbers), rows.compose(numbers)
            if until > options.iterations:
                self.tau = math.inf
            else:
                self.set_tau(compiled)
            x, _, cond = self.fine.select(slice(0, min(START_SAMPLES, self.calibration.stop)))
            theta = rows.whiten(theta, difference_grams(run_plan(compiled, self.denoiser, x, **cond)[1], self.basis))
            theta = self.minimise(rows, theta, until)
            numbers = PlanCoefficients(*(value.detach() for value in rows.coefficients(theta)))
            found.append(numbers)
        return found or [numbers]

    def minimise(self, rows: PlanParametrization, theta: Tensor, until: int) -> Tensor:
        """Resume from theta up to iteration `until`; returns the theta with the smallest held-out loss."""
        from scipy.optimize import minimize

        options = self.options
        best_loss, best_theta = self.loss(rows.plan(theta), self.held_out), theta.clone()
        idle, scale = 0, self.loss(rows.plan(theta), self.calibration) + 1e-300

        def value(v: Any) -> tuple[float, Any]:
            total, gradient = self.gradient(rows, torch.from_numpy(v.copy()))
            return total / scale, (gradient / scale).numpy()

        def callback(v: Any) -> None:
            nonlocal idle, best_loss, best_theta
            self.done += 1
            if self.done % options.check:
                return
            candidate = torch.from_numpy(v.copy())
            now = self.loss(rows.plan(candidate), self.held_out)
            self.task.tick("plan", self.done, options.iterations, math.sqrt(max(now, 0.0)))
            if now < best_loss:
                idle = 0 if now < best_loss * 0.999 else idle + 1
                best_loss, best_theta = now, candidate
            else:
                idle += 1
            if idle >= options.patience:
                raise StopIteration

        steps = {"maxiter": until - self.done, "maxfun": 2 * until, "maxcor": 30, "ftol": 1e-9, "gtol": 1e-9}
        x0, bounds = theta.numpy(), rows.bounds()
        minimize(value, x0, jac=True, method="L-BFGS-B", bounds=bounds, callback=callback, options=steps)
        return best_theta

    @torch.enable_grad()
    def gradient(self, rows: PlanParametrization, theta: Tensor) -> tuple[float, Tensor]:
        """The calibration loss and its gradient, batch by batch; the plan's tables are differentiated once."""
        fitted = rows.plan(theta.requires_grad_())
        tables = [getattr(fitted, name) for name in FITTED]
        leaves = [table.detach().requires_grad_() for table in tables]
        leaf_plan = replace(fitted, **dict(zip(FITTED, leaves, strict=True)))
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        total, done = 0.0, 0
        for x, end, cond in self.batches(self.calibration):
            result = run_plan(leaf_plan, self.denoiser, x, **cond)[0][-1]
            weight = self.weight[done : done + len(x)].to(float64_device(x.device))
            loss, done = (self.losses(result, end) * weight).sum() / self.calibration.stop, done + len(x)
            for total_gradient, gradient in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                total_gradient += gradient
            total += float(loss.detach())
        return total, torch.autograd.grad(tables, theta, sums)[0]

    # ---- without gradients of the network ----------------------------------------------------------------------------

    def least_squares(self, rows: PlanParametrization, n: PlanCoefficients) -> tuple[PlanCoefficients, Tensor]:
        """`fit_rows` on the calibration samples."""
        options = self.options
        return fit_rows(rows, n, self.fine, self.calibration, self.denoiser, options.batch, options.ridge)

    def scan(self, rows: PlanParametrization, numbers: PlanCoefficients, rounds: int) -> PlanCoefficients:
        """Fit weights by least squares, times by pattern search; returns the best on held-out noises."""
        options = self.options
        self.set_tau(rows.compose(numbers))
        best, idle = (self.loss(rows.compose(numbers), self.held_out), numbers), 0

        def value(n: PlanCoefficients) -> tuple[PlanCoefficients, float]:
            n, result = self.least_squares(rows, n)
            return n, float(self.losses(result, self.fine.end[self.calibration]).mean())

        def callback(done: int, n: PlanCoefficients) -> bool:
            nonlocal best, idle
            self.done, now = done, self.loss(rows.compose(n), self.held_out)
            self.task.tick("times and weights", done, rounds, math.sqrt(max(now, 0.0)))
            idle = 0 if now < best[0] * 0.999 else idle + 1
            if now < best[0]:
                best = (now, n)
            return idle >= options.patience

        pattern_search(rows, numbers, value, rounds, callback)
        return best[1]


def square(result: Tensor, end: Tensor) -> Tensor:
    """Mean squared distance per entry of each sample (B,), float64."""
    return as_float64((result - end).flatten(1)).square().mean(1)


def detach_plan(fitted: Plan) -> Plan:
    """A copy of the plan without gradients."""
    return replace(fitted, **{name: getattr(fitted, name).detach().clone() for name in (*FITTED, "A", "C")})
