"""FastDPM: a short chain of its own noise levels, at fractional steps of the model's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_choices, check_numbers
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ..times import check_times, levels
from ._exponential import Known, ddim, make_nodes


@dataclass(frozen=True)
class FastDPM(SamplerBase):
    """FastDPM: sampling with another schedule, which the bijection between noise level and time maps to the model's
    own, fractional, times.

        z_s = alpha_s x0 + sqrt(sigma_s^2 - V) eps + sqrt(V) xi,  V = kappa^2 (1 - e^{-2h}) sigma_s^2, h = lam_s - lam_r

    approximation="step": the chain uses the times of the grid; with kappa = 0 that is DDIM. "var": it uses only their
    number S, and the first and last positive level; the betas of the short chain are its own:

        abar_s = prod_{i<=s} (1 - eta_i),     eta_i = eta_1 + i w            schedule="linear",   i = 0 .. S-1,
                                              eta_i = eta_1 (1 + i w)^2      schedule="quadratic",

    eta_1 from the last positive level, w by bisection so that abar_S is that of the first, and the network is evaluated
    at the times at which abar = alpha^2 / (alpha^2 + sigma^2) has these values. Pure noise, and levels that the grids
    clip, count as q = 150 there, as in the grids; that evaluation itself stays at its time. A grid that does not end at
    0 is part of a chain only, and is used as it is.

    Order 1 in the largest step in lam, which "var" refines only as far as eta_1 allows: near the clean end its levels
    lie a factor apart that more steps do not change. NFE = steps.

    Args:
        approximation: "var" or "step".
        schedule: "quadratic" or "linear".
        kappa: in [0, 1]: 0 is the paper's DDIM-rev, better for images, 1 its DDPM-rev, better for sound.

    Raises:
        BadInput: while sampling, where no w in the allowed range fits.

    References:
        Kong, Ping 2021, arXiv:2106.00132.
    """

    approximation: str = "var"
    schedule: str = "quadratic"
    kappa: float = 0.0
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_choices(self, approximation=("var", "step"), schedule=("linear", "quadratic"))
        if not 0 <= self.kappa <= 1:
            raise BadInput(f"FastDPM(kappa={self.kappa}): kappa must lie in [0, 1]")
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        if self.approximation == "var":
            times = var_times(schedule, times, self.schedule)
        path, z = make_nodes(schedule, times), x
        for r, s in zip(path, path[1:], strict=False):
            known = Known(r, z, (yield Query(z, r.t)))
            if s.clean or self.kappa == 0:
                z = ddim(z, known, s)
                continue
            decay = (r.alpha * s.sigma) / (s.alpha * r.sigma)  # e^{-h}, 0 from pure noise
            V = (self.kappa * s.sigma) ** 2 * (1 - decay) * (1 + decay)
            rest = decay if self.kappa == 1 else torch.sqrt(1 - self.kappa**2 * (1 - decay) * (1 + decay))
            scale = s.sigma * rest / r.sigma
            z = scale * z + (s.alpha - scale * r.alpha) * known.x0 + torch.sqrt(V) * noise()
        return z


def var_times(schedule: Schedule, times: Tensor, family: str = "quadratic") -> Tensor:
    """The times of the VAR chain with as many steps and the same first and last positive level. Differentiable in both.

    Args:
        schedule: of the denoiser.
        times: (S + 1,); a grid that does not end at 0 is returned as it is.
        family: "quadratic" or "linear".
    """
    check_times(times)
    S = len(times) - 1
    if times[-1].item() != 0 or S < 3:  # part of a chain, or no level in between
        return times
    high, _ = levels(schedule, float(times[0].detach()), float(times[S - 1].detach()))
    clipped = high != float(schedule.q(times[0].detach()))
    lam0 = torch.tensor(-math.log(high), dtype=torch.float64) if clipped else schedule.lam(times[0])
    eta, abar = torch.sigmoid(-2 * schedule.lam(times[S - 1])), torch.sigmoid(2 * lam0)
    if times.requires_grad:
        w = torch.tensor(solve_slope(S, eta.item(), abar.item(), family), dtype=torch.float64)
        with torch.enable_grad():  # one Newton step at the root has the derivatives of w
            left = torch.log1p(-betas_of(S, eta, w.requires_grad_(), family)).sum()
            (rate,) = torch.autograd.grad(left, w, retain_graph=True)
        w = w.detach()
        w = w - (torch.log1p(-betas_of(S, eta, w, family)).sum() - torch.log(abar)) / rate
        betas = betas_of(S, eta, w, family)
    else:
        betas = short_chain(S, eta.item(), abar.item(), family)
    log_abar = torch.cumsum(torch.log1p(-betas), 0)
    # lam of abar: log(abar / (1 - abar)) / 2, noisiest first; the ends are the given times themselves
    inner = 0.5 * (log_abar - torch.log(-torch.expm1(log_abar)))
    inner_times = schedule.time(inner[1:-1]).flip(0)
    return torch.cat([times[:1].double(), inner_times, times[-2:].double()])


def betas_of(S: int, first: Tensor | float, w: Tensor | float, family: str) -> Tensor:
    """eta_1 .. eta_S (S,) of a family from eta_1 and w."""
    i = torch.arange(S, dtype=torch.float64)
    return first + i * w if family == "linear" else first * (1 + i * w) ** 2


def short_chain(S: int, first: float, abar: float, family: str = "quadratic") -> Tensor:
    """Betas eta_1 .. eta_S (S,) of a family with eta_1 = `first` and prod(1 - eta) = `abar`, by bisection on w.

    Args:
        S: number of steps.
        first: eta_1.
        abar: of the entire chain.
        family: "quadratic" or "linear".

    Raises:
        BadInput: where w = 0 already loses more than `abar`, or where a beta would have to reach 1.
    """
    return betas_of(S, first, solve_slope(S, first, abar, family), family)


@functools.lru_cache(maxsize=64)
def solve_slope(S: int, first: float, abar: float, family: str) -> float:
    """w of `short_chain`, which documents the arguments."""
    if S < 2 or not (0 < first < 1 and 0 < abar < 1 - first):
        raise BadInput(f"a chain needs S >= 2 and 0 < eta_1 < 1 - abar < 1, found S={S}, {first:g}, {1 - abar:g}")

    def left(w: float) -> float:
        return float(torch.log1p(-betas_of(S, first, w, family)).sum())

    low, high = 0.0, (1 - first if family == "linear" else 1 / math.sqrt(first) - 1) / (S - 1)
    if left(low) <= math.log(abar):
        raise BadInput(
            f"{S} equal betas of {first:g} already leave less than {abar:g} of the signal: use fewer steps, or a grid "
            "whose last positive time is smaller (low=)"
        )
    for _ in range(200):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        low, high = (middle, high) if left(middle) > math.log(abar) else (low, middle)
    return low


def log_bijection(t: Tensor, first: float, last: float, count: int) -> Tensor:
    """log R(t), R the paper's bijection for `count` betas equally spaced from `first` to `last`: the alpha that they
    have after t steps, t real in [0, count].

        R(t) = (db^t Gamma(bh + 1) / Gamma(bh - t + 1))^(1/2),   db = (last - first)/(count - 1),  bh = (1 - first)/db

    At whole t it is the table itself; a `Discrete` schedule joins those points by straight lines in log alpha.
    """
    t = t.double()
    db = (last - first) / (count - 1)
    bh = torch.tensor((1 - first) / db, dtype=torch.float64)
    return 0.5 * (t * math.log(db) + torch.lgamma(bh + 1) - torch.lgamma(bh - t + 1))
