"""SA-Solver: stochastic Adams methods, from the probability-flow ODE to any amount of noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Known, Node, g, make_node, make_nodes, solve, usable_order


@dataclass(frozen=True)
class SASolver(SamplerBase):
    """Stochastic Adams predictor and corrector for the family of diffusion SDEs with noise strength tau(t) >= 0.

    Every tau has the marginals of the schedule: 0 is the probability-flow ODE, 1 the reversed diffusion. With m the
    outputs x0, l_j their Lagrange polynomials in lam, h = lam_t - lam_0 and Lam = int tau^2 dlam over the step, tau^2 =
    Lam/h,

        z_t = (sigma_t/sigma_0) e^{-Lam} z_0 + sum_j b_j m_j + sigma_t sqrt(1 - e^{-2 Lam}) xi
        b_j = (1 + tau^2) sigma_t e^{-tau^2 lam_t} int_{lam_0}^{lam_t} e^{(1 + tau^2) lam} l_j(lam) dlam

    The paper evaluates tau at one time of the step; here it is the root mean square over the step, which is the same
    away from `tau_low` and `tau_high`, gives every grid the noise of the interval and is continuous in times.

    The step into sigma = 0 and the one from alpha = 0 are always of order 1 (the latter's corrector: the trapezoidal
    rule in alpha/sigma); such nodes are not interpolated through. Convergence order: `order`, or min(corrector, order +
    1) with a corrector, given starting values of that accuracy; with noise at most 2, in law: the outputs along a noisy
    path are not smooth. tau = 0 is DPM-Solver++ and UniPC (corrector = order + 1) with exact weights; tau = 1, order 1
    without corrector is DDPM with the small variance. NFE = steps.

    Args:
        order: of the predictor, 1 to 4: the number of outputs, the newest and older ones.
        corrector: 0 for none, else the number of outputs, 1 to 5, of which one is that at the predicted point (it costs
            no evaluation: it is used as the next m_0, and the step is repeated with the same xi). The paper uses (3, 4)
            without guidance and (2, 2) with it.
        tau: on tau_low <= t <= tau_high, 0 elsewhere. The paper uses 1 on [.2, .8] of its linear schedule, and less for
            very few steps.
        tau_low, tau_high: 0 <= tau_low < tau_high <= 1.
        lower_order_final: the order falls to 1 over the last steps.

    References:
        Xue, Yi, Luo, Zhang, Sun, Li, Ma 2023, arXiv:2309.05019.
    """

    order: int = 3
    corrector: int = 4
    tau: float = 1.0
    tau_low: float = 0.2
    tau_high: float = 0.8
    lower_order_final: bool = True
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise BadInput(f"SASolver(order={self.order}): order must be 1, 2, 3 or 4")
        if self.corrector not in (0, 1, 2, 3, 4, 5):
            raise BadInput(f"SASolver(corrector={self.corrector}): corrector must be 0 (none), 1, 2, 3, 4 or 5")
        if not 0 <= self.tau < math.inf:
            raise BadInput(f"SASolver(tau={self.tau}): tau must be 0 or more; 0 is deterministic, 1 the reversed SDE")
        if not 0 <= self.tau_low < self.tau_high <= 1:
            found = f"SASolver(tau_low={self.tau_low}, tau_high={self.tau_high})"
            raise BadInput(f"{found}: needs 0 <= tau_low < tau_high <= 1")
        check_numbers(self)

    @property
    def convergence(self) -> int:
        """The measured order of convergence after exact starting values, in law where there is noise."""
        best = min(self.corrector, self.order + 1) if self.corrector else self.order
        return best if self.tau == 0 else min(best, 2)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        noisy = [make_node(schedule, torch.tensor(t, dtype=torch.float64)).lam for t in (self.tau_high, self.tau_low)]
        past: list[Known] = []
        carried, Lam, limit = x, torch.zeros(()), 0  # of the step to z: its part without outputs, Lam, order
        for n, (start, end) in enumerate(pairwise(path)):
            known = Known(start, z, (yield Query(z, start.t)))
            if past and self.corrector:
                z = carried + _weighted_outputs(
                    [*past[: min(limit, self.corrector - 1)], known], past[0].node, start, Lam
                )
            past = [known, *past[: max(self.order, self.corrector - 1) - 1]]
            if end.clean:
                return end.alpha * known.x0
            Lam = self._noise(start, end, noisy)
            carried = (end.sigma / start.sigma * torch.exp(-Lam)) * z
            if Lam.item() > 0:
                carried = carried + (end.sigma * torch.sqrt(-torch.expm1(-2 * Lam))) * noise()
            limit = usable_order(past, end, len(past), len(path) - 1 - n if self.lower_order_final else None)
            z = carried + _weighted_outputs(past[: min(limit, self.order)], start, end, Lam)
        return z

    def _noise(self, start: Node, end: Node, noisy: list[Tensor]) -> Tensor:
        """`int tau^2 dlam` from `start` to `end`; infinite from pure noise where tau > 0 there."""
        if self.tau == 0:
            return torch.zeros((), dtype=torch.float64)
        inside = torch.minimum(end.lam, noisy[1]) - torch.maximum(start.lam, noisy[0])
        return self.tau**2 * inside.clamp(min=0)


def _weighted_outputs(known: Sequence[Known], start: Node, end: Node, Lam: Tensor) -> Any:
    """`sum_j b_j m_j` over the outputs in `known`: the newest at or before `start` first, unless it is one at `end`."""
    if start.pure:  # constant, or the trapezoid in alpha/sigma
        weights = [end.alpha / len(known)] * len(known)
    else:
        h = end.lam - start.lam
        H = -(h + Lam)  # -(1 + tau^2) h
        weights = [g(1, H)]
        if len(known) > 1:
            ratios = [(k.node.lam - start.lam) / h for k in known[1:]]
            rho = [p / r for p, r in zip(solve(ratios, [g(k + 2, H) for k in range(len(ratios))]), ratios)]
            weights = [weights[0] - sum(rho), *rho]
        weights = [-end.alpha * weight for weight in weights]
    total = weights[0] * known[0].x0
    for weight, k in zip(weights[1:], known[1:]):
        total = total + weight * k.x0
    return total
