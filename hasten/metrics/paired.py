"""Figures of pairs of images of the same seeds, with confidence intervals over the seeds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..utils.devices import as_float64
from .measure import check_finite_rows

__all__ = ["Estimate", "mean_estimate", "psnr_by_image", "ratio_estimate", "student_quantile"]

PEAK_DB = 100.0  # of equal images


@dataclass(frozen=True)
class Estimate:
    """A mean or a ratio of means with its 95 % confidence interval.

    Args:
        value: the estimate.
        low, high: ends of the interval; both equal to `value` where one pair alone was measured.
        count: independent groups that it is over.
    """

    value: float
    low: float
    high: float
    count: int


def student_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution.

    Args:
        degrees: of freedom, at least 1. Exact for 1 and 2, otherwise by the expansion in 1 / degrees, to .1 %.

    References:
        Abramowitz, Stegun 1972, "Handbook of mathematical functions", 26.7.5.
    """
    if degrees <= 2:
        return (12.7062, 4.3027)[degrees - 1]
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**k for k, term in enumerate(terms))


def mean_estimate(values: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of one value per seed, with its 95 % interval by Student's t.

    Values of one group, such as the images of one prompt, are not independent: the standard error is that of the sums
    of each group's deviations,

        s^2 = G / (G - 1) sum_g (sum_{i in g} (v_i - mean))^2 / N^2,

    which without groups is the usual one.

    Args:
        values: (N,).
        groups: of each value; None: each its own.

    Raises:
        BadInput: for no values, and values that are not finite.
    """
    return ratio_estimate(values, torch.ones_like(values), groups)


def ratio_estimate(values: Tensor, others: Tensor, groups: Sequence[Hashable] | None = None) -> Estimate:
    """The ratio of two means over the same seeds or prompts, `sum_i v_i / sum_i w_i`, with its 95 % interval.

    The interval is that of the linearised ratio, from the paired residuals `v_i - ratio w_i`: what both have in common
    cancels.

    Args:
        values, others: (N,), pair by pair.
        groups: of each pair; None: each its own.

    Raises:
        BadInput: for no values, other counts, values that are not finite, and others whose mean is 0.

    References:
        Cochran 1977, "Sampling techniques", chapter 6.
    """
    v, w = values.double().flatten(), others.double().flatten()
    if v.shape != w.shape or not len(v):
        raise BadInput(f"paired figures need as many values as others, at least one, found {len(v)} and {len(w)}")
    check_finite_rows("values", v[:, None], w[:, None])
    if float(w.sum()) == 0:
        raise BadInput("a ratio to values whose mean is 0 is not defined")
    ratio = float(v.sum() / w.sum())
    residuals = (v - ratio * w).tolist()
    sums: dict[Hashable, float] = {}
    for group, residual in zip(range(len(v)) if groups is None else groups, residuals, strict=True):
        sums[group] = sums.get(group, 0.0) + residual
    count = len(sums)
    if count < 2:
        return Estimate(ratio, ratio, ratio, count)
    error = math.sqrt(sum(s * s for s in sums.values()) * count / (count - 1)) / abs(float(w.sum()))
    reach = student_quantile(count - 1) * error
    return Estimate(ratio, ratio - reach, ratio + reach, count)


def psnr_by_image(images: Tensor, others: Tensor) -> Tensor:
    """`-10 log10 MSE` in dB of each image to the other, at most 100; errors on the scale 0 to 1.

    Args:
        images: (N, ...) in [-1, 1].
        others: of the same shape.

    Returns:
        (N,) float64.

    Raises:
        BadInput: if the shapes differ, or for images that are not finite.
    """
    if images.shape != others.shape:
        raise BadInput(f"images of shape {tuple(images.shape)} and {tuple(others.shape)} cannot be compared one by one")
    check_finite_rows("images", images, others)
    mse = (as_float64(images - others) / 2).square().flatten(1).mean(dim=1)
    return -10 * mse.clamp(min=10 ** (-PEAK_DB / 10)).log10()
