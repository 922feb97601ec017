"""A model's own fine trajectories: what a few-step plan is fitted to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..plan.table import plan
from ..samplers.unipc import UniPC
from ..schedules.base import Schedule
from ..times import UniformLambda

__all__ = ["FineTrajectories", "fine_trajectories"]


class FineTrajectories:
    """Fine solutions of the probability-flow equation from some noises, to be read at any time in between.

    start: (B, *S), at times[0]. end: (B, *S), at t = 0, or where the grid ends. cond: of the samples. states, answers:
    (M, B, *S) at times (M,), the queries of the fine solver; None where only the ends were kept.
    """

    def __init__(self, schedule: Schedule, times: Tensor, start: Tensor, end: Tensor, cond: dict[str, Any],
                 states: Tensor | None, answers: Tensor | None) -> None:  # fmt: skip
        self.schedule, self.times, self.start, self.end, self.cond = schedule, times, start, end, cond
        self.states, self.answers = states, answers
        self.angles = torch.atan2(schedule.sigma(times), schedule.alpha(times))

    def __len__(self) -> int:
        return len(self.start)

    def rows(self, part: slice) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """start, end and conditions of some of the samples."""
        return self.start[part], self.end[part], {key: value[part] for key, value in self.cond.items()}

    def at(self, t: Tensor, part: slice) -> Tensor:
        """The states of some samples at a 0-d time within the fine grid, by cubic Hermite interpolation of
        Y = x_t / sqrt(alpha^2 + sigma^2) in phi = atan(sigma / alpha), where dY/dphi = (Y cos phi - x0) / sin phi."""
        assert self.states is not None and self.answers is not None
        alpha, sigma = float(self.schedule.alpha(t)), float(self.schedule.sigma(t))
        phi = math.atan2(sigma, alpha)
        i = int((self.angles >= phi - 1e-12).sum()) - 1
        i = min(max(i, 0), len(self.angles) - 2)
        p0, p1 = float(self.angles[i]), float(self.angles[i + 1])
        h = p1 - p0
        w = min(max((phi - p0) / h, 0.0), 1.0)
        (y0, d0), (y1, d1) = self._slope(i, part), self._slope(i + 1, part)
        value = (1 + 2 * w) * (1 - w) ** 2 * y0 + w**2 * (3 - 2 * w) * y1
        value = value + h * w * (1 - w) ** 2 * d0 - h * w**2 * (1 - w) * d1
        return value * math.hypot(alpha, sigma)

    def _slope(self, i: int, part: slice) -> tuple[Tensor, Tensor]:
        assert self.states is not None and self.answers is not None
        t, phi = self.times[i], float(self.angles[i])
        y = self.states[i, part] / float(self.schedule.prior_std(t))
        return y, (y * math.cos(phi) - self.answers[i, part]) / math.sin(phi)


@torch.no_grad()
def fine_trajectories(denoiser: Any, x: Tensor, cond: dict[str, Any], *, start: float, low: float, end: float,
                      steps: int, batch: int, keep: bool, tick: Any) -> FineTrajectories:  # fmt: skip
    """`steps` of UniPC-3, equal in lam from `start` to `low`, then (where end = 0) one to the clean image.

    x: (B, *S), noise of the level of `start`. keep: the path too, not only its end. tick: `tick(done, total)`.
    """
    schedule = denoiser.schedule
    if end > 0:
        times = UniformLambda(start=start, end=end)(schedule, steps)
    else:
        times = UniformLambda(start=start, low=low)(schedule, steps)
    solver: Any = UniPC(3)
    compiled = plan(solver, schedule, times)
    ends, states, answers = [], [], []
    for first in range(0, len(x), batch):
        part = slice(first, first + batch)
        given = {key: value[part] for key, value in cond.items()}
        path: list[Tensor] = []
        said: list[Tensor] = []

        def ask(x_t: Tensor, t: Tensor, path: list[Tensor] = path, said: list[Tensor] = said, **given: Any) -> Tensor:
            x0 = denoiser(x_t, t, **given)
            if keep:
                path.append(x_t)
                said.append(x0)
            return x0

        ends.append(compiled(ask, x[part], **given))
        if keep:
            states.append(torch.stack(path))
            answers.append(torch.stack(said))
        tick(min(first + batch, len(x)), len(x))
    return FineTrajectories(
        schedule, compiled.times[:-1], x, torch.cat(ends), cond,
        torch.cat(states, 1) if keep else None, torch.cat(answers, 1) if keep else None,
    )  # fmt: skip
