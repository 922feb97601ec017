"""Fréchet distance between two sets of features, and its bootstrap interval."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows


class RunningMoments:
    """Mean and covariance of features in batches, float64.

    References:
        Chan, Golub, LeVeque 1979 (the pairwise update).
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Tensor) -> RunningMoments:
        """Add features (B, D); raises BadInput for another shape."""
        if features.ndim != 2:
            raise BadInput(f"features must have shape (N, D), found {tuple(features.shape)}")
        if len(features):
            x = features.detach().cpu().double()
            mean = x.mean(dim=0)
            self._combine(len(x), mean, (x - mean).T @ (x - mean))
        return self

    def merge(self, other: RunningMoments) -> RunningMoments:
        """Add the features of another accumulator, such as that of another process."""
        if other.count:
            self._combine(other.count, other._mean, other._scatter)
        return self

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """The pairwise update."""
        if not self.count:
            self.count, self._mean, self._scatter = count, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise BadInput(f"features of width {len(mean)} cannot be added to moments of width {len(self._mean)}")
        total = self.count + count
        delta = mean - self._mean
        self._scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean `(D,)` and unbiased covariance `(D, D)`.

        Raises:
            BadInput: for fewer than two samples, or values that are not finite.
        """
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
    """Symmetric square root of a positive semi-definite matrix; negative eigenvalues from rounding are set to zero."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """The squared 2-Wasserstein distance of two Gaussians, float64.

        ||m1 - m2||^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2

    Both roots are of symmetric matrices, so eigenvalues suffice: no complex numbers, and singular covariances (fewer
    samples than features) need no regularisation.

    Args:
        mean1, mean2: `(D,)`.
        covariance1, covariance2: `(D, D)`.

    Raises:
        BadInput: if the shapes differ or values are not finite.

    References:
        Dowson, Landau 1982; Heusel et al. 2017, arXiv:1706.08500.
    """
    if mean1.shape != mean2.shape or covariance1.shape != covariance2.shape:
        raise BadInput(f"moments of width {len(mean1)} and {len(mean2)} are not of the same feature network")
    m1, c1, m2, c2 = (v.cpu().double() for v in (mean1, covariance1, mean2, covariance2))
    check_finite_rows("moments", m1, c1, m2, c2)
    return _distance(m1, c1, m2, torch.trace(c2), root(c2))


def frechet_between(features: Tensor, others: Tensor) -> float:
    """The distance of two sets of features, `frechet_distance(*moments(features), *moments(others))`.

    The root of the product of both covariances has the trace `||X^T Y||_* / sqrt((M - 1) (N - 1))`, the nuclear norm of
    a matrix of M x N with the centred features X^T (M, D) and Y^T (N, D): with fewer images than features that is much
    cheaper than roots of matrices of D x D.

    Args:
        features: `(M, D)`.
        others: `(N, D)`.

    Raises:
        BadInput: for other shapes, fewer than 2 images, and values that are not finite.
    """
    if features.ndim != 2 or others.ndim != 2 or features.shape[1] != others.shape[1]:
        raise BadInput(
            f"features {tuple(features.shape)} and {tuple(others.shape)} are not of the same feature network"
        )
    if max(len(features), len(others)) > features.shape[1] or min(len(features), len(others)) < 2:
        return frechet_distance(*moments(features), *moments(others))
    check_finite_rows("features", features, others)
    x, y = (one.detach().cpu().double() for one in (features, others))
    m1, m2 = x.mean(0), y.mean(0)
    x, y = (x - m1) / (len(x) - 1) ** 0.5, (y - m2) / (len(y) - 1) ** 0.5
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return max(float((m1 - m2).square().sum() + x.square().sum() + y.square().sum() - 2 * cross), 0.0)


def _distance(m1: Tensor, c1: Tensor, m2: Tensor, trace2: Tensor, root2: Tensor) -> float:
    """The distance, given the trace and the root of the second covariance."""
    inner = root2 @ c1 @ root2
    cross = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    return max(float((m1 - m2).square().sum() + torch.trace(c1) + trace2 - 2 * cross), 0.0)


def frechet_interval(
    features: Tensor, mean: Tensor, covariance: Tensor, repeats: int = 100, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the distance of features to fixed reference moments: `d -+ z std(d*)`, at least 0.

    It is centred on the measured distance, because a resampled set contains repeated samples and is biased upwards by
    about as much as N samples already are. It is the interval over other seeds at the SAME sample count, not an
    interval for infinitely many samples (compare the baseline `floor` for that).

    Args:
        features: `(N, D)`.
        mean, covariance: of the reference, `(D,)` and `(D, D)`.
        repeats: number of resampled sets, at least 2.
        level: of the interval, in (0, 1).
        seed: of the resampling.

    Returns:
        Low and high end.

    Raises:
        BadInput: for fewer than 2 repeats.

    References:
        Efron, Tibshirani 1993, chapter 12.
    """
    if repeats < 2:
        raise BadInput(f"a bootstrap interval needs at least 2 repeats, got {repeats}")
    x = features.detach().cpu().double()
    m1, c1 = moments(x)
    x = x - m1
    n = len(x)
    m2, c2 = mean.cpu().double(), covariance.cpu().double()
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
