"""PSNR and structural similarity against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.errors import BadInput
from hasten.metrics.difference import image_difference, structural_similarity


def test_psnr_of_a_constant_error() -> None:
    x = torch.zeros(2, 3, 16, 16)
    result = image_difference(x, x + 0.2)  # 0.1 on the scale 0 to 1
    assert abs(result["psnr"] - 20) < 1e-4
    assert abs(result["rms"] - 0.1) < 1e-6


def test_similarity_of_flat_images_is_that_of_their_means() -> None:
    a, b = 0.25, 0.75
    x, y = (torch.full((1, 1, 12, 13), 2 * value - 1) for value in (a, b))
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)  # both variances are 0
    assert abs(float(structural_similarity(x, y)) - expected) < 1e-7


def test_similarity_of_one_window_by_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.rand(1, 1, 11, 11, generator=generator).double() for _ in range(2))
    weight = [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    total = sum(map(sum, weight))

    def mean(value) -> float:
        return (
            sum(weight[i][j] * value(float(x[0, 0, i, j]), float(y[0, 0, i, j])) for i in range(11) for j in range(11))
            / total
        )

    m, n = mean(lambda a, b: a), mean(lambda a, b: b)
    v, w = mean(lambda a, b: (a - m) ** 2), mean(lambda a, b: (b - n) ** 2)
    c = mean(lambda a, b: (a - m) * (b - n))
    expected = (2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4))
    assert abs(float(structural_similarity(2 * x - 1, 2 * y - 1)) - expected) < 1e-9


def test_similarity_of_equal_and_of_worse_images() -> None:
    x = torch.rand(3, 3, 20, 24) * 2 - 1
    noise = torch.randn_like(x)
    assert torch.allclose(structural_similarity(x, x), torch.ones(3, dtype=torch.float64))
    little, much = (structural_similarity(x, x + s * noise) for s in (0.1, 0.5))
    assert bool((much < little).all()) and float(little.min()) > 0.5
    with pytest.raises(BadInput, match="at least 11 pixels"):
        structural_similarity(x[..., :10], x[..., :10])
