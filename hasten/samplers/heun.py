"""The second-order sampler of EDM."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Known, Node, ddim, from_pure, make_node, make_nodes


@dataclass(frozen=True)
class Heun(SamplerBase):
    """Heun's method in the coordinate y = z/alpha with level q = sigma/alpha, and noise added before each step
    ("churn").

        gamma = min(churn/N, sqrt(2) - 1)  where churn_min <= q <= churn_max, else 0
        q^ = q (1 + gamma),   y^ = y + sqrt(q^^2 - q^2) churn_noise xi,   d = (y^ - x0(y^, q^))/q^
        y' = y^ + (q_next - q^) d,   d' = (y' - x0(y', q_next))/q_next,   y_next = y^ + (q_next - q^) (d + d')/2

    The last step, into q = 0, is x0 itself. q^ is at most the noisiest level of the schedule. From alpha = 0, where y
    does not exist, the step is the trapezoidal rule in alpha/sigma, also with two evaluations. Order 2 (in law with
    churn); NFE = 2 steps - 1 on a grid that ends at sigma = 0, 2 steps on one that does not.

    Args:
        churn: at least 0; 0 is deterministic.
        churn_min, churn_max: the range of q where noise is added.
        churn_noise: factor on the standard deviation of the noise, at least 0.
        lower_order_final: on a grid that ends at sigma = 0 the step before the last is Euler's too, one evaluation
            less. With 2 or 3 steps the method as published multiplies the error of d' by q / q_next, and the result is
            noise.

    References:
        Karras, Aittala, Aila, Laine 2022, arXiv:2206.00364, algorithm 2.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    lower_order_final: bool = False
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.churn < 0 or not 0 <= self.churn_min <= self.churn_max or self.churn_noise < 0:
            raise BadInput(f"{self}: churn and churn_noise must not be negative, and 0 <= churn_min <= churn_max")
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return 2 * steps - 1 - (self.lower_order_final and steps > 1)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        top = make_node(schedule, torch.as_tensor(schedule.t_max, dtype=torch.float64))
        lowered = len(path) - 3 if self.lower_order_final and path[-1].clean else -1
        for n, (start, end) in enumerate(zip(path, path[1:], strict=False)):
            start, z = self._churn(schedule, start, z, top, len(path) - 1, noise)
            first = Known(start, z, (yield Query(z, start.t)))
            euler = ddim(z, first, end)
            if end.clean or n == lowered:
                z = euler
                continue
            second = Known(end, euler, (yield Query(euler, end.t)))
            if start.pure:
                z = from_pure(z, first, second)
            else:
                half = 0.5 * end.alpha * (end.q - start.q)
                z = (end.alpha / start.alpha) * z + half * first.eps + half * second.eps
        return z

    def _churn(
        self, schedule: Schedule, at: Node, z: Any, top: Node, count: int, noise: Callable[[], Any]
    ) -> tuple[Node, Any]:
        """The node and the state after the noise of a step is added."""
        if not self.churn or at.pure or not self.churn_min <= at.q.item() <= self.churn_max:
            return at, z
        up = min(self.churn / count, math.sqrt(2) - 1)
        lam = at.lam - math.log1p(up)
        if lam.item() <= top.lam.item():
            if at.lam.item() <= top.lam.item():
                return at, z
            lam = top.lam
        back = schedule.time(lam)
        higher = Node(back, schedule.alpha(back), schedule.sigma(back), lam)
        std = higher.alpha * at.q * torch.sqrt(torch.expm1(2 * (at.lam - lam))) * self.churn_noise
        return higher, (higher.alpha / at.alpha) * z + std * noise()
