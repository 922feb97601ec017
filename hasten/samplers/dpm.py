"""DPM-Solver and DPM-Solver++, multistep and singlestep, deterministic and stochastic."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from ..errors import BadInput, check_choices, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import Known, Node, advance, make_nodes, usable_order


@dataclass(frozen=True)
class DPMSolver(SamplerBase):
    """Exponential integrators in lam = log(alpha/sigma): DPM-Solver (predict="eps") and DPM-Solver++ (predict="x0").

    With m the predicted output, h the step in lam, H = -h and c = alpha_t, base = sigma_t/sigma_0 ("x0") or H = h and
    c = sigma_t, base = alpha_t/alpha_0 ("eps"), and g_1 = expm1(H), g_{k+1} = g_k/H - 1/k!:

        z_t = base z_0 - c (g_1 m_0 + g_2 D1 + g_3 D2),     D1 = h m', D2 = h^2 m'' by divided differences

    The step into sigma = 0 and the one from alpha = 0 are always of order 1, and a node with alpha = 0 is not
    interpolated through: the order rises again from the node after it. Order as named, but 2 for third="compat" and, in
    law, for sde; NFE = steps.

    Args:
        order: 1 to 3.
        multistep: differences are taken from the earlier nodes, one evaluation per step. False, singlestep: the grid is
            split into groups of `order` steps (3, 3, ..., then 2 or 1 so that the evaluations number exactly `steps`);
            the nodes inside a group are the inner stages of a Runge-Kutta step over the group, so they need not be at
            1/2 or 1/3, 2/3.
        predict: "x0" or "eps".
        sde: H = -2h and base (sigma_t/sigma_0) e^{-h} with noise sigma_t sqrt(1 - e^{-2h}) xi ("x0"), or twice the
            weights with noise sigma_t sqrt(e^{2h} - 1) xi ("eps"). Order 1 equals DDPM with the small variance.
            Multistep only.
        lower_order_final: the order falls to 1 over the last steps.
        third: "true": third order. "compat": half the D2 term, as in the authors' code and its descendants: order 2,
            but damped, and often better at 15 steps or fewer. Multistep only.
        variant: "midpoint" uses g_1/2 for g_2 in second-order steps (singlestep third order: only the last stage is
            differenced, which needs inner nodes near 1/3 and 2/3 in lam); "taylor" has the exact weights for any nodes.

    References:
        Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095.
    """

    order: int = 2
    multistep: bool = True
    predict: str = "x0"
    sde: bool = False
    lower_order_final: bool = True
    third: str = "true"
    variant: str = "midpoint"
    linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise BadInput(f"DPMSolver(order={self.order}): order must be 1, 2 or 3")
        check_choices(self, predict=("x0", "eps"), third=("true", "compat"), variant=("midpoint", "taylor"))
        if self.sde and not self.multistep:
            raise BadInput("DPMSolver(sde=True, multistep=False): the stochastic form is multistep; use multistep=True")
        check_numbers(self)

    @property
    def convergence(self) -> int:
        """The measured order of convergence, where it is not `order`."""
        return min(self.order, 2) if self.sde or (self.third == "compat" and self.multistep) else self.order

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path = make_nodes(schedule, times)
        half = "bh2" if self.variant == "midpoint" else None
        return (yield from self._multistep(path, x, noise, half) if self.multistep else self._singlestep(path, x, half))

    def _multistep(
        self, path: list[Node], z: Any, noise: Callable[[], Any], half: str | None
    ) -> Generator[Query, Any, Any]:
        """The multistep form."""
        past: list[Known] = []
        damp = 0.5 if self.third == "compat" else 1.0
        for n, (start, end) in enumerate(pairwise(path)):
            past = [Known(start, z, (yield Query(z, start.t))), *past[: self.order - 1]]
            order = usable_order(past, end, self.order, len(path) - 1 - n if self.lower_order_final else None)
            draw = noise() if self.sde and not end.clean else None
            z = advance(z, past[:order], end, predict=self.predict, sde=self.sde, noise=draw, half=half, damp=damp)
        return z

    def _singlestep(self, path: list[Node], z: Any, half: str | None) -> Generator[Query, Any, Any]:
        """The singlestep form."""
        first = 0
        for order in groups(len(path) - 1, self.order, path[0].pure, path[-1].clean):
            known: list[Known] = []
            state = z
            for k in range(order):
                at, end = path[first + k], path[first + k + 1]
                known.append(Known(at, state, (yield Query(state, at.t))))
                used = known[:1] + known[2:] if half and k == 2 else known
                state = advance(z, used, end, predict=self.predict, half=half if order == 2 else None)
            z, first = state, first + order
        return z


def groups(steps: int, order: int, pure: bool, clean: bool) -> list[int]:
    """Orders of the singlestep groups, summing to `steps`; the first is 1 from alpha = 0, the last 1 into sigma = 0."""
    if pure and steps > 1 and order > 1:
        return [1, *groups(steps - 1, order, False, clean)]
    full, rest = divmod(steps, order)
    sizes = [order] * full + [rest] * (rest > 0)
    if order == 3 and rest == 0:
        sizes = [3] * (full - 1) + [2, 1]
    if clean and sizes[-1] > 1:
        sizes = [*sizes[:-1], sizes[-1] - 1, 1]
    return sizes
