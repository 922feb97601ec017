"""Diffusion bridge implicit models (DBIM): few steps from the source of a bridge, deterministic after the first."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers
from ..processes._pinned import bridge_coefficients, posterior_variance
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ..times import check_times
from ._exponential import g


@dataclass(frozen=True)
class DBIM(SamplerBase):
    """The non-Markovian process with the marginals `N(a y + b x_0, c^2)` of a bridge from its source y. From t to s:

        z_s = a_s y + b_s x0 + sqrt(c_s^2 - rho^2) (z_t - a_t y - b_t x0) / c_t + rho xi

    where rho^2 is `eta`^2 times the variance of the Markovian process. At t = 1, where z = y and c = 0, the first step
    adds the noise `c_s xi` ("booting noise"): a deterministic path out of one point could not reach a distribution.
    With eta = 0 all later steps are deterministic: they are those of DDIM for `z - a y = b x0 + c eps`, and `order` 2
    extrapolates x0 linearly in log(b / c) from the last two evaluations.

    The network should read the source (its input `source`), as for any bridge other than a Markovian one with eta = 1,
    which on an `I2SB` bridge is the sampler `i2sb`. Order 1 or 2; NFE = steps.

    Args:
        eta: 0: deterministic after the first step; 1: the Markovian process; in [0, 1].
        order: 1, or 2 for the multistep method, with eta = 0.

    Raises:
        BadInput: for eta out of range, another order, or order 2 with eta > 0.

    References:
        Zheng, He, Chen, Bao, Zhu 2024, arXiv:2405.15885.
    """

    eta: float = 0.0
    order: int = 1
    linear: ClassVar[bool] = True
    processes: ClassVar[tuple[str, ...]] = ("DDBM", "I2SB")

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.order not in (1, 2):
            raise BadInput(f"dbim has order 1 or 2, found {self.order}")
        if not 0 <= self.eta <= 1:
            raise BadInput(f"dbim needs eta in [0, 1], found {self.eta}")
        if self.order == 2 and self.eta:
            raise BadInput(f"dbim has order 2 for eta=0 only, found eta={self.eta:g}")

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        if not getattr(schedule, "noise", True):
            raise BadInput("dbim needs a bridge with noise, and this one has noise=False: use i2sb")
        times = check_times(times)
        # one by one: a vectorised call would include the infinite derivatives of the ends
        nodes = [(t, *bridge_coefficients(schedule, t)) for t in times.unbind()]
        if times[0].item() != 1:
            raise BadInput(f"dbim begins at the source, t = 1, found t = {times[0].item():g}")
        y, z, previous = x, x, None
        for k, ((t, a, b, c), (s, a_s, b_s, c_s)) in enumerate(zip(nodes, nodes[1:], strict=False)):
            x0 = yield Query(z, t)
            if s.item() == 0:
                return x0
            if k == 0:
                z = a_s * y + b_s * x0 + c_s * noise()
                continue
            rho2 = self.eta**2 * posterior_variance(schedule, t, s)
            keep = torch.sqrt((c_s**2 - rho2).clamp(min=0)) / c
            if self.order == 2 and previous is not None:
                h, last = (torch.log(b_s / c_s) - torch.log(b / c)), torch.log(b / c) - previous[0]
                # the exponential integral of the line through both outputs
                slope = -b_s * g(2, -h)
                z = keep * z + (a_s - keep * a) * y + (b_s - keep * b) * x0 + (slope * h / last) * (x0 - previous[1])
            else:
                z = keep * z + (a_s - keep * a) * y + (b_s - keep * b) * x0
            previous = (torch.log(b / c), x0)
            if self.eta:
                z = z + torch.sqrt(rho2) * noise()
        return z
