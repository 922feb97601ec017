"""Common parts of the multistep and Runge-Kutta samplers: nodes, the functions g_k, and one exponential step.

Every sampler of this folder integrates one of two exact forms of the probability-flow equation,
with lam = log(alpha/sigma):

    data form    d(z/sigma) = exp(lam)  x0(lam)  dlam            kernel H = -h,  c = alpha_t,  base = sigma_t/sigma_0
    noise form   d(z/alpha) = -exp(-lam) eps(lam) dlam           kernel H = +h,  c = sigma_t,  base = alpha_t/alpha_0

from (alpha_0, sigma_0) to (alpha_t, sigma_t), h = lam_t - lam_0. With the model output m interpolated by a
polynomial in lam,

    z_t = base z_0 - c (g_1 m_0 + g_2 D^1 + g_3 D^2 + ...),    g_k = sum_{j>=1} H^j / (j+k-1)!,

where D^k is h^k times the k-th derivative at lam_0 of the polynomial through the known outputs. (Lu et al. 2022,
2211.01095; Zhao et al. 2023, 2302.04867.) The stochastic data form has H = -2h and base = (sigma_t/sigma_0) exp(-h).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedules.base import Schedule
from ..times import check_times


class Node(NamedTuple):
    """A time with its coefficients, 0-d float64 tensors. `lam` is +-inf (a constant) where sigma or alpha is 0."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor

    @property
    def clean(self) -> bool:
        """Whether sigma is exactly 0."""
        return math.isinf(self.lam.item()) and self.lam.item() > 0

    @property
    def pure(self) -> bool:
        """Pure noise: alpha is exactly 0 (Flow and zero-terminal-SNR schedules at t = 1)."""
        return math.isinf(self.lam.item()) and self.lam.item() < 0

    @property
    def q(self) -> Tensor:
        """Noise level in the coordinate y = z/alpha."""
        return self.sigma / self.alpha


