"""Fit a plan: times, levels and all coefficients of a few-step sampler, for one model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import BadInput, check_choice, check_numbers
from ..plan.table import Plan, plan
from ._fit import PlanFit, figure_of
from ._starts import sampler_starts
from ._task import Tuned, Tuner, TuningTask

__all__ = ["FittedPlan"]


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
        figure: what "best" means, of the distances of the held-out samples: "mean" (root mean square, which samples
            that end in another mode rule), "median", or a quantile such as "q90".
        search: "all": start from several samplers on every time grid besides the task's own; the result is no worse on
            the held-out samples than the best of these. "sampler": the task's sampler on its own and shorter grids.
        held_out: samples besides the `task.n` (by default 128) calibration samples. They decide when to stop, after
            `patience` checks without improvement (a check every `check` iterations, or every round), and which plan is
            best.
        fine: steps of the fine solution.
        low: the last positive time of the fine solution, which determines how sharp the target is. Default: the
            grid's, at most .03.
        iterations, check, patience: see above.
        robust: tau of the loss `tau log(1 + e / tau)`, e a sample's squared error, as a multiple of the median e: a
            sample near the border of two modes, which may end in the other one, has little weight. For another quantile
            than the median, of that. 0: the mean square, which for figure "mean" is minimised at the end anyway.
        teleport: skip-ahead: the first time is free too. A network learns little from pure noise, so the plan may
            evaluate the noise as if it were a later state.
        shift: t_k may differ from s_k.
        answers: how many model outputs a row uses. Default: all.
        starts: how many of the best initialisations are fitted.
        warm: see `gradient`.
        ridge: penalty of the distance of D from the sampler's, relative to the mean square of its factors.
        finish: for images in [-1, 1] of a task with data: at the end the last row is adjusted until the results have
            the local contrast of real images at three resolutions (`_finish.image_statistics`), against this weight
            times the mean square of the change. The fine solution itself may not have it. 3 is a good weight.
        batch: samples per model evaluation.
        pool: so many noises to choose the calibration samples from, half of them those that the best start gets wrong
            most, with weights. 0: none are chosen. Many times `n` where the mean matters and modes are separate.
        directions: coefficients for each of at most this many groups of directions, the eigenvectors of the model's own
            results. 0: one coefficient for all. A plan with directions does not run inside a pipeline of `diffusers`.

    Raises:
        BadInput: for options out of range; in `tune`, for a sampler that draws noise or is not linear.

    References:
        Ours. Some of these parameters are fitted by Tong et al. 2024, arXiv:2405.15506 (times and their shifts) and S4S
        2025, arXiv:2502.17423 (coefficients).
    """

    gradient: str = "network"
    figure: str = "mean"
    search: str = "all"
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
    pool: int = 0
    directions: int = 0
    needs_data: ClassVar[bool] = False
    reads_sources: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("fitted_plan gradient", self.gradient, ("network", "frozen"))
        check_choice("fitted_plan search", self.search, ("all", "sampler"))
        if self.figure != "mean" and figure_of(self.figure) is None:
            raise BadInput(f"fitted_plan figure must be mean, median or a quantile such as q90, found {self.figure!r}")
        for name in ("held_out", "fine", "iterations", "check", "patience", "starts", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"fitted_plan({name}={getattr(self, name)}): must be at least 1")
        if self.pool < 0 or self.directions < 0 or (self.directions and self.finish is not None):
            raise BadInput("fitted_plan needs pool and directions >= 0, and no finish together with directions")
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
        fit = PlanFit(self, task)
        return fit.run(self.candidates(fit, task), self.baseline(task))

    def candidates(self, fit: Any, task: TuningTask) -> Iterator[tuple[str, Plan]]:
        """The plans to start from, by name; the sampler on the task's grid first."""
        return sampler_starts(task, fit.low, teleport=self.teleport, every=self.search == "all")

    def baseline(self, task: TuningTask) -> Plan:
        """The plan that the fitted one is compared with."""
        return plan(task.sampler, task.schedule, task.times)
