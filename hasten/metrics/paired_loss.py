"""One-sided confidence bounds of a loss that is measured on pairs of images of the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from .frechet import _distance, moments, root
from .paired import ratio_estimate

__all__ = ["PairedLoss", "distance_loss", "jackknife", "mean_loss", "t_quantile"]

GROUPS = 20  # of seeds, each deleted once
LEAST = 4  # groups, below which there is no error


@dataclass(frozen=True)
class PairedLoss:
    """A loss with its standard error over seeds.

    Args:
        value: the estimate.
        error: its standard error; infinite where there are too few seeds.
        degrees: of freedom of the error.
        count: seeds.
    """

    value: float
    error: float
    degrees: int
    count: int

    def upper(self, risk: float, others: int = 0) -> float:
        """A bound that the loss exceeds with probability `risk`, by Student's t.

        Args:
            risk: in (0, 1).
            others: bound what so many other seeds will show, and not only the mean over all seeds: the difference of
                two independent estimates of n and m seeds has the variance error^2 (1 + n / m).
        """
        reach = t_quantile(1 - risk, self.degrees) * self.error if self.degrees else math.inf
        return self.value + reach * (math.sqrt(1 + self.count / others) if others else 1.0)

    def lower(self, risk: float) -> float:
        """A bound below which the loss is with probability `risk`."""
        return 2 * self.value - self.upper(risk)

    def on(self, count: int) -> PairedLoss:
        """What is expected of another number of seeds: the same value, the error scaled by 1 / sqrt(count)."""
        factor = math.sqrt(self.count / count)
        degrees = min(self.degrees * count // self.count, count - 1)
        return PairedLoss(self.value, self.error * factor, max(degrees, 1), count)


def t_quantile(level: float, degrees: int) -> float:
    """The quantile of Student's t distribution, by bisection of its distribution function.

    With `theta = arctan(t / sqrt(degrees))` the two-sided probability is a finite sum of powers of cos(theta).

    Args:
        level: in (0, 1).
        degrees: of freedom, at least 1.

    References:
        Abramowitz, Stegun 1972, "Handbook of mathematical functions", 26.7.3 and 26.7.4.
    """
    if not 0 < level < 1 or degrees < 1:
        raise BadInput(f"a quantile needs a level between 0 and 1 and degrees of freedom, found {level}, {degrees}")
    if level < 0.5:
        return -t_quantile(1 - level, degrees)
    degrees = min(degrees, 1000)  # where it is the normal quantile to .1 %
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        theta = (low + high) / 2
        low, high = (theta, high) if _within(theta, degrees) < 2 * level - 1 else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


def _within(theta: float, degrees: int) -> float:
    """The probability of |t| < sqrt(degrees) tan(theta)."""
    square, odd = math.cos(theta) ** 2, degrees % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= square * (k - 1) / k
    return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total


def mean_loss(
    values: Tensor, scale: float = 1.0, scale_error: float = 0.0, groups: Sequence[Hashable] | None = None
) -> PairedLoss:
    """The mean of one value per seed over a scale that was measured before.

    Args:
        values: (N,).
        scale: not 0.
        scale_error: its standard error, which is added in quadrature.
        groups: of each value, such as its prompt; None: each its own. Values of a group are not independent.
    """
    sums: dict[Hashable, float] = {}
    v = values.double().flatten()
    mean = float(v.mean())
    for group, value in zip(range(len(v)) if groups is None else groups, (v - mean).tolist(), strict=True):
        sums[group] = sums.get(group, 0.0) + value
    count = len(sums)
    if count < LEAST:
        return PairedLoss(mean / scale, math.inf, 0, len(v))
    error = math.sqrt(sum(s * s for s in sums.values()) * count / (count - 1)) / len(v)
    error = math.hypot(error, mean / scale * scale_error) / abs(scale)
    return PairedLoss(mean / scale, error, count - 1, len(v))


def jackknife(statistic: Callable[[Tensor], float], groups: Sequence[Tensor]) -> Tensor:
    """The pseudo-values of a statistic, one for each group of rows that is deleted:

        p_g = G theta - (G - 1) theta_{-g}.

    Their mean has no bias of order 1 / N, and they are nearly independent.

    Args:
        statistic: of the rows with these indices.
        groups: G disjoint sets of indices of about the same size.

    Returns:
        (G,), float64.

    References:
        Quenouille 1956; Tukey 1958; Shao, Tu 1995, "The jackknife and bootstrap", chapter 2 (deleting groups).
    """
    whole, count = statistic(torch.cat(list(groups))), len(groups)
    without = [statistic(torch.cat([g for k, g in enumerate(groups) if k != left])) for left in range(count)]
    return count * whole - (count - 1) * torch.tensor(without, dtype=torch.float64)


def distance_loss(
    features: Tensor, plain: Tensor, mean: Tensor, covariance: Tensor, groups: Sequence[Hashable] | None = None
) -> PairedLoss:
    """`d / d_plain - 1`, by how much a Fréchet distance to real images is larger than that of the plain model.

    Both distances of N images are too large by about c / N, which would hide a part of the loss. Here the pseudo-values
    of the jackknife, by the same groups of seeds of both, take the place of the distances: the bias of first order is
    gone, and what both have in common cancels in the error of their ratio.

    Args:
        features: (N, D) of the images.
        plain: (N, D) of the plain model's, of the same seeds.
        mean, covariance: of real images.
        groups: of each seed, such as its prompt; seeds of one are deleted together. None: each its own.

    Raises:
        BadInput: for fewer than 8 seeds.

    References:
        Cochran 1977, "Sampling techniques", chapter 6; Chong, Forsyth 2020, arXiv:1911.07023 (the bias).
    """
    count = len(features)
    if count < 2 * LEAST or count != len(plain):
        raise BadInput(f"a loss of distances needs at least {2 * LEAST} pairs of images, found {count}, {len(plain)}")
    names = list(range(count)) if groups is None else list(groups)
    distinct = list(dict.fromkeys(names))
    number = min(GROUPS, max(len(distinct) // 2, LEAST), len(distinct))
    place = {name: k % number for k, name in enumerate(distinct)}
    sets = [torch.tensor([i for i, name in enumerate(names) if place[name] == g]) for g in range(number)]

    real = (mean.double().cpu(), torch.trace(covariance.double().cpu()), root(covariance.double().cpu()))

    def distance_of(rows: Tensor) -> Callable[[Tensor], float]:
        return lambda index: _distance(*moments(rows[index]), *real)

    own, base = (jackknife(distance_of(rows), sets) for rows in (features, plain))
    biased = float(base.mean()) <= 0.1 * distance_of(plain)(torch.arange(count))
    if biased:  # too few images to extrapolate: the distances themselves, whose ratio is nearer to 1
        whole = [distance_of(rows)(torch.arange(count)) for rows in (features, plain)]
        own, base = (p - p.mean() + d for p, d in zip((own, base), whole, strict=True))
    estimate = ratio_estimate(own, base)
    residuals = own - estimate.value * base
    error = float(residuals.std() / math.sqrt(number) / base.mean().abs())
    return PairedLoss(estimate.value - 1, math.inf if biased and number < LEAST else error, number - 1, count)
