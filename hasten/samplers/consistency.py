"""Multistep sampling of a consistency model: guess the clean sample, add fresh noise, guess again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..sampling import Query
from ..schedules.base import Schedule
from ._exponential import make_nodes


@dataclass(frozen=True)
class Consistency:
    """Multistep consistency sampling: what is kept from one step to the next is the answer alone.

        z_s = alpha_s x0 + sigma_s xi,     x0 the answer at z_t, t > s, xi fresh noise; the last answer at t = 0

    For networks whose answer at every time is a *sample*, the end of the path through z_t: consistency models, and
    others whose training renoises their own answers. The law of z_s is then that of the data with noise at every node,
    and more steps only correct what the network gets wrong; few, such as 1, 2 or 4, on the grid "angle", are what it is
    for. With an ordinary denoiser, whose answer is a mean, variance is lost at each step: order of convergence 0.
    NFE = steps.

    Reference: Song, Dhariwal, Chen, Sutskever 2023, 2303.01469, algorithm 1.
    """

    linear: ClassVar[bool] = True
    order: ClassVar[int] = 0

    def nfe(self, steps: int) -> int:
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        path, z = make_nodes(schedule, times), x
        for t, s in zip(path, path[1:], strict=False):
            x0 = yield Query(z, t.t)
            z = s.alpha * x0 if s.clean else s.alpha * x0 + s.sigma * noise()
        return z
