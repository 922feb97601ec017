from __future__ import annotations

import pytest
import torch

from hasten.errors import BadInput
from hasten.metrics.kid import kid, polynomial_mmd2


def test_equals_the_double_sum() -> None:
    x, y = torch.randn(5, 3).double(), torch.randn(4, 3).double() + 1

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / 3 + 1) ** 3

    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (5 * 4)
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (4 * 3)
    xy = sum(k(a, b) for a in x for b in y) / 20
    assert polynomial_mmd2(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_is_unbiased_where_the_plain_estimate_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    unbiased, plain = [], []
    for _ in range(400):
        x, y = torch.randn(2, 20, 4, generator=generator, dtype=torch.float64)
        unbiased.append(polynomial_mmd2(x, y))
        gram = [(a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
        plain.append(float(gram[0].mean() + gram[1].mean() - 2 * gram[2].mean()))
    u, p = torch.tensor(unbiased), torch.tensor(plain)
    error = float(u.std()) / 20
    assert abs(float(u.mean())) < 4 * error
    assert float(p.mean()) > 8 * error


def test_subsets_average_to_the_total_and_repeat() -> None:
    x, y = torch.randn(600, 8), torch.randn(500, 8) * 1.3 + 0.5
    mean, deviation = kid(x, y, subsets=40, size=200)
    assert abs(mean - polynomial_mmd2(x, y)) < 4 * deviation / 40**0.5 + 1e-3
    assert kid(x, y, subsets=3, size=100, seed=1) == kid(x, y, subsets=3, size=100, seed=1)
    assert kid(x[:50], y, subsets=1, size=1000)[1] == 0.0  # every sample of the smaller side, one subset


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="2 samples on each side"):
        polynomial_mmd2(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(BadInput, match="same feature network"):
        polynomial_mmd2(torch.zeros(5, 4), torch.zeros(5, 3))
    with pytest.raises(BadInput, match="got 0 of"):
        kid(torch.zeros(5, 3), torch.zeros(5, 3), subsets=0)
