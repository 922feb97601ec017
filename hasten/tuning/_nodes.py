"""The nodes of a grid as numbers that can be optimised."""

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

__all__ = ["EarlyStop", "GridNodes"]


class EarlyStop(Exception):
    """The held-out noises say that the search has gone far enough."""


class GridNodes:
    """The N + 1 nodes of a grid in lam, as a function of N numbers u: the gaps are their softmax."""

    def __init__(self, schedule: Schedule, times: Tensor, low: float | None) -> None:
        self.schedule, self.start, self.end = schedule, float(times[0]), float(times[-1])
        low = schedule.t_min if low is None else low
        self.low = self.end if self.end > 0 else min(low, self.start / 2)
        first = float(schedule.lam(self.start))
        self.first = -math.log(MAX_Q) if first < -math.log(FAR_Q) else first
        self.last = float(schedule.lam(self.low))

    def grid(self, grid: TimeGrid, steps: int) -> Tensor:
        """The times (steps + 1,) of a fixed grid between the same ends."""
        low = self.low if self.end == 0 and not grid.reaches_zero else None
        return dataclasses.replace(grid, start=self.start, end=self.end, low=low)(self.schedule, steps)

    def times(self, lam: Tensor) -> Tensor:
        """lam (N + 1,) -> times, whose ends are exactly those asked for."""
        ends = lam.new_tensor([self.start]), lam.new_tensor([self.end])
        return torch.cat([ends[0], self.schedule.time(lam[1:-1]), ends[1]])

    def inside(self, times: Tensor) -> Tensor:
        """times -> lam (N + 1,) with ends `first`, `last` and gaps of at least a thousandth of the mean one."""
        ends = times.new_tensor([self.first]), times.new_tensor([self.last])
        lam = torch.cat([ends[0], self.schedule.lam(times[1:-1]), ends[1]])
        least = 1e-3 * (self.last - self.first) / (len(lam) - 1)
        gaps = lam.diff().clamp(min=least)
        return self.first + (self.last - self.first) * torch.cat([gaps.new_zeros(1), gaps.cumsum(0)]) / gaps.sum()

    def of(self, u: Tensor) -> Tensor:
        """u (N,) -> times (N + 1,); differentiable."""
        lam = self.first + (self.last - self.first) * torch.softmax(u, 0).cumsum(0)
        return self.times(torch.cat([lam.new_tensor([self.first]), lam]))

    def descend(
        self,
        slope: Callable[[Tensor], tuple[float, Tensor]],
        start: Tensor,
        iterations: int,
        watch: Callable[[Tensor, int], None] = lambda u, done: None,
    ) -> tuple[float, Tensor]:
        """The least value seen of a function of u, and its times: L-BFGS from the times `start`.

        slope(u) -> value and gradient. watch(u, iterations made) is called after each and may raise `Enough`.
        """
        from scipy.optimize import minimize

        u0 = torch.log(self.inside(start).diff())
        u0 = (u0 - u0.mean()).clamp(-4, 4)
        seen: list[tuple[float, np.ndarray]] = []
        done = 0

        def objective(u: np.ndarray) -> tuple[float, np.ndarray]:
            try:
                with torch.enable_grad():
                    value, gradient = slope(torch.from_numpy(u.copy()).requires_grad_())
            except BadInput:  # nodes so close that their times are one, or a table that is not finite
                value, gradient = math.inf, torch.zeros(len(u))
            if not math.isfinite(value) or not bool(torch.isfinite(gradient).all()):
                return 1e3, np.zeros(len(u))
            seen.append((value, u.copy()))
            return value, gradient.numpy().astype(float)

        def after(u: np.ndarray) -> None:
            nonlocal done
            done += 1
            watch(torch.from_numpy(u.copy()), done)

        with contextlib.suppress(EarlyStop):
            minimize(objective, u0.numpy(), jac=True, method="L-BFGS-B", bounds=[(-5.0, 5.0)] * len(u0), callback=after,
                     options={"maxiter": iterations, "maxcor": 15})  # fmt: skip
        value, u = min(seen, key=lambda pair: pair[0])
        return value, self.of(torch.from_numpy(u))
