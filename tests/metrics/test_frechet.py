from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.errors import BadInput
from hasten.metrics.frechet import (
    RunningMoments,
    frechet_between,
    frechet_distance,
    frechet_interval,
    moments,
    root,
)


def spd(width: int, seed: int) -> torch.Tensor:
    a = torch.randn(width, 2 * width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / (2 * width)


def test_equals_the_textbook_matrix_square_root() -> None:
    from scipy.linalg import sqrtm

    m1, m2, c1, c2 = torch.randn(12).double(), torch.randn(12).double(), spd(12, 0), spd(12, 1)
    cross = np.trace(sqrtm((c1 @ c2).numpy())).real
    expected = float((m1 - m2).square().sum() + torch.trace(c1 + c2)) - 2 * cross
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-10)


def test_commuting_gaussians_have_a_closed_form() -> None:
    basis = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    a, b = torch.rand(9, dtype=torch.float64) * 5, torch.rand(9, dtype=torch.float64) * 5
    m1, m2 = torch.randn(9).double(), torch.randn(9).double()
    expected = float((m1 - m2).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(m1, basis * a @ basis.T, m2, basis * b @ basis.T) == pytest.approx(expected, rel=1e-10)


def test_singular_covariances_need_no_added_diagonal() -> None:
    u, v, zero = torch.randn(40).double(), torch.randn(40).double(), torch.zeros(40).double()
    expected = float(u @ u + v @ v - 2 * (u @ v).abs())  # tr (C1 C2)^1/2 = |u.v| for rank one
    assert frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v)) == pytest.approx(expected, abs=1e-5)
    small = moments(torch.randn(10, 64))  # rank 9 in 64 dimensions
    assert frechet_distance(*small, *small) == pytest.approx(0, abs=1e-5)
    point = torch.zeros(64, 64).double()
    assert frechet_distance(*small, small[0], point) == pytest.approx(float(torch.trace(small[1])), rel=1e-9)


def test_root_squares_back() -> None:
    c = spd(7, 3)
    assert torch.allclose(root(c) @ root(c), c, atol=1e-12)


def test_streaming_moments_equal_numpy_far_from_the_origin() -> None:
    x = torch.randn(301, 6, dtype=torch.float64) @ torch.randn(6, 6).double() + 1e5
    parts = [RunningMoments().add(x[:100]).add(x[100:101]), RunningMoments().add(x[101:101]).add(x[101:])]
    mean, covariance = parts[0].merge(parts[1]).merge(RunningMoments()).result()
    assert parts[0].count == 301
    np.testing.assert_allclose(mean.numpy(), x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-9)


def test_interval_has_the_width_of_a_repeat_with_other_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, covariance = torch.zeros(5).double(), torch.eye(5).double()
    draws = [torch.randn(300, 5, generator=generator).double() * 1.2 + 0.1 for _ in range(60)]
    values = torch.tensor([frechet_distance(*moments(x), mean, covariance) for x in draws])
    intervals = [frechet_interval(x, mean, covariance, repeats=50, seed=i) for i, x in enumerate(draws)]
    width = np.mean([high - low for low, high in intervals])
    assert 0.75 < width / (2 * 1.96 * float(values.std())) < 1.35
    expected = float(values.mean())
    assert 0.85 < np.mean([low <= expected <= high for low, high in intervals]) <= 1.0
    assert frechet_interval(draws[0], mean, covariance, seed=3) == frechet_interval(draws[0], mean, covariance, seed=3)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="at least 2 samples, found 1"):
        moments(torch.zeros(1, 3))
    with pytest.raises(BadInput, match="not finite"):
        moments(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]))
    with pytest.raises(BadInput, match="width 3 and 4"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))
    with pytest.raises(BadInput, match="width 4 cannot be added"):
        RunningMoments().add(torch.zeros(2, 3)).add(torch.zeros(2, 4))


@pytest.mark.parametrize("counts", [(5, 7), (12, 30), (30, 4)])
def test_the_distance_of_few_features_is_that_of_their_moments(counts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(n, 12, generator=generator) * (1 + k) + k for k, n in enumerate(counts))
    assert frechet_between(x, y) == pytest.approx(frechet_distance(*moments(x), *moments(y)), rel=1e-6)
    assert frechet_between(x, x) == pytest.approx(0, abs=1e-5)
    with pytest.raises(BadInput, match="not of the same feature network"):
        frechet_between(x, y[:, :3])
