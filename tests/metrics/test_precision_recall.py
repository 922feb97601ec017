from __future__ import annotations

import pytest
import torch

from hasten.errors import BadInput
from hasten.metrics import precision_recall
from hasten.metrics.precision_recall import manifold, radii


def test_equals_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_recall, "BLOCK", 7)  # several blocks
    real, fake = torch.randn(30, 3), torch.randn(25, 3) + 0.7

    def ball(points: torch.Tensor, i: int, k: int) -> float:
        return sorted(float((points[i] - p).norm()) for j, p in enumerate(points) if j != i)[k - 1]

    def near(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm())

    precision = sum(any(near(f, r) <= ball(real, i, 3) for i, r in enumerate(real)) for f in fake) / 25
    recall = sum(any(near(f, r) <= ball(fake, j, 3) for j, f in enumerate(fake)) for r in real) / 30
    density = sum(near(f, r) <= ball(real, i, 5) for f in fake for i, r in enumerate(real)) / (5 * 25)
    coverage = sum(any(near(f, r) <= ball(real, i, 5) for f in fake) for i, r in enumerate(real)) / 30
    result = manifold(real, fake)
    assert (result.precision, result.recall) == (pytest.approx(precision), pytest.approx(recall))
    assert (result.density, result.coverage) == (pytest.approx(density), pytest.approx(coverage))


def test_radius_leaves_out_the_sample_itself_but_not_its_copies() -> None:
    points = torch.tensor([[0.0], [0.0], [3.0], [7.0]])
    assert radii(points, 1).tolist() == [0, 0, 3, 4]


def test_tells_fidelity_from_diversity() -> None:
    generator = torch.Generator().manual_seed(0)
    two = torch.randn(400, 4, generator=generator)
    two[::2] += 20
    same, one_mode = manifold(two, two), manifold(two, two[::2])
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert one_mode.precision == 1
    assert 0.4 < one_mode.recall < 0.6
    assert 0.4 < one_mode.coverage < 0.6
    blurred = manifold(two, two + 30)
    assert (blurred.precision, blurred.recall, blurred.density, blurred.coverage) == (0, 0, 0, 0)


def test_far_from_the_origin_the_distances_keep_their_digits() -> None:
    real, fake = torch.randn(60, 8).double(), torch.randn(60, 8).double()
    near, far = manifold(real, fake), manifold(real + 1e4, fake + 1e4)
    assert near == far


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="3 samples have no 3-th neighbour"):
        manifold(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(BadInput, match="same feature network"):
        manifold(torch.zeros(9, 2), torch.zeros(9, 3))
