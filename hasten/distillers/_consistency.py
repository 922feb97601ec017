"""The parts of consistency models: pairs of levels, curricula over a run, the steps and distances that a pair needs.

Levels are q = sigma / alpha, the noise level of z / alpha; where a schedule ends at pure noise it counts as 150 there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..predictions import spread
from ..schedules.base import Schedule
from ..times import MAX_Q, CosineAngle, Karras, TimeGrid
from ._targets import grid, step

WIDE = 5.0
LAWS: dict[str, TimeGrid] = {"karras": Karras(), "angle": CosineAngle()}


def level(schedule: Schedule, t: Tensor) -> Tensor:
    """q at the times t, at most 150."""
    return schedule.q(t).clamp_max(MAX_Q)


# ---- how fine the grid is, as the run goes on ----


def root_count(done: float, first: int, last: int) -> int:
    """Nodes N = ceil(sqrt(u ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 at the share u of the run, s0 = first, s1 = last."""
    # what rounding adds to a whole root must not count as more than it
    return math.ceil(math.sqrt(done * ((last + 1) ** 2 - first**2) + first**2) - 1 - 1e-9) + 1


def root_momentum(count: int, first: int, momentum: float) -> float:
    """Momentum exp(s0 log(mu0) / N) of the target network at N = count nodes."""
    return math.exp(first * math.log(momentum) / count)


def doubling_count(k: int, steps: int, first: int, last: int) -> int:
    """Nodes N = min(s0 2^floor(k / K'), s1) + 1 at step k of K = `steps`, K' = floor(K / (log2 floor(s1 / s0) + 1))."""
    each = max(int(steps / (math.log2(last // first) + 1)), 1)
    return min(first * 2 ** (k // each), last) + 1


def ect_lower(q: Tensor, stage: int) -> Tensor:
    """The lower level r = max(0, q - q 2^-(stage + 1) (1 + 8 sigmoid(-q))) of a pair, stage = 0, 1, ..."""
    return (q - q * 2.0 ** -(stage + 1) * (1 + 8 * torch.sigmoid(-q))).clamp_min(0)


# ---- pairs of times, and which ----


@functools.lru_cache(maxsize=16)
def pairs(law: str, schedule: Schedule, count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Times and levels (count + 1,), rising: the clean end, then `count` nodes up to the schedule's t_max."""
    with torch.inference_mode(False):  # what is kept may be used under autograd later
        times = grid(LAWS[law], schedule, count)
        return times.to(device), level(schedule, times).to(device)


def lognormal_shares(levels: Tensor, mean: float, std: float) -> Tensor:
    """Probabilities (N - 1,) of the pairs of neighbours among rising `levels` (N,), log q normal: sum 1."""
    edges = torch.erf((torch.log(levels) - mean) / (math.sqrt(2) * std))
    shares = edges.diff()
    return shares / shares.sum()


# ---- from the upper time of a pair to the lower ----


def euler(teacher: Callable[..., Tensor], schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
    """One step of DDIM from t to s (B,), which is Euler's in q: first order."""
    return step(schedule, z, teacher(z, t, **cond), t, s)


def heun(teacher: Callable[..., Tensor], schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, **cond: Any) -> Tensor:
    """One step from t to s (B,) with the mean of the slopes (z / alpha - x0) / q at both ends: second order.

    From alpha = 0, where q is infinite, and over more than a factor 5 in q it is the mean of both x0, also of second
    order, whose error stays bounded; into sigma = 0 it is Euler's.
    """
    first = teacher(z, t, **cond)
    end = step(schedule, z, first, t, s)
    second = teacher(end, s, **cond)
    share = schedule.q(s) / schedule.q(t)  # 0 from alpha = 0 and into sigma = 0
    gain = (1 - share) / 2 / torch.where(share > 1 / WIDE, share, 1.0)
    gain = torch.where(schedule.sigma(s) == 0, 0.0, gain)
    return end + spread(schedule.alpha(s) * gain, z) * (second - first)


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun}


# ---- how far apart two answers are ----


def distance(a: Tensor, b: Tensor, metric: str, c: float = 0.00054) -> Tensor:
    """Of a and b (B, *S), (B,): "l2" mean square, "l1" mean, "huber" sqrt(|a - b|^2 + C^2) - C with C = c sqrt(dim).

    The last takes the norm of the whole sample, not of each number.
    """
    off = (a - b).float().flatten(1)
    if metric == "l2":
        return off.square().mean(1)
    if metric == "l1":
        return off.abs().mean(1)
    scale = c * math.sqrt(off.shape[1])
    square = off.square().sum(1)
    # sqrt(u + C^2) - C without the difference of nearly equal numbers
    return square / (torch.sqrt(square + scale**2) + scale)
