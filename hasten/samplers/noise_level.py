"""DDIM on a list of noise levels that is made anew during sampling, from how much noise is really left."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_numbers, nearest
from ..predictions import spread
from ..sampling import Query
from ..schedules.base import Schedule
from ..times import check_times

FAMILIES = ("linear", "fibonacci", "times")
MOST = 0.999  # of a beta
LEAST_ABAR, MOST_ABAR = 1e-5, 0.9999  # an estimate outside says only that it is outside
HALVINGS = 200  # at most; the free number may be tiny, as a Fibonacci series grows


@dataclass(frozen=True)
class NoiseLevel:
    """DDIM with the noise level of every sample estimated between the steps, and the rest of its steps laid out anew.

    On the variance-preserving path z = sqrt(abar) x + sqrt(1 - abar) e, on to which the states of any schedule are
    scaled, with P the model's part "noise_level" (tuned by `--method noise_level`) and n steps left after a step:

        abar^ = P(z),    beta_0 .. beta_{n-1} of the family with prod (1 - beta_i) = abar^,    next levels
        abar_k = prod_{i<k} (1 - beta_i),  k = n - 1, ..., 1, 0

    so the network is asked n times, first at abar^ and last at 1 - beta_0. Each sample has a list of its own.

    family: "linear": beta_i = beta_0 + i w. "fibonacci": beta_{i+2} = beta_{i+1} + beta_i. In both the free number is
        found by bisection of log prod (the paper's first-order formulas miss a product of .3 by 21 % at 6 steps), betas
        being at most .999; an abar^ so near 1 that beta_0 forbids it is met with a smaller one. "times", not in the
        paper: the levels of the grid, of which the part that is left is stretched in lam so that it begins at abar^.
    The first two use of the grid its first time and its length; a start below abar = 1e-5 counts as that.
    beta: beta_0. eta: of DDIM; 1 is ancestral sampling.
    updates: after which steps (1 is the first) to estimate; None: all. (): never, which needs no part.

    An estimate is not believed where it is saturated (abar^ <= 1e-5 or >= .9999): that sample keeps its list. It is
    never less than abar before the step. Order 1, if the estimate is exact; NFE = steps; P costs about nothing.

    Reference: San Roman, Nachmani, Wolf 2021, 2104.02600. Errors: BadInput without the part, or for a grid that does
    not end at 0.
    """

    family: str = "linear"
    eta: float = 0.0
    beta: float = 1e-4
    updates: tuple[int, ...] | None = None
    estimator: Any = field(default=None, repr=False, metadata={"bound": True})
    linear: ClassVar[bool] = False
    order: ClassVar[int] = 1
    needs: ClassVar[str] = "noise_level"
    why: ClassVar[str] = "its noise levels follow an estimate made on each sample"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise BadInput(f"noise_level: family={self.family!r}: {nearest(str(self.family), FAMILIES)}")
        if not 0 <= self.eta <= 1:
            raise BadInput(f"noise_level: eta={self.eta} must lie in [0, 1]")
        if not 0 < self.beta < 0.1:
            raise BadInput(f"noise_level: beta={self.beta} must lie in (0, .1): it is the last, smallest step")
        if any(k < 1 for k in self.updates or ()):
            raise BadInput(f"noise_level: updates={self.updates}: steps are counted from 1; () is none, none is all")
        check_numbers(self)

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> NoiseLevel:
        """With the model's part "noise_level"; BadInput without it, unless `updates` is ()."""
        if self.updates == ():
            return self
        if "noise_level" not in parts:
            advice = "run hasten tune MODEL --method noise_level --data IMAGES"
            raise BadInput(f"noise_level needs the model's noise estimator: {advice}")
        return replace(self, estimator=parts["noise_level"])

    def nfe(self, steps: int) -> int:
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        times = check_times(times.detach()).double()
        n, B = len(times) - 1, len(x)
        if times[-1] != 0:
            raise BadInput(f"noise_level needs a grid that ends at t = 0, found {float(times[-1]):g}")
        if self.estimator is None and self.updates != ():
            self.bind({}, {})
        grid = log_abar(schedule.lam(times[:-1]))  # (n,)
        z = x / float(schedule.prior_std(times[0]))
        level, t = grid[:1].expand(B), times[:1].expand(B)
        ahead = self.levels(grid[:1], grid).expand(B, n - 1)
        for left in range(n - 1, -1, -1):
            x0 = yield Query(spread(schedule.prior_std(t), z) * z, t)
            if not left:
                return x0
            before, level, ahead = level, ahead[:, 0], ahead[:, 1:]
            z = self._step(z, x0, before, level, noise)
            if self.updates is None or n - left in self.updates:
                seen = torch.log(self.estimator(z).detach().cpu().double())
                sure = (seen > math.log(LEAST_ABAR)) & (seen < math.log(MOST_ABAR))
                level = torch.where(sure, torch.maximum(seen, before), level)
                ahead = torch.where(sure[:, None], self.levels(level, grid[n - left :]), ahead)
            t = schedule.time(lam(level))
        return None  # not reached

    def levels(self, start: Tensor, grid: Tensor) -> Tensor:
        """log abar after each of the steps that are left but the last, which ends clean: (B, n - 1).

        start: (B,), log abar now. grid: (n,), log abar of the caller's grid, now and at the times after it.
        """
        if self.family == "times":
            nodes, now = lam(grid), lam(start)[:, None]
            if torch.isinf(nodes[0]):  # pure noise is where the grid says it is
                return grid[None, 1:].expand(len(start), -1)
            share = (nodes[-1] - nodes[1:]) / (nodes[-1] - nodes[0])
            return log_abar(torch.maximum(nodes[-1] - share * (nodes[-1] - now), now))
        made = betas(start.clamp(min=math.log(LEAST_ABAR)), len(grid), self.family, self.beta)
        return torch.log1p(-made).cumsum(1)[:, :-1].flip(1)

    def _step(self, z: Tensor, x0: Tensor, start: Tensor, end: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """One DDIM step on the variance-preserving path; start and end are log abar, (B,)."""
        (a, s), (a1, s1) = [(torch.exp(0.5 * g), torch.sqrt(-torch.expm1(g))) for g in (start, end)]
        decay = a * s1 / (a1 * s)
        fresh = self.eta * torch.sqrt(((1 - decay) * (1 + decay)).clamp(min=0))
        ratio = s1 * torch.sqrt(1 - fresh**2) / s
        z = spread(ratio, z) * z + spread(a1 - ratio * a, z) * x0
        return z + spread(s1 * fresh, z) * noise() if self.eta else z


def betas(target: Tensor, n: int, family: str, beta: float) -> Tensor:
    """beta_0 .. beta_{n-1} with `sum log(1 - beta_i) = target`, never falling: (B, n) float64.

    target: (B,), log abar. The family's free number, beta_1, is bisected from beta_0 up; where that gives less than the
    target the betas of beta_1 = beta_0 are scaled down instead; where all at `MOST` give more, those.
    """
    if n == 1:
        return -torch.expm1(target)[:, None]
    base, slope = torch.ones(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64)
    if family == "fibonacci":
        for i in range(2, n):
            base[i], slope[i] = base[i - 1] + base[i - 2], slope[i - 1] + slope[i - 2]

    least = (beta * base).clamp(max=MOST)
    smaller = (torch.log1p(-least).sum() < target)[:, None]

    def at(u: Tensor) -> Tensor:
        u = u[:, None]
        return torch.where(smaller, u * beta * base, beta * base + u * slope).clamp(max=MOST)

    low, high = torch.zeros_like(target), torch.ones_like(target)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        if bool(((middle == low) | (middle == high)).all()):
            break
        above = torch.log1p(-at(middle)).sum(1) > target
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return at(high)


def log_abar(lam: Tensor) -> Tensor:
    """log of alpha^2 / (alpha^2 + sigma^2) from lam; -inf where alpha is 0."""
    return -torch.nn.functional.softplus(-2 * lam, threshold=50.0)


def lam(log_abar: Tensor) -> Tensor:
    """The inverse of `log_abar`."""
    return 0.5 * (log_abar - torch.log(-torch.expm1(log_abar)))
