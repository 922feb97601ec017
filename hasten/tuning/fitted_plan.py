"""Fit a plan: times, levels and all coefficients of a few-step sampler, for one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_choice, check_numbers
from ..plan.table import Plan, plan
from ..times import TimeGrid, UniformLambda
from ._finish import fit_last_row
from ._reference import fine_trajectories
from ._rows import PlanCoefficients, PlanParametrization, coordinate, difference_grams, run_plan
from ._sweep import fit_rows, pattern_search
from ._task import Tuned, Tuner, TuningTask

__all__ = ["FittedPlan"]

FIRST = (2.0, 4.0, 8.0, 16.0, 32.0)  # noise levels q of the first model evaluation with skip-ahead
LAST = (0.08, 0.03, 0.2)  # and of the last
FINISH = 500  # noises, and ten times as many real images, to fit the last row
START_SAMPLES = 32  # to compare starts
FITTED = ("times", "start", "a", "B")


@dataclass(frozen=True)
class FittedPlan(Tuner):
    """A plan for one model whose times, levels and coefficients are all fitted, not derived.

        x_{k+1} = a_k x_k + b_k x0_k + sum_{j<k} D[k, j] (x0_j - x0_k),
        a_k = sigma(s_{k+1}) / sigma(s_k),    b_k = alpha(s_{k+1}) - a_k alpha(s_k)

    Free are D, the levels s_1 .. s_{K-1} of the states, the times t_k passed to the network and the gain of the first
    state; for all their values every row is exact if all model outputs are the same x (see `PlanParametrization`). They
    are fitted so that the plan ends where the model's own fine solution (UniPC-3, `fine` steps) ends from the same
    noise.

    Figures: root mean squared distances per entry to the fine ends. NFE = that of the sampler on the grid. There is no
    order of convergence: a plan is fitted for one number of model evaluations.

    Args:
        gradient: "frozen": no gradient of the network. D by least squares, row after row, against the stored fine
            trajectories, with the model outputs of the plan itself; the times by a pattern search around that. Memory:
            n trajectories of `fine` states. "network": `warm` rounds of that, then L-BFGS on all parameters, at most
            `iterations`, differentiated through plan and network.
        held_out: samples besides the `task.n` (by default 128) calibration samples. They decide when to stop, after
            `patience` checks without improvement (a check every `check` iterations, or every round), and which plan is
            best.
        fine: steps of the fine solution.
        low: the last positive time of the fine solution, which determines how sharp the target is. Default: the
            grid's, at most .03.
        iterations, check, patience: see above.
        robust: tau of the loss `tau log(1 + e / tau)`, e a sample's squared error, as a multiple of the median e: a
            sample near the border of two modes, which may end in the other one, has little weight. 0: the mean square.
        teleport: skip-ahead: the first time is free too. A network learns little from pure noise, so the plan may
            evaluate the noise as if it were a later state.
        shift: t_k may differ from s_k.
        answers: how many model outputs a row uses. Default: all.
        starts: how many of the best initialisations (the sampler on the task's grid and on shorter ones) are fitted.
        warm: see `gradient`.
        ridge: penalty of the distance of D from the sampler's, relative to the mean square of its factors.
        finish: for images in [-1, 1] of a task with data: at the end the last row is adjusted until the results have
            the local contrast of real images at three resolutions (`_finish.image_statistics`), against this weight
            times the mean square of the change. The fine solution itself may not have it. 3 is a good weight.
        batch: samples per model evaluation.

    Raises:
        BadInput: for options out of range; in `tune`, for a sampler that draws noise or is not linear.

    References:
        Ours. Some of these parameters are fitted by Tong et al. 2024, arXiv:2405.15506 (times and their shifts) and S4S
        2025, arXiv:2502.17423 (coefficients).
    """

    gradient: str = "network"
    held_out: int = 64
    fine: int = 64
    low: float | None = None
    iterations: int = 100
    check: int = 5
    patience: int = 4
    robust: float = 1.0
    teleport: bool = True
    shift: bool = True
    answers: int | None = None
    starts: int = 1
    warm: int = 4
    ridge: float = 1e-5
    finish: float | None = None
    batch: int = 32
    needs_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("fitted_plan gradient", self.gradient, ("network", "frozen"))
        for name in ("held_out", "fine", "iterations", "check", "patience", "starts", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"fitted_plan({name}={getattr(self, name)}): must be at least 1")
        if self.finish is not None and not self.finish > 0:
            raise BadInput(f"fitted_plan(finish={self.finish}): the weight must be positive")
        if self.answers is not None and self.answers < 1:
            raise BadInput(f"fitted_plan(answers={self.answers}): a row needs at least 1")
        check_numbers(self)

    def tune(self, task: TuningTask) -> Tuned:
        """The fitted plan, and the errors before and after: root mean squared distances per entry."""
        if not getattr(task.sampler, "linear", False):
            raise BadInput(f"fitted_plan starts from a linear sampler: {type(task.sampler).__name__} is not linear")
        if self.finish is not None and (task.images is None or len(task.shape) != 3 or float(task.times[-1]) > 0):
            raise BadInput("fitted_plan(finish=...) needs real images (--data FOLDER), and a grid that ends at t = 0")
        return _Fit(self, task).run()


class _Fit:
    """One run; `calibration` and `held_out` are slices of the fine trajectories."""

    def __init__(self, options: FittedPlan, task: TuningTask) -> None:
        self.options, self.task, self.denoiser = options, task, task.denoiser
        n = task.n or 128
        count = n + options.held_out
        self.calibration, self.held_out = slice(0, n), slice(n, count)
        self.top = float(task.times[0])
        low = min(float(task.times[-2]), 0.03) if options.low is None else options.low
        dtype = next((p.dtype for p in task.denoiser.parameters()), torch.float64)
        x = task.noise(0, count, dtype).initial() * float(task.schedule.prior_std(self.top))
        self.fine = fine_trajectories(
            task.denoiser,
            x,
            task.cond(count),
            start=self.top,
            low=low,
            end=float(task.times[-1]),
            steps=options.fine,
            batch=options.batch,
            keep=options.gradient == "frozen" or options.warm > 0,
            tick=lambda done, total: task.tick("fine trajectories", done, total, 0.0),
        )
        self.low = float(self.fine.times[-1])
        self.tau = math.inf
        self.done = 0

    @torch.no_grad()
    def run(self) -> Tuned:
        """Fit from the best starts and return the best plan."""
        starts = self.starts()
        initial = starts[0].compose(starts[0].coefficients(starts[0].initial))
        base = self.distance(plan(self.task.sampler, self.task.schedule, self.task.times), self.held_out)
        best: tuple[float, Plan] | None = None
        for start in starts[: self.options.starts]:
            candidate = self.fit(start)
            if best is None or candidate[0] < best[0]:
                best = candidate
        assert best is not None
        fitted = best[1] if self.options.finish is None else self.fit_last_row(best[1], self.options.finish)
        figures = {
            "held_out_rms": self.distance(fitted, self.held_out),
            "held_out_rms_of_sampler": base,
            "held_out_rms_of_start": self.distance(initial, self.held_out),
            "calibration_rms": self.distance(fitted, self.calibration),
            "calibrated_on": self.calibration.stop,
            "held_out": self.options.held_out,
            "iterations": self.done,
        }
        return Tuned(plan=fitted, figures=figures)

    def fit(self, rows: PlanParametrization) -> tuple[float, Plan]:
        """Fit from one start; returns the root mean squared distance on the held-out samples, and the plan."""
        options, self.done = self.options, 0
        numbers = rows.coefficients(rows.initial)
        if options.gradient == "frozen":
            numbers = self.scan(rows, numbers, options.iterations)
        else:
            if options.warm:
                numbers = self.scan(rows, numbers, options.warm)
            numbers = self.descend(rows, numbers)
        fitted = detach_plan(rows.compose(numbers))
        return self.distance(fitted, self.held_out), fitted

    def fit_last_row(self, fitted: Plan, weight: float) -> Plan:
        """The plan with its last row fitted to the statistics of real images, on further noises."""
        task, batch, first = self.task, self.options.batch, self.held_out.stop
        assert task.images is not None
        outputs = []
        for i in range(0, FINISH, batch):
            count = min(batch, FINISH - i)
            noise = task.noise(first + i, count, self.fine.start.dtype)
            x = noise.initial() * float(task.schedule.prior_std(self.top))
            outputs.append(torch.stack(run_plan(fitted, self.denoiser, x, **task.cond(count, first + i))[1]))
            task.tick("finish", i + count, FINISH, 0.0)
        free = self.rows(task.times).free[-1, :-1]
        B = fitted.B.clone()
        real = task.images(10 * FINISH)[0].to(task.device)
        with torch.autocast(task.device.type, enabled=False):  # contrasts need more precision than bf16
            B[-1] = fit_last_row(torch.cat(outputs, 1), B[-1], free, real, weight)
        return replace(fitted, B=B)

    # ---- starts ------------------------------------------------------------------------------------------------------

    def starts(self) -> list[PlanParametrization]:
        """The sampler on the task's grid and on grids with other first and last times, best first."""
        task, samples = self.task, slice(0, min(START_SAMPLES, self.calibration.stop))
        starts: list[tuple[float, int, PlanParametrization]] = []

        def measure(times: Tensor) -> float:
            rows = self.rows(times)
            starts.append((self.loss(rows.plan(rows.initial), samples), len(starts), rows))
            return starts[-1][0]

        measure(task.times)
        if self.options.teleport and task.steps > 1 and float(task.times[-1]) == 0:
            grids: dict[tuple[float, float], TimeGrid] = {}
            for first in FIRST:
                for last in LAST:
                    start, low = (float(task.schedule.time(-math.log(q))) for q in (first, last))
                    if start < self.top:
                        grids[first, last] = UniformLambda(start=start, low=max(low, self.low))
            losses = {f: measure(grids[f, LAST[0]](task.schedule, task.steps)) for f in FIRST if (f, LAST[0]) in grids}
            if losses:
                first = min(losses, key=lambda f: losses[f])
                for last in LAST[1:]:
                    measure(grids[first, last](task.schedule, task.steps))
        return [rows for _, _, rows in sorted(starts, key=lambda entry: entry[:2])]

    def rows(self, times: Tensor) -> PlanParametrization:
        """The parametrisation around the sampler's plan on these times."""
        options, compiled = self.options, plan(self.task.sampler, self.task.schedule, times)
        rows = PlanParametrization(
            compiled, top=self.top, teleport=options.teleport, shift=options.shift, answers=options.answers
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
        return float(self.run_over(compiled, samples, square).mean().sqrt())

    def loss(self, compiled: Plan, samples: slice) -> float:
        """The mean loss."""
        return float(self.run_over(compiled, samples, self.losses).mean())

    def losses(self, result: Tensor, end: Tensor) -> Tensor:
        """The loss of each sample (B,)."""
        return self.robust(square(result, end))

    def robust(self, squares: Tensor) -> Tensor:
        """`tau log(1 + e / tau)`: the influence of samples that end in another mode is bounded."""
        return squares if math.isinf(self.tau) else self.tau * torch.log1p(squares / self.tau)

    def set_tau(self, compiled: Plan) -> None:
        """Set tau from the errors of this plan."""
        if self.options.robust > 0:
            self.tau = self.options.robust * float(self.run_over(compiled, self.calibration, square).median()) + 1e-300

    # ---- with gradients of the network -------------------------------------------------------------------------------

    def descend(self, rows: PlanParametrization, numbers: PlanCoefficients) -> PlanCoefficients:
        """L-BFGS in two rounds; before each the basis of the weights is changed and tau is set."""
        options, self.done = self.options, 0
        for until in (options.iterations // 2, options.iterations):
            theta, compiled = rows.theta_of(numbers), rows.compose(numbers)
            self.set_tau(compiled)
            x, _, cond = self.fine.select(slice(0, min(START_SAMPLES, self.calibration.stop)))
            theta = rows.whiten(theta, difference_grams(run_plan(compiled, self.denoiser, x, **cond)[1]))
            theta = self.minimise(rows, theta, until)
            numbers = PlanCoefficients(*(value.detach() for value in rows.coefficients(theta)))
        return numbers

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
        leaf_plan = Plan(**dict(zip(FITTED, leaves, strict=True)), A=fitted.A, C=fitted.C, schedule=fitted.schedule)
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        total = 0.0
        for x, end, cond in self.batches(self.calibration):
            result = run_plan(leaf_plan, self.denoiser, x, **cond)[0][-1]
            loss = self.losses(result, end).sum() / self.calibration.stop
            for total_gradient, gradient in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                total_gradient += gradient
            total += float(loss.detach())
        return total, torch.autograd.grad(tables, theta, sums)[0]

    # ---- without gradients of the network ----------------------------------------------------------------------------

    def scan(self, rows: PlanParametrization, numbers: PlanCoefficients, rounds: int) -> PlanCoefficients:
        """Fit weights by least squares, times by pattern search; returns the best on held-out noises."""
        options = self.options
        self.set_tau(rows.compose(numbers))
        best, idle = (self.loss(rows.compose(numbers), self.held_out), numbers), 0

        def value(n: PlanCoefficients) -> tuple[PlanCoefficients, float]:
            n, result = fit_rows(rows, n, self.fine, self.calibration, self.denoiser, options.batch, options.ridge)
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
    return (result - end).flatten(1).double().square().mean(1)


def detach_plan(fitted: Plan) -> Plan:
    """A copy of the plan without gradients."""
    tables = {name: getattr(fitted, name).detach().clone() for name in ("times", "start", "a", "A", "B", "C")}
    return Plan(**tables, sampler=fitted.sampler, schedule=fitted.schedule, begin=fitted.begin)