def make_node(schedule: Schedule, t: Tensor) -> Node:
    """The node at one 0-d time. lam is not evaluated at an end, so that no infinite derivative enters the graph."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if sigma.item() == 0 or alpha.item() == 0:
        return Node(t, alpha, sigma, torch.tensor(math.inf if sigma.item() == 0 else -math.inf, dtype=torch.float64))
    return Node(t, alpha, sigma, schedule.lam(t))


def make_nodes(schedule: Schedule, times: Tensor) -> list[Node]:
    """All nodes of a grid. Where its times require gradients they are computed one by one: a vectorised call would
    include the infinite derivatives of the ends.
    """
    times = check_times(times).double()
    if times.requires_grad:
        return [make_node(schedule, t) for t in times.unbind()]
    alpha, sigma, lam = schedule.alpha(times), schedule.sigma(times), schedule.lam(times)
    if alpha.requires_grad or sigma.requires_grad:  # a schedule with parameters of its own
        return [make_node(schedule, t) for t in times.unbind()]
    lam = torch.where(sigma == 0, math.inf, torch.where(alpha == 0, -math.inf, lam))
    return [Node(*each) for each in zip(times.unbind(), alpha.unbind(), sigma.unbind(), lam.unbind(), strict=True)]


class Known(NamedTuple):
    """A model output `x0` (B, *S) at the state `z` of a node."""

    node: Node
    z: Any
    x0: Any

    @property
    def eps(self) -> Any:
        """The noise in z."""
        return (1 / self.node.sigma) * self.z - (self.node.alpha / self.node.sigma) * self.x0


def g(k: int, H: Tensor) -> Tensor:
    """g_k(H) = sum_{j>=1} H^j/(j+k-1)!: g_1 = expm1(H), g_{k+1} = g_k/H - 1/k!; for small |H|, where that cancels, the
    series."""
    if k == 1:
        return torch.expm1(H)
    if abs(H.item()) < 1:
        total = torch.zeros_like(H)
        for j in range(20, 0, -1):
            total = H * (total + 1 / math.factorial(j + k - 1))
        return total
    return g(k - 1, H) / H - 1 / math.factorial(k - 1)


def solve(ratios: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
    """Weights rho_i of D_i = (m_i - m_0)/r_i in sum_k moments_k D^k, D^k derivatives of the interpolant."""
    matrix = torch.stack([torch.stack([r**k / math.factorial(k + 1) for r in ratios]) for k in range(len(ratios))])
    return list(torch.linalg.solve(matrix, torch.stack(list(moments))).unbind())


def ddim(z: Any, known: Known, end: Node) -> Any:
    """z_t = (sigma_t/sigma_0) z + (alpha_t - sigma_t alpha_0/sigma_0) x0: order 1, finite at both ends."""
    if end.clean:  # sigma_t = 0, whose derivative may be infinite, must not be touched
        return end.alpha * known.x0
    ratio = end.sigma / known.node.sigma
    return ratio * z + (end.alpha - ratio * known.node.alpha) * known.x0


def from_pure(z: Any, first: Known, second: Known) -> Any:
    """From alpha = 0, the trapezoid in alpha/sigma: z_t = (sigma_t/sigma_0) z + alpha_t (m_0 + m_t)/2, order 2."""
    end = second.node
    return (end.sigma / first.node.sigma) * z + (0.5 * end.alpha) * first.x0 + (0.5 * end.alpha) * second.x0


def advance(
    z: Any,
    known: Sequence[Known],
    end: Node,
    *,
    predict: str = "x0",
    sde: bool = False,
    noise: Any = None,
    half: str | None = None,
    damp: float = 1.0,
) -> Any:
    """One exponential step of order len(known) from the state `z` at known[0].node to `end`.

    Steps from alpha = 0 and into sigma = 0 are of order 1.

    Args:
        z: the state.
        known: the base first, then the other interpolation nodes, on either side of it and all with finite lam unless
            the step is of order 1.
        end: the node to step to.
        predict: "x0" or "eps".
        sde: the stochastic form.
        noise: its draw.
        half: None for exact weights, "bh1" or "bh2" for weight H/2 or expm1(H)/2 on the difference when there is one
            ("bh2" is also the midpoint rule of DPM-Solver).
        damp: factor on the second derivative (1/2 is the common implementation of DPM-Solver++ 3M).
    """
    start = known[0].node
    if start.pure or end.clean:
        if sde and not end.clean:  # the posterior of pure noise does not depend on z
            return end.alpha * known[0].x0 + end.sigma * noise
        return ddim(z, known[0], end)
    h = end.lam - start.lam
    if predict == "x0":
        H, c, base = (-2 * h if sde else -h), end.alpha, end.sigma / start.sigma
        outputs = [k.x0 for k in known]
        std = torch.sqrt(-torch.expm1(-2 * h)) if sde else None
        base = base * torch.exp(-h) if sde else base
    else:
        H, c, base = h, (2 * end.sigma if sde else end.sigma), end.alpha / start.alpha
        outputs = [k.eps for k in known]
        std = torch.sqrt(torch.expm1(2 * h)) if sde else None
    weights = [g(1, H)]
    if len(known) > 1:
        ratios = [(k.node.lam - start.lam) / h for k in known[1:]]
        if half and len(ratios) == 1:
            rho = [0.5 * (H if half == "bh1" else g(1, H))]
        else:
            moments = [g(k + 2, H) * (damp if k == 1 else 1.0) for k in range(len(ratios))]
            rho = solve(ratios, moments)
        rho = [p / r for p, r in zip(rho, ratios, strict=True)]
        weights = [weights[0] - sum(rho), *rho]
    out = base * z
    for weight, output in zip(weights, outputs, strict=True):
        out = out - (c * weight) * output
    return out if std is None else out + (end.sigma * std) * noise


def usable_order(past: Sequence[Known], end: Node, order: int, remaining: int | None = None) -> int:
    """The order of a multistep step: at most the outputs of finite lam, at most the remaining steps, 1 at ends."""
    if past[0].node.pure or end.clean:
        return 1
    finite = next((i for i, k in enumerate(past) if k.node.pure), len(past))
    return min(order, finite, order if remaining is None else remaining)
