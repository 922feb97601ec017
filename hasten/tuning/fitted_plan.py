"""Fitting the plan itself: times, levels and every coefficient of a few-step sampler, for one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers, nearest
from ..plan.table import Plan, plan
from ..times import TimeGrid, UniformLambda
from ._finish import fit_last_row
from ._reference import fine_trajectories
from ._rows import PlanCoefficients, PlanParametrization, coordinate, difference_grams, run_plan
from ._sweep import fit_rows, pattern_search
from ._task import Tuned, TuningTask

__all__ = ["FittedPlan"]

FIRST = (2.0, 4.0, 8.0, 16.0, 32.0)  # noise levels q at which a teleporting start may ask first
LAST = (0.08, 0.03, 0.2)  # and last
FINISH = 500  # noises, and ten times as many real images, for the last row's finish
FEW = 32  # samples that choose among starts
FITTED = ("times", "start", "a", "B")


@dataclass(frozen=True)
class FittedPlan:
    """A plan of its own for one model: times, levels and all coefficients are fitted, not derived.

        x_{k+1} = a_k x_k + b_k x0_k + sum_{j<k} D[k, j] (x0_j - x0_k),
        a_k = sigma(s_{k+1}) / sigma(s_k),    b_k = alpha(s_{k+1}) - a_k alpha(s_k)

    Free are D, the levels s_1 .. s_{K-1} of the states, the times t_k that the network is told and the gain of the
    first state; whatever they are, every row is exact where all answers are the same x (see `Rows`). They are fitted
    so that the plan ends where the model's own fine solution (UniPC-3, `fine` steps) ends from the same noise.

    gradient "frozen": no gradient of the network. D by least squares, row after row, against the stored fine
        trajectories, with the answers that the plan itself gets; the times by a pattern search around that. Memory: n
        trajectories of `fine` states. `ridge` holds D to the sampler's, relative to the mean square of its factors.
    gradient "network": `warm` rounds of that, then L-BFGS on all numbers at once, at most `iterations`, differentiated
        through plan and network.
    held_out: samples beside the `task.n` (by default 128) calibration ones. They say when to stop, after `patience`
        checks without gain (a check every `check` iterations, or every round), and which of the plans seen is kept.
    robust: tau of the loss `tau log(1 + e / tau)`, e a sample's squared error, as a multiple of the median e: a sample
        near the border of two modes, which ends in the other one by chance, does not decide. 0: the mean square.
    finish: for images in [-1, 1] of a task with data: when all is fitted, the last row is moved until the results have
        the contrasts of real images at three resolutions (`_finish.statistics`), against this weight times the mean
        square of the move. The fine solution itself may lack them. 3 is a good weight.
    low: the last positive time of the fine solution; by default the grid's, at most .03. It decides how sharp the
        target is.
    teleport: the first query's time is free too: a network knows little of pure noise that its data's spread does not
        say, so the plan may begin by asking about the noise as if it were a later state.
    shift: t_k may differ from s_k. answers: how many answers a row uses; None: all. starts: how many of the best
        beginnings (the sampler on the task's grid and on shorter ones) are fitted. batch: samples in the network.

    Figures: root mean squared distances per entry to the fine ends. NFE = that of the sampler on the grid. No order of
    convergence: a plan is fitted for its own number of queries.

    Raises:
        BadInput: for a sampler that draws noise or is no plan, or options that cannot be.

    Reference: ours. Some of these numbers are fitted by Tong et al. 2024, arXiv:2405.15506 (times and their shifts) and
    S4S 2025, arXiv:2502.17423 (coefficients).
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
        if self.gradient not in ("network", "frozen"):
            raise BadInput(f"fitted_plan(gradient={self.gradient!r}): {nearest(self.gradient, ('network', 'frozen'))}")
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
            raise BadInput(f"fitted_plan starts from a sampler that is a plan: {type(task.sampler).__name__} is none")
        if self.finish is not None and (task.images is None or len(task.shape) != 3 or float(task.times[-1]) > 0):
            raise BadInput("fitted_plan(finish=...) needs real images (--data FOLDER), and a grid that ends at t = 0")
        return _Fit(self, task).run()


class _Fit:
    """One run: `cal` and `held` are the slices of the fine trajectories to fit on and to stop by."""

    def __init__(self, options: FittedPlan, task: TuningTask) -> None:
        self.options, self.task, self.denoiser = options, task, task.denoiser
        n = task.n or 128
        count = n + options.held_out
        self.cal, self.held = slice(0, n), slice(n, count)
        self.top = float(task.times[0])
        low = min(float(task.times[-2]), 0.03) if options.low is None else options.low
        dtype = next((p.dtype for p in task.denoiser.parameters()), torch.float64)
        x = task.noise(0, count, dtype).initial() * float(task.schedule.prior_std(self.top))
        self.fine = fine_trajectories(
            task.denoiser, x, task.cond(count), start=self.top, low=low, end=float(task.times[-1]),
            steps=options.fine, batch=options.batch, keep=options.gradient == "frozen" or options.warm > 0,
            tick=lambda done, total: task.tick("fine trajectories", done, total, 0.0),
        )  # fmt: skip
        self.low = float(self.fine.times[-1])
        self.tau = math.inf
        self.done = 0

    @torch.no_grad()
    def run(self) -> Tuned:
        rows = self.starts()
        begin = rows[0].compose(rows[0].numbers(rows[0].initial))
        base = self.distance(plan(self.task.sampler, self.task.schedule, self.task.times), self.held)
        best: tuple[float, Plan] | None = None
        for start in rows[: self.options.starts]:
            found = self.fit(start)
            if best is None or found[0] < best[0]:
                best = found
        assert best is not None
        fitted = best[1] if self.options.finish is None else self.finished(best[1], self.options.finish)
        figures = {
            "held_out_rms": self.distance(fitted, self.held), "held_out_rms_of_sampler": base,
            "held_out_rms_of_start": self.distance(begin, self.held),
            "calibration_rms": self.distance(fitted, self.cal), "calibrated_on": self.cal.stop,
            "held_out": self.options.held_out, "iterations": self.done,
        }  # fmt: skip
        return Tuned(plan=fitted, figures=figures)

    def fit(self, rows: PlanParametrization) -> tuple[float, Plan]:
        """From one start: its root mean squared distance on the held-out samples, and the plan."""
        options, self.done = self.options, 0
        numbers = rows.numbers(rows.initial)
        if options.gradient == "frozen":
            numbers = self.scan(rows, numbers, options.iterations)
        else:
            if options.warm:
                numbers = self.scan(rows, numbers, options.warm)
            numbers = self.descend(rows, numbers)
        made = detach_plan(rows.compose(numbers))
        return self.distance(made, self.held), made

    def finished(self, made: Plan, weight: float) -> Plan:
        """The plan with its last row fitted to the statistics of real images, on noises of its own."""
        task, batch, first = self.task, self.options.batch, self.held.stop
        assert task.images is not None
        said = []
        for i in range(0, FINISH, batch):
            count = min(batch, FINISH - i)
            noise = task.noise(first + i, count, self.fine.start.dtype)
            x = noise.initial() * float(task.schedule.prior_std(self.top))
            said.append(torch.stack(run_plan(made, self.denoiser, x, **task.cond(count, first + i))[1]))
            task.tick("finish", i + count, FINISH, 0.0)
        free = self.rows(task.times).free[-1, :-1]
        B = made.B.clone()
        real = task.images(10 * FINISH)[0].to(task.device)
        with torch.autocast(task.device.type, enabled=False):  # contrasts are finer than bf16
            B[-1] = fit_last_row(torch.cat(said, 1), B[-1], free, real, weight)
        return replace(made, B=B)

    # ---- where to begin ---------------------------------------------------------------------------------------------

    def starts(self) -> list[PlanParametrization]:
        """The sampler on the task's grid and on grids that begin and end elsewhere, best first."""
        task, few = self.task, slice(0, min(FEW, self.cal.stop))
        tried: list[tuple[float, int, PlanParametrization]] = []

        def measure(times: Tensor) -> float:
            rows = self.rows(times)
            tried.append((self.loss(rows.plan(rows.initial), few), len(tried), rows))
            return tried[-1][0]

        measure(task.times)
        if self.options.teleport and task.steps > 1 and float(task.times[-1]) == 0:
            grids: dict[tuple[float, float], TimeGrid] = {}
            for first in FIRST:
                for last in LAST:
                    start, low = (float(task.schedule.time(-math.log(q))) for q in (first, last))
                    if start < self.top:
                        grids[first, last] = UniformLambda(start=start, low=max(low, self.low))
            found = {f: measure(grids[f, LAST[0]](task.schedule, task.steps)) for f in FIRST if (f, LAST[0]) in grids}
            if found:
                first = min(found, key=lambda f: found[f])
                for last in LAST[1:]:
                    measure(grids[first, last](task.schedule, task.steps))
        return [rows for _, _, rows in sorted(tried, key=lambda entry: entry[:2])]

    def rows(self, times: Tensor) -> PlanParametrization:
        options, compiled = self.options, plan(self.task.sampler, self.task.schedule, times)
        rows = PlanParametrization(
            compiled, top=self.top, teleport=options.teleport, shift=options.shift, answers=options.answers
        )
        rows.highest = float(coordinate(self.task.schedule, self.fine.times[-1]))
        return rows

    # ---- distances --------------------------------------------------------------------------------------------------

    def batches(self, part: slice) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        for first in range(part.start, part.stop, self.options.batch):
            yield self.fine.rows(slice(first, min(first + self.options.batch, part.stop)))

    @torch.no_grad()
    def run_over(self, compiled: Plan, part: slice, measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`measure(result, fine end)` of each sample (n,)."""
        return torch.cat(
            [measure(run_plan(compiled, self.denoiser, x, **cond)[0][-1], end) for x, end, cond in self.batches(part)]
        )

    def distance(self, compiled: Plan, part: slice) -> float:
        """Root mean squared."""
        return float(self.run_over(compiled, part, square).mean().sqrt())

    def loss(self, compiled: Plan, part: slice) -> float:
        """What is minimised."""
        return float(self.run_over(compiled, part, self.each).mean())

    def each(self, result: Tensor, end: Tensor) -> Tensor:
        """The loss of each sample (B,)."""
        return self.damped(square(result, end))

    def damped(self, squares: Tensor) -> Tensor:
        """`tau log(1 + e / tau)`: a sample that ended in another mode counts little more than one that almost did."""
        return squares if math.isinf(self.tau) else self.tau * torch.log1p(squares / self.tau)

    def settle(self, compiled: Plan) -> None:
        """tau from the errors that this plan makes."""
        if self.options.robust > 0:
            self.tau = self.options.robust * float(self.run_over(compiled, self.cal, square).median()) + 1e-300

    # ---- with gradients of the network ------------------------------------------------------------------------------

    def descend(self, rows: PlanParametrization, numbers: PlanCoefficients) -> PlanCoefficients:
        """L-BFGS in two rounds: before each the weights are measured anew, and tau is set."""
        options, self.done = self.options, 0
        for until in (options.iterations // 2, options.iterations):
            theta, compiled = rows.theta_of(numbers), rows.compose(numbers)
            self.settle(compiled)
            x, _, cond = self.fine.rows(slice(0, min(FEW, self.cal.stop)))
            theta = rows.whiten(theta, difference_grams(run_plan(compiled, self.denoiser, x, **cond)[1]))
            numbers = PlanCoefficients(*(part.detach() for part in rows.numbers(self.minimise(rows, theta, until))))
        return numbers

    def minimise(self, rows: PlanParametrization, theta: Tensor, until: int) -> Tensor:
        """Go on from theta to iteration `until`; the theta of the least held-out loss on the way."""
        from scipy.optimize import minimize

        options = self.options
        best = [self.loss(rows.plan(theta), self.held), theta.clone()]
        idle, scale = 0, self.loss(rows.plan(theta), self.cal) + 1e-300

        def value(v: Any) -> tuple[float, Any]:
            total, gradient = self.gradient(rows, torch.from_numpy(v.copy()))
            return total / scale, (gradient / scale).numpy()

        def watch(v: Any) -> None:
            nonlocal idle
            self.done += 1
            if self.done % options.check:
                return
            there = torch.from_numpy(v.copy())
            now = self.loss(rows.plan(there), self.held)
            self.task.tick("plan", self.done, options.iterations, math.sqrt(max(now, 0.0)))
            if now < best[0]:
                idle = 0 if now < best[0] * 0.999 else idle + 1
                best[:] = [now, there]
            else:
                idle += 1
            if idle >= options.patience:
                raise StopIteration

        steps = {"maxiter": until - self.done, "maxfun": 2 * until, "maxcor": 30, "ftol": 1e-9, "gtol": 1e-9}
        minimize(value, theta.numpy(), jac=True, method="L-BFGS-B", bounds=rows.bounds(), callback=watch, options=steps)
        return best[1]

    @torch.enable_grad()
    def gradient(self, rows: PlanParametrization, theta: Tensor) -> tuple[float, Tensor]:
        """The calibration loss and its gradient, a batch at a time: the plan's tables are differentiated once."""
        made = rows.plan(theta.requires_grad_())
        tables = [getattr(made, name) for name in FITTED]
        leaves = [table.detach().requires_grad_() for table in tables]
        cut = Plan(**dict(zip(FITTED, leaves, strict=True)), A=made.A, C=made.C, schedule=made.schedule)
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        total = 0.0
        for x, end, cond in self.batches(self.cal):
            result = run_plan(cut, self.denoiser, x, **cond)[0][-1]
            loss = self.each(result, end).sum() / self.cal.stop
            for sum_, part in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                sum_ += part
            total += float(loss.detach())
        return total, torch.autograd.grad(tables, theta, sums)[0]

    # ---- without ----------------------------------------------------------------------------------------------------

    def scan(self, rows: PlanParametrization, numbers: PlanCoefficients, rounds: int) -> PlanCoefficients:
        """Weights by least squares against the fine trajectories, times by pattern search; the best on the held-out."""
        options = self.options
        self.settle(rows.compose(numbers))
        best, idle = (self.loss(rows.compose(numbers), self.held), numbers), 0

        def value(n: PlanCoefficients) -> tuple[PlanCoefficients, float]:
            about = (self.fine, self.cal, self.denoiser, options.batch, options.ridge)
            n, result = fit_rows(rows, n, *about)
            return n, float(self.each(result, self.fine.end[self.cal]).mean())

        def watch(done: int, n: PlanCoefficients) -> bool:
            nonlocal best, idle
            self.done, now = done, self.loss(rows.compose(n), self.held)
            self.task.tick("times and weights", done, rounds, math.sqrt(max(now, 0.0)))
            idle = 0 if now < best[0] * 0.999 else idle + 1
            if now < best[0]:
                best = (now, n)
            return idle >= options.patience

        pattern_search(rows, numbers, value, rounds, watch)
        return best[1]


def square(result: Tensor, end: Tensor) -> Tensor:
    """Mean squared distance per entry of each sample (B,), float64."""
    return (result - end).flatten(1).double().square().mean(1)


def detach_plan(made: Plan) -> Plan:
    """The same plan without gradients."""
    tables = {name: getattr(made, name).detach().clone() for name in ("times", "start", "a", "A", "B", "C")}
    return Plan(**tables, sampler=made.sampler, schedule=made.schedule, begin=made.begin)
