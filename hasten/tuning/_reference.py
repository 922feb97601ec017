"""A model's own fine trajectories, the target that a plan of few steps is fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..plan.table import plan
from ..samplers.unipc import UniPC
from ..schedules.base import Schedule
from ..times import UniformLambda

__all__ = ["FineTrajectories", "fine_trajectories"]


class FineTrajectories:
    """Fine solutions of the probability-flow ODE from given noises, which can be interpolated in time.

    Args:
        schedule: of the model.
        times: (M,), descending, of the stored states.
        start: (B, *S), the states at times[0].
        end: (B, *S), the states at t = 0, or at the end of the grid.
        cond: conditions of the samples.
        states, x0: (M, B, *S), the states and model outputs at `times`; None if only the ends were stored.
    """

    def __init__(
        self,
        schedule: Schedule,
        times: Tensor,
        start: Tensor,
        end: Tensor,
        cond: dict[str, Any],
        states: Tensor | None,
        x0: Tensor | None,
    ) -> None:
        self.schedule, self.times, self.start, self.end, self.cond = schedule, times, start, end, cond
        self.states, self.x0 = states, x0
        self.angles = torch.atan2(schedule.sigma(times), schedule.alpha(times))

    def __len__(self) -> int:
        return len(self.start)

    def select(self, samples: slice) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Start, end and conditions of some of the samples."""
        return self.start[samples], self.end[samples], {key: value[samples] for key, value in self.cond.items()}

    def at(self, t: Tensor, samples: slice) -> Tensor:
        """The states (n, *S) of some samples at a time within the fine grid.

        By cubic Hermite interpolation of Y = x_t / sqrt(alpha^2 + sigma^2) in phi = atan(sigma / alpha), where
        dY/dphi = (Y cos phi - x0) / sin phi.
        """
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        phi = math.atan2(sigma, alpha)
        i = int((self.angles >= phi - 1e-12).sum()) - 1
        i = min(max(i, 0), len(self.angles) - 2)
        p0, p1 = float(self.angles[i]), float(self.angles[i + 1])
        h = p1 - p0
        w = min(max((phi - p0) / h, 0.0), 1.0)
        (y0, d0), (y1, d1) = self._derivative(i, samples), self._derivative(i + 1, samples)
        value = (1 + 2 * w) * (1 - w) ** 2 * y0 + w**2 * (3 - 2 * w) * y1
        value = value + h * w * (1 - w) ** 2 * d0 - h * w**2 * (1 - w) * d1
        return value * math.hypot(alpha, sigma)

    def _derivative(self, i: int, samples: slice) -> tuple[Tensor, Tensor]:
        """Y and dY/dphi at node i."""
        assert self.states is not None and self.x0 is not None, "only the ends were stored"
        t, phi = self.times[i], float(self.angles[i])
        y = self.states[i, samples] / float(self.schedule.prior_std(t))
        return y, (y * math.cos(phi) - self.x0[i, samples]) / math.sin(phi)


@torch.no_grad()
def fine_trajectories(
    denoiser: Any,
    x: Tensor,
    cond: dict[str, Any],
    *,
    start: float,
    low: float,
    end: float,
    steps: int,
    batch: int,
    keep: bool,
    tick: Callable[[int, int], None],
) -> FineTrajectories:
    """`steps` of UniPC-3, equal in lam from `start` to `low`, then (if end = 0) one to the clean image.

    Args:
        denoiser: the model.
        x: (B, *S), noise at the level of `start`.
        cond: conditions of the samples.
        start, low, end: times; `low` is the last positive time if end = 0.
        steps: of the fine grid.
        batch: samples per model evaluation.
        keep: store the trajectories too, not only their ends.
        tick: called as `tick(done, total)`.
    """
    schedule = denoiser.schedule
    if end > 0:
        times = UniformLambda(start=start, end=end)(schedule, steps)
    else:
        times = UniformLambda(start=start, low=low)(schedule, steps)
    solver: Any = UniPC(3)
    compiled = plan(solver, schedule, times)
    ends, states, outputs = [], [], []
    for first in range(0, len(x), batch):
        samples = slice(first, first + batch)
        batch_states: list[Tensor] = []
        batch_outputs: list[Tensor] = []

        def record(
            x_t: Tensor,
            t: Tensor,
            states: list[Tensor] = batch_states,
            outputs: list[Tensor] = batch_outputs,
            **cond: Any,
        ) -> Tensor:
            x0 = denoiser(x_t, t, **cond)
            if keep:
                states.append(x_t)
                outputs.append(x0)
            return x0

        ends.append(compiled(record, x[samples], cond={key: value[samples] for key, value in cond.items()}))
        if keep:
            states.append(torch.stack(batch_states))
            outputs.append(torch.stack(batch_outputs))
        tick(min(first + batch, len(x)), len(x))
    return FineTrajectories(
        schedule,
        compiled.times[:-1],
        x,
        torch.cat(ends),
        cond,
        torch.cat(states, 1) if keep else None,
        torch.cat(outputs, 1) if keep else None,
    )
