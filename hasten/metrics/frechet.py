"""Fréchet distance between two sets of features, and how sure it is."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows


class RunningMoments:
    """Mean and covariance of features that arrive in batches, float64, by the pairwise update of Chan et al. (1979).

    `add(features (B, D))` any number of times, `merge` another accumulator (of another process, say),
    then `result()` -> mean `(D,)` and unbiased covariance `(D, D)`.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Tensor) -> RunningMoments:
        if features.ndim != 2:
            raise BadInput(f"features must have shape (N, D), found {tuple(features.shape)}")
        if len(features):
            x = features.detach().to("cpu", torch.float64)
            mean = x.mean(dim=0)
            self._combine(len(x), mean, (x - mean).T @ (x - mean))
        return self

    def merge(self, other: RunningMoments) -> RunningMoments:
        if other.count:
            self._combine(other.count, other._mean, other._scatter)
        return self

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise BadInput(f"features of width {len(mean)} cannot join moments of width {len(self._mean)}")
        total = self.count + count
        delta = mean - self._mean
        self._scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        if self.count < 2:
            raise BadInput(f"a covariance needs at least 2 samples, found {self.count}")
        covariance = self._scatter / (self.count - 1)
        if not (torch.isfinite(covariance).all() and torch.isfinite(self._mean).all()):
            raise BadInput("features are not finite: the images or the feature network hold NaN or infinity")
        return self._mean.clone(), (covariance + covariance.T) / 2


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and unbiased covariance `(D, D)` of features `(N, D)`, float64."""
    return RunningMoments().add(features).result()


def root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix; rounding below zero is cut off."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """`||m1 - m2||^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2`, float64: the squared 2-Wasserstein distance
    of two Gaussians.

    Both roots are of symmetric matrices, so eigenvalues suffice: no complex numbers, and singular covariances
    (fewer samples than features) need no added diagonal. Means `(D,)`, covariances `(D, D)`.
    Raises BadInput when the shapes disagree.
    Reference: Dowson and Landau (1982); Heusel et al. 2017, 1706.08500.
    """
    if mean1.shape != mean2.shape or covariance1.shape != covariance2.shape:
        raise BadInput(f"moments of width {len(mean1)} and {len(mean2)} are not of the same feature network")
    m1, c1, m2, c2 = (v.to("cpu", torch.float64) for v in (mean1, covariance1, mean2, covariance2))
    check_finite_rows("moments", m1, c1, m2, c2)
    return _distance(m1, c1, m2, torch.trace(c2), root(c2))


def _distance(m1: Tensor, c1: Tensor, m2: Tensor, trace2: Tensor, root2: Tensor) -> float:
    inner = root2 @ c1 @ root2
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    return max(float((m1 - m2).square().sum() + torch.trace(c1) + trace2 - 2 * cross), 0.0)


def frechet_interval(
    features: Tensor, mean: Tensor, covariance: Tensor, repeats: int = 100, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the distance of `features` `(N, D)` to fixed reference moments, at `level` (0 to 1).

    The samples are redrawn with replacement `repeats` times; the interval is `d -+ z std(d*)`, cut at 0. It is
    centred on the distance as measured, because a redrawn set repeats samples and so lies further away by about
    as much as N samples lie too far already. It says how the value would move with other seeds at the SAME
    sample count; it is not an interval for infinitely many samples (compare `floor` for that).
    Reference: Efron and Tibshirani (1993), ch. 12.
    """
    if repeats < 2:
        raise BadInput(f"a bootstrap interval needs at least 2 repeats, asked for {repeats}")
    x = features.detach().to("cpu", torch.float64)
    m1, c1 = moments(x)
    x = x - m1
    n = len(x)
    m2, c2 = mean.to("cpu", torch.float64), covariance.to("cpu", torch.float64)
    offset, trace2, root2 = m2 - m1, torch.trace(c2), root(c2)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(repeats):
        weight = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).to(torch.float64)
        m = weight @ x / n
        c = (x.T @ (x * weight[:, None]) - n * torch.outer(m, m)) / (n - 1)
        values.append(_distance(m, c, offset, trace2, root2))
    half = NormalDist().inv_cdf((1 + level) / 2) * float(torch.tensor(values, dtype=torch.float64).std())
    centre = _distance(torch.zeros_like(m1), c1, offset, trace2, root2)
    return max(centre - half, 0.0), centre + half
