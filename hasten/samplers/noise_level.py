"""DDIM on noise levels that are recomputed during sampling from an estimate of the actual noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choices, check_numbers
from ..predictions import spread
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ..times import check_times

FAMILIES = ("linear", "fibonacci", "times")
MAX_BETA = 0.999
MIN_ABAR, MAX_ABAR = 1e-5, 0.9999  # estimates outside are saturated
HALVINGS = 200  # maximum; the free parameter may be tiny, as a Fibonacci series grows


@dataclass(frozen=True)
class NoiseLevel(SamplerBase):
    """DDIM with the noise level of every sample estimated between the steps, from which the remaining levels are
    recomputed.

    On the variance-preserving path z = sqrt(abar) x + sqrt(1 - abar) e, to which the states of any schedule are scaled,
    with P the model's network "noise_level" (tuned by `--method noise_level`) and n steps remaining after a step:

        abar^ = P(z),    beta_0 .. beta_{n-1} of the family with prod (1 - beta_i) = abar^,    next levels
        abar_k = prod_{i<k} (1 - beta_i),  k = n - 1, ..., 1, 0

    so the network is evaluated n times, first at abar^ and last at 1 - beta_0. Each sample has its own levels.

    An estimate is ignored where it is saturated (abar^ <= 1e-5 or >= .9999): that sample's levels do not change. It is
    at least abar before the step. Order 1, if the estimate is exact; NFE = steps; the cost of P is negligible.

    Args:
        family: "linear": beta_i = beta_0 + i w. "fibonacci": beta_{i+2} = beta_{i+1} + beta_i. In both the free
            parameter is found by bisection of log prod (the paper's first-order formulas miss a product of .3 by 21 %
            at 6 steps), with betas of at most .999; an abar^ so near 1 that beta_0 excludes it is reached with a
            smaller one. Both use only the first time of the grid and its length; a start below abar = 1e-5 counts as
            that. "times", not in the paper: the levels of the grid, whose remaining part is stretched in lam so that it
            begins at abar^.
        eta: of DDIM, in [0, 1]; 1 is ancestral sampling.
        beta: beta_0, in (0, .1).
        updates: the steps (from 1) after which the level is estimated; None: all. (): never, which needs no network.
        estimator: P, set by `bind`.

    Raises:
        BadInput: while sampling, without the network, or for a grid that does not end at 0.

    References:
        San Roman, Nachmani, Wolf 2021, arXiv:2104.02600.
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
        check_choices(self, family=FAMILIES)
        if not 0 <= self.eta <= 1:
            raise BadInput(f"noise_level: eta={self.eta} must lie in [0, 1]")
        if not 0 < self.beta < 0.1:
            raise BadInput(f"noise_level: beta={self.beta} must lie in (0, .1): it is the last, smallest step")
        if any(k < 1 for k in self.updates or ()):
            raise BadInput(f"noise_level: updates={self.updates}: steps are counted from 1; () is none, none is all")
        check_numbers(self)

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> NoiseLevel:
        """The sampler with the model's network "noise_level".

        Raises:
            BadInput: without it, unless `updates` is ().
        """
        if self.updates == ():
            return self
        if "noise_level" not in parts:
            advice = "run hasten tune MODEL --method noise_level --data IMAGES"
            raise BadInput(f"noise_level needs the model's noise estimator: {advice}")
        return replace(self, estimator=parts["noise_level"])

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
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
                estimate = torch.log(self.estimator(z).detach().cpu().double())
                valid = (estimate > math.log(MIN_ABAR)) & (estimate < math.log(MAX_ABAR))
                level = torch.where(valid, torch.maximum(estimate, before), level)
                ahead = torch.where(valid[:, None], self.levels(level, grid[n - left :]), ahead)
            t = schedule.time(lam(level))
        return None  # unreachable

    def levels(self, start: Tensor, grid: Tensor) -> Tensor:
        """log abar after each of the remaining steps but the last, which ends clean: (B, n - 1).

        Args:
            start: (B,), the current log abar.
            grid: (n,), log abar of the grid, at the current and the later times.
        """
        if self.family == "times":
            nodes, now = lam(grid), lam(start)[:, None]
            if torch.isinf(nodes[0]):  # pure noise stays at its time of the grid
                return grid[None, 1:].expand(len(start), -1)
            fraction = (nodes[-1] - nodes[1:]) / (nodes[-1] - nodes[0])
            return log_abar(torch.maximum(nodes[-1] - fraction * (nodes[-1] - now), now))
        new_betas = betas(start.clamp(min=math.log(MIN_ABAR)), len(grid), self.family, self.beta)
        return torch.log1p(-new_betas).cumsum(1)[:, :-1].flip(1)

    def _step(self, z: Tensor, x0: Tensor, start: Tensor, end: Tensor, noise: Callable[[], Tensor]) -> Tensor:
        """One DDIM step on the variance-preserving path; start and end are log abar, (B,)."""
        (a, s), (a1, s1) = [(torch.exp(0.5 * g), torch.sqrt(-torch.expm1(g))) for g in (start, end)]
        decay = a * s1 / (a1 * s)
        fresh = self.eta * torch.sqrt(((1 - decay) * (1 + decay)).clamp(min=0))
        ratio = s1 * torch.sqrt(1 - fresh**2) / s
        z = spread(ratio, z) * z + spread(a1 - ratio * a, z) * x0
        return z + spread(s1 * fresh, z) * noise() if self.eta else z


def betas(target: Tensor, n: int, family: str, beta: float) -> Tensor:
    """beta_0 .. beta_{n-1} with `sum log(1 - beta_i) = target`, never decreasing: (B, n) float64.

    The family's free parameter, beta_1, is bisected from beta_0 up; where that gives less than the target the betas of
    beta_1 = beta_0 are scaled down instead; where all at `MAX_BETA` give more, those.

    Args:
        target: (B,), log abar.
        n: number of steps.
        family: "linear" or "fibonacci".
        beta: beta_0.
    """
    if n == 1:
        return -torch.expm1(target)[:, None]
    base, slope = torch.ones(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64)
    if family == "fibonacci":
        for i in range(2, n):
            base[i], slope[i] = base[i - 1] + base[i - 2], slope[i - 1] + slope[i - 2]

    smallest = (beta * base).clamp(max=MAX_BETA)
    smaller = (torch.log1p(-smallest).sum() < target)[:, None]

    def at(u: Tensor) -> Tensor:
        u = u[:, None]
        return torch.where(smaller, u * beta * base, beta * base + u * slope).clamp(max=MAX_BETA)

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
