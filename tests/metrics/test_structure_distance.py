"""Structure distance: zero between equal sets, blind to isometries and order, and what it sees."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import BadInput
from hasten.metrics.structure_distance import random_features, structure_distance, structure_distance_of


def points(n: int = 60, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_isometries_and_order_do_not_matter_and_scale_does() -> None:
    a = points()
    rotation, _ = torch.linalg.qr(points(5, 1))
    assert structure_distance(a, a[torch.randperm(60)] @ rotation + 3) < 1e-9
    assert structure_distance(2 * a, 2 * points(seed=2)) == pytest.approx(structure_distance(a, points(seed=2)))
    # all pairs of distances halved: the root mean square of half the quantiles over their mean
    d = torch.pdist(a)
    assert structure_distance(a, 0.5 * a) == pytest.approx(0.5 * float(d.square().mean().sqrt() / d.mean()))


def test_sets_of_different_sizes_are_compared_by_quantiles() -> None:
    line = torch.arange(2.0)[:, None], torch.tensor([0.0, 1.0, 0.5])[:, None]  # distances 1, and .5 .5 1
    assert structure_distance(*line) == pytest.approx((2 / 3 * 0.25) ** 0.5, rel=1e-9)


def test_a_lost_mode_costs_more_than_chance() -> None:
    g = torch.Generator().manual_seed(0)
    centres = 0.8 * torch.randn(4, 1, 8, 8, generator=g).sign()
    images = (centres[torch.arange(160) % 4] + 0.2 * torch.randn(160, 1, 8, 8, generator=g)).clamp(-1, 1)
    lost = images[80:][torch.arange(80) % 4 < 2]
    full, missing = (structure_distance_of(part, images, samples=40, networks=2) for part in (images[80:], lost))
    assert full.floor is not None and full.value < 3 * full.floor and missing.value > 3 * full.floor
    assert missing.count == 40 and "random" in missing.features
    again = structure_distance_of(lost, images, samples=40, networks=2)
    assert again == missing  # the same frozen networks, whatever was drawn before


def test_features_are_frozen_and_bounded() -> None:
    state = torch.random.get_rng_state()
    one, two = (random_features(points(6).float(), 2, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.shape == (2, 6, 128) and not torch.equal(one, two)
    assert torch.allclose(one.norm(dim=2), torch.ones(2, 6), atol=1e-5)


def test_what_cannot_be_compared_is_refused_in_a_line() -> None:
    images = torch.rand(8, 1, 8, 8) * 2 - 1
    for bad in (
        lambda: structure_distance(points(1), points()),
        lambda: structure_distance(points(), points()[:, :2]),
        lambda: structure_distance_of(images, images[:, :, :4]),
        lambda: structure_distance_of(images[:1], images),
    ):
        with pytest.raises(BadInput) as error:
            bad()
        assert "\n" not in str(error.value)
