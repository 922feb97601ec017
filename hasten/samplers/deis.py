"""DEIS: exponential integration of the noise prediction with polynomials in a selectable variable."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_choices, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Known, Node, advance, ddim, make_nodes, usable_order


@dataclass(frozen=True)
class DEIS(SamplerBase):
    """Adams-Bashforth for dy/dq = eps (y = z/alpha, q = sigma/alpha) with eps interpolated by a polynomial in
    `variable`:

        y_t = y_0 + sum_j (int_{q_0}^{q_t} l_j dq) eps_j

    The integrals are exact for rho and log_rho, by 24 Gauss points for t. The step into sigma = 0 and the one from
    alpha = 0 are of order 1; the output at alpha = 0 is used later by "t" only (t is finite there). Order as named; NFE
    = steps.

    Args:
        order: 1 to 4.
        variable: "t" (tAB: the schedule's own time), "rho" (rhoAB: q), or "log_rho" (log q = -lam; equal to the
            multistep DPMSolver with predict="eps", variant="taylor").
        lower_order_final: the order falls to 1 over the last steps.

    References:
        Zhang, Chen 2023, arXiv:2204.13902.
    """

    order: int = 3
    variable: str = "t"
    lower_order_final: bool = True
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise BadInput(f"DEIS(order={self.order}): order must be 1, 2, 3 or 4")
        check_choices(self, variable=("t", "rho", "log_rho"))
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        past: list[Known] = []
        for n, (start, end) in enumerate(pairwise(path)):
            past = [Known(start, z, (yield Query(z, start.t))), *past[: self.order - 1]]
            left = len(path) - 1 - n if self.lower_order_final else self.order
            if self.variable == "t" and not (start.pure or end.clean):
                order = min(len(past), left)
            else:
                order = usable_order(past, end, self.order, left)
            if order == 1:
                z = ddim(z, past[0], end)
            elif self.variable == "log_rho":
                z = advance(z, past[:order], end, predict="eps")
            else:
                out = (end.alpha / start.alpha) * z
                for weight, known in zip(self._weights(schedule, past[:order], end), past, strict=False):
                    out = out + (end.alpha * weight) * known.eps
                z = out
        return z

    def _weights(self, schedule: Schedule, past: list[Known], end: Node) -> list[Tensor]:
        """int l_j dq = [l_j q] - int l_j' q: sums to q_t - q_0 exactly, whatever the quadrature."""

        def place(n: Node) -> Tensor:
            return n.t if self.variable == "t" else n.q

        start = past[0].node
        width = place(end) - place(start)
        tau = torch.stack([(place(k.node) - place(start)) / width for k in past])
        powers = torch.arange(len(past), dtype=torch.float64)
        # column j: the coefficients of l_j in tau; tau_0 = 0 and pow(0, 0) has no derivative, so the first row is
        # constant
        rows = torch.stack([torch.ones_like(tau), *(tau**k for k in range(1, len(past)))])
        basis = torch.linalg.solve(rows.T, torch.eye(len(past), dtype=torch.float64))
        points, weights = _gauss(24)
        at = place(start) + width * points
        q = schedule.sigma(at) / schedule.alpha(at) if self.variable == "t" else at
        slopes = powers[1:, None] * points ** (powers[1:, None] - 1)  # d tau^k/d tau, k = 1 ..., at the points
        inner = (weights * q * slopes).sum(1) @ basis[1:]
        first = torch.zeros(len(past), dtype=torch.float64)
        first[0] = 1.0
        return list((basis.sum(0) * end.q - first * start.q - inner).unbind())


@cache
def _gauss(n: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre points and weights on [0, 1], from the eigenvalues of the Jacobi matrix (Golub, Welsch 1969)."""
    with torch.inference_mode(False):  # cached values may be used under autograd later
        k = torch.arange(1, n, dtype=torch.float64)
        off = k / torch.sqrt(4 * k**2 - 1)
        values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
        return (values + 1) / 2, vectors[0] ** 2
