"""The stochastic sampler of distilled students: two steps forward, one step back."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Known, Node, ddim, make_nodes


@dataclass(frozen=True)
class StochasticDistilled(SamplerBase):
    """Every evaluation but the last makes a jump over two steps of the grid, and then noise is added to go one step
    back.

    On times t_0 > t_1 > ... > t_N, with the output x0 at z_k, k = 0 .. N-2,

        y       = alpha_{k+2} x0 + (sigma_{k+2} / sigma_k) (z_k - alpha_k x0)        (DDIM, t_k to t_{k+2})
        z_{k+1} = r y + s xi,    r = alpha_{k+1} / alpha_{k+2},    s^2 = sigma_{k+1}^2 - (r sigma_{k+2})^2

    and from t_{N-1} a plain DDIM step to t_N. With exact jumps every z_k has the distribution of its time, whatever N.
    N = 1 is DDIM; N = 2 from pure noise to the image is the two-step sampler of consistency models.

    It needs a student trained for jumps over two steps (`guided:kind=stochastic`), not one trained for DDIM. On a
    network that was not distilled it is a method of order 1. NFE = steps.

    References:
        Meng, Rombach, Gao, Kingma, Ermon, Ho, Salimans 2023, arXiv:2210.03142.
    """

    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        for r, back, end in zip(path, path[1:], path[2:], strict=False):
            y = ddim(z, Known(r, z, (yield Query(z, r.t))), end)
            z = (back.alpha / end.alpha) * y + renoise_std(end, back) * noise()
        r, end = path[-2:]
        return ddim(z, Known(r, z, (yield Query(z, r.t))), end)


def renoise_std(low: Node, high: Node) -> Tensor:
    """Standard deviation of the noise to add to `(alpha_high / alpha_low) z` so that z, of time `low`, is of `high`."""
    if low.clean:  # whose lam is infinite
        return high.sigma
    return high.sigma * torch.sqrt(-torch.expm1(2 * (high.lam - low.lam)))
