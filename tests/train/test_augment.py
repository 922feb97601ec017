"""Augmentation: exact shifts, the size of the cutout, gradients, the same policy for real and generated images."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import BadInput
from hasten.train.augment import Augment


def test_points_and_an_empty_policy_are_unchanged() -> None:
    points, images = torch.randn(5, 2), torch.randn(5, 3, 8, 8)
    assert Augment()(points) is points
    assert torch.equal(Augment(0, 0, 0)(images), images)


def test_brightness_adds_one_number_per_image() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 2, 4, 4)
    added = Augment(0.5, 0, 0)(x) - x
    assert (added.flatten(1).std(1) < 1e-6).all()
    level = added.flatten(1).mean(1)
    assert level.abs().max() <= 0.5 and level.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.1)


def test_translation_shifts_the_image_and_repeats_its_border() -> None:
    torch.manual_seed(1)
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(300, 1, 8, 8)
    y = Augment(0, 0.25, 0)(x)
    seen = set()
    for image in y[:, 0]:
        down, right = next(
            (d, r) for d in range(-2, 3) for r in range(-2, 3)
            if torch.equal(image, x[0, 0][(torch.arange(8) + d).clamp(0, 7)][:, (torch.arange(8) + r).clamp(0, 7)])
        )  # fmt: skip
        seen.add((down, right))
    assert len(seen) == 25


def test_cutout_is_a_rectangle_of_at_most_half_the_side() -> None:
    torch.manual_seed(2)
    y = Augment(0, 0, 0.5)(torch.ones(500, 1, 8, 8))[:, 0] == 0
    heights, widths = y.any(2).sum(1), y.any(1).sum(1)
    assert torch.equal(y.flatten(1).sum(1), heights * widths)  # a full rectangle
    assert heights.max() == widths.max() == 4 and heights.min() == 2  # at least half of it is inside
    fraction = y.float().mean(0)
    assert fraction.min() > 0.05  # corners are cut out too


def test_gradients_reach_the_visible_pixels() -> None:
    torch.manual_seed(3)
    x = torch.randn(6, 1, 8, 8, requires_grad=True)
    y = Augment()(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g.sum((1, 2, 3)), (g.sum((1, 2, 3))).round())  # integers: how often each pixel is shown
    assert (g >= 0).all() and (g == 0).any() and g.sum() > 0
    with torch.no_grad():
        shown = (Augment()(x) != 0).float().mean()
    assert 0.6 < shown < 1


def test_the_same_seed_augments_real_and_generated_alike() -> None:
    a, b = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    torch.manual_seed(7)
    one = Augment()(a)
    torch.manual_seed(7)
    two = Augment()(a + b)
    torch.manual_seed(7)
    moved = Augment(brightness=0.5)(torch.zeros_like(a) + b) - 0
    torch.manual_seed(7)
    still = Augment(brightness=0.5)(torch.zeros_like(a))
    torch.testing.assert_close(two - one, moved - still)  # linear in the image


@pytest.mark.parametrize("wrong", [{"brightness": -1.0}, {"translation": 1.5}, {"cutout": -0.1}])
def test_invalid_policies_raise(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="translation and cutout"):
        Augment(**wrong)
