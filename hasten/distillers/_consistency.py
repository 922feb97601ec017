"""Parts of consistency models: pairs of noise levels, curricula over a run, the solver steps and distances of a pair.

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
from ..times import MAX_Q, CosineAngle, Karras, TimeGrid, Trailing
from ._targets import ddim_step, time_nodes

MAX_Q_RATIO = 5.0
TIME_GRIDS: dict[str, TimeGrid] = {"karras": Karras(), "angle": CosineAngle(), "trailing": Trailing()}


def level(schedule: Schedule, t: Tensor) -> Tensor:
    """q at the times t, at most 150."""
    return schedule.q(t).clamp_max(MAX_Q)


# ---- the number of nodes over a run ----


def root_count(progress: float, first: int, last: int) -> int:
    """Nodes N = ceil(sqrt(u ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 at fraction u of the run, s0 = first, s1 = last."""
    # rounding must not lift an integer root to the next integer
    return math.ceil(math.sqrt(progress * ((last + 1) ** 2 - first**2) + first**2) - 1 - 1e-9) + 1


def root_momentum(count: int, first: int, momentum: float) -> float:
    """Momentum exp(s0 log(mu0) / N) of the target network at N = count nodes."""
    return math.exp(first * math.log(momentum) / count)


def doubling_count(k: int, steps: int, first: int, last: int) -> int:
    """Nodes N = min(s0 2^floor(k / K'), s1) + 1 at step k of K = `steps`, K' = floor(K / (log2 floor(s1 / s0) + 1))."""
    steps_each = max(int(steps / (math.log2(last // first) + 1)), 1)
    return min(first * 2 ** (k // steps_each), last) + 1


def ect_lower(q: Tensor, stage: int) -> Tensor:
    """The lower level r = max(0, q - q 2^-(stage + 1) (1 + 8 sigmoid(-q))) of a pair, stage = 0, 1, ..."""
    return (q - q * 2.0 ** -(stage + 1) * (1 + 8 * torch.sigmoid(-q))).clamp_min(0)


# ---- pairs of times, and their probabilities ----


@functools.lru_cache(maxsize=16)
def grid_levels(grid: str, schedule: Schedule, count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Times and levels (count + 1,), increasing: the clean end, then `count` nodes up to the schedule's t_max."""
    with torch.inference_mode(False):  # cached tensors may be used under autograd later
        times = time_nodes(TIME_GRIDS[grid], schedule, count)
        return times.to(device), level(schedule, times).to(device)


def lognormal_probabilities(levels: Tensor, mean: float, std: float) -> Tensor:
    """Probabilities (N - 1,) of the pairs of neighbours among increasing `levels` (N,), with log q normal; sum 1."""
    edges = torch.erf((torch.log(levels) - mean) / (math.sqrt(2) * std))
    weights = edges.diff()
    return weights / weights.sum()


# ---- from the upper time of a pair to the lower ----


def euler_step(
    teacher: Callable[..., Tensor], schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, **cond: Any
) -> Tensor:
    """One step of DDIM from t to s (B,), which is Euler's in q: first order."""
    return ddim_step(schedule, z, teacher(z, t, **cond), t, s)


def heun_step(
    teacher: Callable[..., Tensor], schedule: Schedule, z: Tensor, t: Tensor, s: Tensor, **cond: Any
) -> Tensor:
    """One step from t to s (B,) with the mean of the derivatives (z / alpha - x0) / q at both ends: second order.

    From alpha = 0, where q is infinite, and over more than a factor 5 in q it is the mean of both x0, also of second
    order, whose error stays bounded; into sigma = 0 it is Euler's.
    """
    first = teacher(z, t, **cond)
    end = ddim_step(schedule, z, first, t, s)
    second = teacher(end, s, **cond)
    ratio = schedule.q(s) / schedule.q(t)  # 0 from alpha = 0 and into sigma = 0
    gain = (1 - ratio) / 2 / torch.where(ratio > 1 / MAX_Q_RATIO, ratio, 1.0)
    gain = torch.where(schedule.sigma(s) == 0, 0.0, gain)
    return end + spread(schedule.alpha(s) * gain, z) * (second - first)


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler_step, "heun": heun_step}


# ---- the distance of two predictions ----


def pair_distance(a: Tensor, b: Tensor, metric: str, c: float = 0.00054) -> Tensor:
    """The distance of a and b (B, *S) by sample.

    Args:
        a, b: (B, *S).
        metric: `"l2"` mean square, `"l1"` mean, `"huber"` sqrt(|a - b|^2 + C^2) - C with C = c sqrt(dim) and the norm
            of the whole sample, not of each number.
        c: of `"huber"`.

    Returns:
        (B,) float32.
    """
    error = (a - b).float().flatten(1)
    if metric == "l2":
        return error.square().mean(1)
    if metric == "l1":
        return error.abs().mean(1)
    scale = c * math.sqrt(error.shape[1])
    square = error.square().sum(1)
    # sqrt(u + C^2) - C without cancellation
    return square / (torch.sqrt(square + scale**2) + scale)
