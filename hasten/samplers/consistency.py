"""Multistep sampling of a consistency model: estimate the clean sample, add fresh noise, estimate again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import make_nodes


@dataclass(frozen=True)
class Consistency(SamplerBase):
    """Multistep consistency sampling: only the output is carried from one step to the next.

        z_s = alpha_s x0 + sigma_s xi,     x0 the output at z_t, t > s, xi fresh noise; the last output at t = 0

    For networks whose output at every time is a *sample*, the end of the path through z_t: consistency models, and
    others trained on their own renoised outputs. z_s is then distributed as the data with noise at every node, and more
    steps only correct errors of the network; it is meant for few steps, such as 1, 2 or 4, on the grid "angle". With an
    ordinary denoiser, whose output is a mean, variance is lost at each step: order of convergence 0. NFE = steps.

    References:
        Song, Dhariwal, Chen, Sutskever 2023, arXiv:2303.01469, algorithm 1.
    """

    linear: ClassVar[bool] = True
    order: ClassVar[int] = 0

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        for t, s in zip(path, path[1:], strict=False):
            x0 = yield Query(z, t.t)
            z = s.alpha * x0 if s.clean else s.alpha * x0 + s.sigma * noise()
        return z
