"""Bounds of paired losses: quantiles, the jackknife, and their coverage in simulations whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.metrics.frechet import frechet_distance
from hasten.metrics.paired_loss import PairedLoss, distance_loss, jackknife, mean_loss, t_quantile


@pytest.mark.parametrize(
    ("level", "degrees", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.95, 3, 2.35336), (0.975, 7, 2.36462), (0.99, 10, 2.76377),
     (0.95, 19, 1.72913), (0.9917, 31, 2.5318), (0.975, 10**6, 1.95996)],
)  # fmt: skip
def test_quantiles_of_student(level: float, degrees: int, expected: float) -> None:
    assert t_quantile(level, degrees) == pytest.approx(expected, rel=2e-3)
    assert t_quantile(1 - level, degrees) == -t_quantile(level, degrees)


def test_quantiles_refuse_what_is_no_level() -> None:
    with pytest.raises(BadInput, match="level"):
        t_quantile(1.0, 3)


def test_the_jackknife_is_exact_for_a_mean_and_unbiased_for_a_square() -> None:
    """Pseudo-values of a mean are the values; those of the variance over N average to that over N - 1."""
    x = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    singles = list(torch.arange(12).split(1))
    torch.testing.assert_close(jackknife(lambda rows: float(x[rows].mean()), singles), x)
    biased = jackknife(lambda rows: float(x[rows].var(correction=0)), singles)
    torch.testing.assert_close(biased.mean(), x.var())


def test_the_bounds_are_ordered_and_two_sided() -> None:
    loss = PairedLoss(1.0, 0.1, 10, 40)
    assert loss.upper(0.05, others=loss.count) > loss.upper(0.05) > 1.0 > loss.lower(0.05)
    assert loss.upper(0.01) > loss.upper(0.05)
    assert loss.on(160).error == pytest.approx(0.05)
    assert PairedLoss(0.0, math.inf, 0, 2).upper(0.05) == math.inf


def test_images_of_one_prompt_are_not_independent() -> None:
    """Four equal copies of each value are as uncertain as one of each."""
    values = torch.randn(30, generator=torch.Generator().manual_seed(1))
    once = mean_loss(values)
    copies = mean_loss(values.repeat(4), groups=list(range(30)) * 4)
    assert copies.error == pytest.approx(once.error, rel=1e-6)
    assert mean_loss(values.repeat(4)).error < 0.6 * once.error


def test_a_mean_bound_covers() -> None:
    """Of 600 certificates of 24 skewed values each 95 % bound the mean; 95 % also bound the mean of another 24."""
    generator = torch.Generator().manual_seed(2)
    losses = [mean_loss(-row) for row in gamma(600, generator)]
    means = [loss.upper(0.05) >= -4.0 for loss in losses]
    again = [
        loss.upper(0.05, others=len(other)) >= float(-other.mean())
        for loss, other in zip(losses, gamma(600, generator), strict=True)
    ]
    assert sum(means) / 600 > 0.92
    assert sum(again) / 600 > 0.93


def gamma(n: int, generator: torch.Generator) -> Tensor:
    """As skewed as decibels of pairs of images: (n, 24) values of the gamma distribution with shape 4: sums of four exponential ones."""
    return -torch.rand(n, 24, 4, generator=generator).clamp(min=1e-9).log().sum(-1)


def features(n: int, shift: float, generator: torch.Generator, width: int = 4) -> tuple[Tensor, Tensor]:
    """Features of a plain model and of a candidate whose mean is further off, of the same seeds."""
    common = torch.randn(n, width, generator=generator, dtype=torch.float64)
    own = torch.randn(n, width, generator=generator, dtype=torch.float64)
    offset = torch.zeros(width, dtype=torch.float64)
    offset[0] = 1.0
    return common + offset, 0.9 * common + math.sqrt(1 - 0.81) * own + (1 + shift) * offset


def truth(shift: float) -> float:
    """The loss for infinitely many images: distances of means to 0."""
    return (1 + shift) ** 2 - 1


def test_a_distance_bound_covers() -> None:
    """At 96 images the plain distance is biased by a quarter; the bound holds for the loss without that bias."""
    generator, mean, covariance = torch.Generator().manual_seed(3), torch.zeros(4), torch.eye(4)
    held, again, naive = 0, 0, 0.0
    count = 40
    for _ in range(count):
        plain, own = features(96, 0.2, generator)
        loss = distance_loss(own, plain, mean, covariance)
        held += loss.upper(0.1) >= truth(0.2)
        other = distance_loss(*features(96, 0.2, generator)[::-1], mean, covariance)
        again += loss.upper(0.1, others=other.count) >= other.value
        naive += loss.value / count
    assert held >= 0.82 * count
    assert again >= 0.85 * count
    assert naive == pytest.approx(truth(0.2), abs=0.04)


def test_the_distance_loss_of_equal_images_is_none() -> None:
    plain, own = features(64, 0.1, torch.Generator().manual_seed(4))
    mean, covariance = torch.zeros(4), torch.eye(4)
    same = distance_loss(plain, plain, mean, covariance)
    assert (same.value, same.error) == (0.0, 0.0)
    direct = frechet_distance(own.mean(0), own.T.cov(), mean, covariance)
    assert direct > frechet_distance(plain.mean(0), plain.T.cov(), mean, covariance)
    assert distance_loss(own, plain, mean, covariance).value > 0
    with pytest.raises(BadInput, match="at least 8"):
        distance_loss(own[:4], plain[:4], mean, covariance)
