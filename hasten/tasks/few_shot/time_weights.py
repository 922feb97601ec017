"""Time-step weights: at which times the network has lost the attributes that tell the classes apart, and little else.

Noise of variance sigma^2 at t makes two images at distance d, scaled by alpha, indistinguishable with probability

    l(t, d) = 1 - erf(s(t) d),    s(t) = alpha(t) / (2 sqrt(2) sigma(t)),

so that what is lost at t and what is not depends on its size d. A network that restores the image from x_t restores, at
small t, attributes of the smallest sizes only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import BadInput, check_int
from ...schedules.base import Schedule
from ...schedules.discrete import Discrete

__all__ = ["attribute_size", "evaluation_times", "log_loss_degree", "time_of_loss", "time_step_weights"]

CHUNK = 2**24  # squared distances in memory at once


def log_loss_degree(schedule: Schedule, t: Tensor, size: Tensor | float) -> Tensor:
    """log l(t, d), which does not underflow where l does (below about d = 8 at 100 of 1,000 steps).

    Args:
        schedule: the model's own.
        t: times in (0, 1], of any shape that broadcasts to that of `size`.
        size: d >= 0.

    Returns:
        float64, at most 0.
    """
    lam = schedule.lam(t).clamp(-300, 300)
    z = torch.exp(lam) / (2 * math.sqrt(2)) * torch.as_tensor(size, dtype=torch.float64)
    z = z.clamp(max=1e100)
    return torch.log(torch.special.erfcx(z).clamp(min=1e-200)) - z * z


def time_step_weights(schedule: Schedule, t: Tensor, size: float, step: float = 1.0, count: int = 500) -> Tensor:
    """The share of attributes of size d among those that are lost at t,

        w(t) = l(t, d) / (l(t, d) + sum_{j=1}^{count} l(t, d + j step)),

    near 1 at small t, from where it falls to 1 / (1 + count). Computed from the model's own alpha and sigma, and from
    logarithms: where l underflows its ratios do not.

    Args:
        schedule: the model's own.
        t: times (T,) in (0, 1].
        size: d >= 0 of the attributes that tell the classes apart, see `attribute_size`.
        step: by which the sizes of the other attributes grow, > 0. 1: as in the paper, for samples of 4 x 64 x 64.
            With step = d the weight depends on l(t, d) alone.
        count: how many sizes.

    Returns:
        (T,) float64 in [0, 1].

    Raises:
        BadInput: for a negative size, and a step or a count that is not positive.

    References:
        Yue, Zhou, Hong, Zhang, Sun 2024, arXiv:2403.02649.
    """
    if not (math.isfinite(size) and size >= 0 and step > 0):
        raise BadInput(f"time-step weights need a size >= 0 and a step > 0, found {size} and {step}")
    check_int("count", count, 1)
    t = torch.as_tensor(t, dtype=torch.float64)
    sizes = size + step * torch.arange(1, count + 1, dtype=torch.float64)
    fine = log_loss_degree(schedule, t, size)
    coarse = torch.logsumexp(log_loss_degree(schedule, t[..., None], sizes), -1)
    return torch.sigmoid(fine - coarse)


def attribute_size(samples: Tensor, labels: Tensor, quantile: float = 0.001) -> float:
    """The size d of the attributes that tell classes apart, from the shots.

    At each position: the squared distances over the channels between samples of different classes, of which a small
    quantile; d is the root of the sum over the positions.

    Args:
        samples: (n, C, H, W), latents where the model is one of latents.
        labels: integers (n,), at least two different ones.
        quantile: in [0, 1].

    Raises:
        BadInput: for one class.
    """
    x = samples.double().flatten(2) if samples.ndim > 2 else samples.double()[..., None]
    one, other = torch.triu_indices(len(x), len(x), 1)
    different = labels[one] != labels[other]
    one, other = one[different], other[different]
    if not len(one):
        raise BadInput("the size of what tells classes apart needs shots of two classes or more")
    width = max(1, CHUNK // (len(one) * x.shape[1]))
    total = 0.0
    for part in x.split(width, dim=2):
        squares = (part[one] - part[other]).square().sum(1)
        low, high = math.floor((len(one) - 1) * quantile), math.ceil((len(one) - 1) * quantile)
        lower, upper = (squares.kthvalue(k + 1, dim=0).values for k in (low, high))
        total += float((lower + ((len(one) - 1) * quantile - low) * (upper - lower)).sum())
    return math.sqrt(total)


def time_of_loss(schedule: Schedule, size: float, degree: float) -> float:
    """The time below which not even attributes of this size are lost: l(t, d) = degree; at least `schedule.t_min`.

    Args:
        schedule: the model's own.
        size: d.
        degree: in (0, 1). The published code drops times below 6e-8, where its float32 underflows.
    """
    if not 0 < degree < 1:
        raise BadInput(f"the degree of loss of the smallest time must lie in (0, 1), found {degree}")
    if size <= 0:
        return schedule.t_min
    z = -float(torch.special.ndtri(torch.tensor(degree / 2, dtype=torch.float64))) / math.sqrt(2)
    lam = math.log(2 * math.sqrt(2) * z / size)
    return min(max(float(schedule.time(lam)), schedule.t_min), 0.5 * schedule.t_max)


def evaluation_times(
    schedule: Schedule, count: int, low: float, weights: Tensor | None = None, resolution: int = 2000
) -> Tensor:
    """The times at which errors are compared.

    Args:
        schedule: the model's own; times of a `Discrete` one are those of its entries.
        count: T.
        low: the smallest.
        weights: (resolution,) at the middles of as many equal intervals from `low` to `t_max`: the times are quantiles
            of that density. None: evenly spaced.
        resolution: of `weights`.

    Returns:
        (T,) float64, rising.
    """
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    high = schedule.t_max if not schedule.zero_snr else min(schedule.t_max, 0.999)
    if weights is not None:
        total = torch.cat([torch.zeros(1, dtype=torch.float64), weights.double().cumsum(0)])
        place = torch.searchsorted(total, middles * total[-1]).clamp(1, resolution)
        inside = (middles * total[-1] - total[place - 1]) / (total[place] - total[place - 1]).clamp(min=1e-300)
        middles = (place - 1 + inside) / resolution
    t = low + middles * (high - low)
    if isinstance(schedule, Discrete):
        entries = len(schedule.alphas_cumprod)
        t = (t * entries).round().clamp(1, entries) / entries
    return t.clamp(max=high)
