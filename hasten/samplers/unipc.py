"""UniPC: a multistep predictor with a corrector that costs no evaluation."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from ..errors import BadInput, check_choices, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Known, advance, from_pure, make_nodes, usable_order


@dataclass(frozen=True)
class UniPC(SamplerBase):
    """Unified predictor-corrector: exponential Adams-Bashforth in lam, then Adams-Moulton with the output at the
    predicted point.

    With r_i = (lam_i - lam_0)/h, D_i = (m_i - m_0)/r_i, and H, c, base, g_k as in DPMSolver:

        z_t = base z_0 - c (g_1 m_0 + sum_i rho_i D_i),     sum_i rho_i r_i^{k-1} = k! g_{k+1},   k = 1, 2, ...

    Predictor of order p: the p-1 earlier nodes. Corrector: those and the new node (r = 1), which makes order p + 1; its
    evaluation is used as the next m_0 rather than repeated at the corrected state, and the last step is not corrected.
    The order is min(order, step + 1). From alpha = 0 the step is of order 1 and its corrector is the trapezoidal rule
    in alpha/sigma (the limit of bh2); such a node is not interpolated through.

    Order p, and p + 1 with the corrector, given starting values of that accuracy: the first step is of order 1 (2 when
    corrected), which caps the order at 2 (3) on ordinary grids. NFE = steps.

    Args:
        order: p, 1 to 4.
        variant: "bh1" or "bh2". It matters only where a single difference is used (predictor 2, corrector 1, hence also
            in the first steps): its weight is H/2 or expm1(H)/2.
        corrector: whether to correct.
        lower_order_final: the order is at most the number of remaining steps.
        predict: "x0" or "eps".

    References:
        Zhao, Bai, Rao, Zhou, Lu 2023, arXiv:2302.04867.
    """

    order: int = 2
    variant: str = "bh2"
    corrector: bool = True
    lower_order_final: bool = True
    predict: str = "x0"
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise BadInput(f"UniPC(order={self.order}): order must be 1, 2, 3 or 4")
        check_choices(self, variant=("bh1", "bh2"), predict=("x0", "eps"))
        check_numbers(self)

    @property
    def convergence(self) -> int:
        """The measured order of convergence, after exact starting values: the corrector adds one."""
        return self.order + self.corrector

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        past: list[Known] = []
        base, order = x, 0  # the corrected state before the step that led to z, and that step's order
        for n, (start, end) in enumerate(pairwise(path)):
            known = Known(start, z, (yield Query(z, start.t)))
            if self.corrector and past:
                if past[0].node.pure:
                    z = from_pure(base, past[0], known)
                else:
                    z = advance(base, [*past[:order], known], start, predict=self.predict, half=self.variant)
            past = [known, *past[: self.order - 1]]
            order = usable_order(past, end, self.order, len(path) - 1 - n if self.lower_order_final else None)
            base, z = z, advance(z, past[:order], end, predict=self.predict, half=self.variant)
        return z
