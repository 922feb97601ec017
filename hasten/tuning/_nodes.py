"""The nodes of a time grid as unconstrained parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from ..schedules.base import Schedule
from ..times import FAR_Q, MAX_Q, TimeGrid

__all__ = ["EarlyStopping", "GridNodes"]


class EarlyStopping(Exception):
    """Raised by a callback to end the optimisation."""


class GridNodes:
    """The N + 1 nodes of a grid in lam, as a function of N parameters u: the gaps are their softmax.

    Args:
        schedule: of the diffusion.
        times: (N + 1,), whose ends are fixed.
        low: for a grid that ends at t = 0, the time whose lam is the last node. Default: `schedule.t_min`.
    """

    def __init__(self, schedule: Schedule, times: Tensor, low: float | None) -> None:
        self.schedule, self.start, self.end = schedule, float(times[0]), float(times[-1])
        low = schedule.t_min if low is None else low
        self.low = self.end if self.end > 0 else min(low, self.start / 2)
        first = float(schedule.lam(self.start))
        self.first = -math.log(MAX_Q) if first < -math.log(FAR_Q) else first
        self.last = float(schedule.lam(self.low))

    def grid(self, grid: TimeGrid, steps: int) -> Tensor:
        """The times (steps + 1,) of a fixed time grid between the same ends."""
        low = self.low if self.end == 0 and not grid.reaches_zero else None
        return dataclasses.replace(grid, start=self.start, end=self.end, low=low)(self.schedule, steps)

    def times(self, lam: Tensor) -> Tensor:
        """Times (N + 1,) of lam (N + 1,), with exactly the ends of the grid."""
        ends = lam.new_tensor([self.start]), lam.new_tensor([self.end])
        return torch.cat([ends[0], self.schedule.time(lam[1:-1]), ends[1]])

    def project(self, times: Tensor) -> Tensor:
        """lam (N + 1,) of times, with ends `first`, `last` and gaps of at least a thousandth of the mean gap."""
        ends = times.new_tensor([self.first]), times.new_tensor([self.last])
        lam = torch.cat([ends[0], self.schedule.lam(times[1:-1]), ends[1]])
        min_gap = 1e-3 * (self.last - self.first) / (len(lam) - 1)
        gaps = lam.diff().clamp(min=min_gap)
        return self.first + (self.last - self.first) * torch.cat([gaps.new_zeros(1), gaps.cumsum(0)]) / gaps.sum()

    def from_params(self, u: Tensor) -> Tensor:
        """Times (N + 1,) of the parameters u (N,), differentiable."""
        lam = self.first + (self.last - self.first) * torch.softmax(u, 0).cumsum(0)
        return self.times(torch.cat([lam.new_tensor([self.first]), lam]))

    def descend(
        self,
        objective: Callable[[Tensor], tuple[float, Tensor]],
        start: Tensor,
        iterations: int,
        callback: Callable[[Tensor, int], None] = lambda u, done: None,
    ) -> tuple[float, Tensor]:
        """Minimise a function of u by L-BFGS.

        Args:
            objective: u -> value and gradient.
            start: times (N + 1,) to start from.
            iterations: at most.
            callback: called as `callback(u, iterations done)` after each; may raise `EarlyStopping`.

        Returns:
            The smallest value and its times.
        """
        from scipy.optimize import minimize

        u0 = torch.log(self.project(start).diff())
        u0 = (u0 - u0.mean()).clamp(-4, 4)
        seen: list[tuple[float, np.ndarray]] = []
        done = 0

        def evaluate(u: np.ndarray) -> tuple[float, np.ndarray]:
            try:
                with torch.enable_grad():
                    value, gradient = objective(torch.from_numpy(u.copy()).requires_grad_())
            except BadInput:  # nodes so close that their times coincide, or a plan that is not finite
                value, gradient = math.inf, torch.zeros(len(u))
            if not math.isfinite(value) or not bool(torch.isfinite(gradient).all()):
                return 1e3, np.zeros(len(u))
            seen.append((value, u.copy()))
            return value, gradient.numpy().astype(float)

        def after(u: np.ndarray) -> None:
            nonlocal done
            done += 1
            callback(torch.from_numpy(u.copy()), done)

        with contextlib.suppress(EarlyStopping):
            minimize(
                evaluate,
                u0.numpy(),
                jac=True,
                method="L-BFGS-B",
                bounds=[(-5.0, 5.0)] * len(u0),
                callback=after,
                options={"maxiter": iterations, "maxcor": 15},
            )
        value, u = min(seen, key=lambda pair: pair[0])
        return value, self.from_params(torch.from_numpy(u))
