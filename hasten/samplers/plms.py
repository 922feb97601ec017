"""PLMS: linear multistep with the weights of a uniform grid."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from ..errors import BadInput, check_choices, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Known, ddim, from_pure, make_nodes

_ADAMS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class PLMS(SamplerBase):
    """Pseudo linear multistep: the DDIM step with eps replaced by an Adams-Bashforth combination of the last outputs.

        z_t = (alpha_t/alpha_0) z_0 + (sigma_t - alpha_t sigma_0/alpha_0) eps',
        eps' = (3 eps_0 - eps_1)/2,  (23, -16, 5)/12,  (55, -59, 37, -9)/24   for order 2, 3, 4

    The weights are those of nodes uniform in q = sigma/alpha, where the order is as named after exact starting values;
    on grids uniform in t, for which the method is meant, the DDIM step is not linear in t and the order is 2
    ("pseudo").

    Args:
        order: 1 to 4.
        start: "heun": the first step is repeated with the mean of the noise at its two ends (NFE = steps + 1), from
            alpha = 0 by the trapezoidal rule in alpha/sigma; "ramp": the order rises 1, 2, 3, 4 with no extra
            evaluation (NFE = steps; this is iPNDM).
        lower_order_final: on a grid that ends at sigma = 0 the order is at most the number of steps before the last
            one, and that one is of order 1 (NFE = steps with 2 steps). With 2 or 3 steps the method as published gives
            noise.

    References:
        Liu, Ren, Lin, Zhao 2022, arXiv:2202.09778; ramp: Zhang, Chen 2023, arXiv:2204.13902.
    """

    order: int = 4
    start: str = "heun"
    lower_order_final: bool = False
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise BadInput(f"PLMS(order={self.order}): order must be 1, 2, 3 or 4")
        check_choices(self, start=("heun", "ramp"))
        check_numbers(self)

    @property
    def convergence(self) -> int:
        """The order of convergence on grids uniform in t."""
        return min(self.order, 2)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps + (self.start == "heun" and self.order > 1 and steps > 1 + self.lower_order_final)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        past: list[Known] = []
        twice = self.nfe(len(path) - 1) == len(path)
        for n, (start, end) in enumerate(pairwise(path)):
            past = [Known(start, z, (yield Query(z, start.t))), *past[: self.order - 1]]
            order = len(past)
            if self.lower_order_final and path[-1].clean:
                order = max(1, min(order, len(path) - 2 - n))
            terms = list(zip(_ADAMS[order - 1], past, strict=False))
            if n == 0 and twice:
                predicted = ddim(z, past[0], end)
                second = Known(end, predicted, (yield Query(predicted, end.t)))
                if start.pure:
                    z = from_pure(z, past[0], second)
                    continue
                terms = [(0.5, past[0]), (0.5, second)]
            if start.pure or len(terms) == 1:
                z = ddim(z, past[0], end)
                continue
            out = (end.alpha / start.alpha) * z
            slope = -end.alpha * start.q if end.clean else end.sigma - end.alpha * start.q
            for weight, known in terms:
                out = out + (slope * weight) * known.eps
            z = out
        return z
