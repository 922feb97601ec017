"""Back-projection, and the error of an enlarged image reduced again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.errors import BadInput
from hasten.tasks import SuperResolution
from hasten.tasks.super_resolution.consistency import back_project, measure_consistency
from hasten.utils.resizing import enlarge, reduce

from .tiny import local_model, scene


def rows(x: torch.Tensor):
    """A function that gives rows of an image (C, H, W)."""
    return lambda begin, end: x[:, begin:end]


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("height", [1, 33, 70])
def test_rows_give_what_the_whole_image_gives(factor: int, height: int) -> None:
    torch.manual_seed(0)
    x, y = torch.rand(3, height, 9) - 0.5, torch.rand(3, factor * height, 9 * factor) - 0.5
    error = 127.5 * (x - reduce(y[None], factor)[0])
    found = measure_consistency(rows(x), rows(y), height, factor)
    assert found.rms == pytest.approx(float(error.square().mean().sqrt()), rel=1e-4)
    assert found.largest == pytest.approx(float(error.abs().max()), rel=1e-4)
    corrected, _ = back_project(rows(x), rows(y), x.shape, factor, iterations=1)
    whole = (y + enlarge(1.5 * (x - reduce(y[None], factor)[0])[None], factor)[0]).clamp(-1, 1)
    torch.testing.assert_close(corrected(0, factor * height), whole)
    if height > 9:
        torch.testing.assert_close(corrected(factor * 5 + 1, factor * 9 - 1), whole[:, factor * 5 + 1 : factor * 9 - 1])


@pytest.mark.parametrize("factor", [2, 4])
def test_back_projection_reaches_the_small_image(factor: int) -> None:
    torch.manual_seed(0)
    x = torch.from_numpy(scene(40, 50)).permute(2, 0, 1) / 127.5 - 1
    y = enlarge(x[None], factor)[0] + 0.2 * torch.randn(3, 40 * factor, 50 * factor)
    before = measure_consistency(rows(x), rows(y), 40, factor)
    corrected, reached = back_project(rows(x), rows(y), x.shape, factor)
    result = corrected(0, 40 * factor)
    assert before.largest > 10 and reached.largest < 0.25
    error = 127.5 * float((reduce(result[None], factor)[0] - x).abs().max())
    assert error == pytest.approx(reached.largest, rel=1e-3)
    # what the small image does not show is left as it is: y - enlarge(reduce(y)) keeps most of its variance
    detail, kept = (z - enlarge(reduce(z[None], factor), factor)[0] for z in (y, result))
    assert float((detail - kept).square().mean()) < 0.1 * float(detail.square().mean())


def test_consistent_images_reduce_to_the_small_one_in_pillow() -> None:
    small = scene(50, 60)
    sr = SuperResolution(local_model())
    for options, most in (({}, None), ({"consistent": True}, 0.5)):
        large = Image.fromarray(sr.upscale(small, **options))
        again = np.asarray(large.resize((60, 50), Image.Resampling.BICUBIC), int)
        if most is None:
            assert np.abs(again - small).max() > 10
        else:
            assert np.abs(again - small).max() <= 1  # rounded
            assert (again == small).mean() > 0.97
            assert sr.consistency(small, np.asarray(large)).largest < most
    deep = scene(20, 20, white=65535)
    assert sr.consistency(deep, sr.upscale(deep, consistent=True)).largest < 0.3
    with pytest.raises(BadInput, match="of 20x20 is 40x40, found 20x20"):
        sr.consistency(deep, deep)


def test_an_image_at_the_ends_of_the_range_ends_too() -> None:
    """Where no image within the range reduces to it, such as at black beside white."""
    x = (torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.5).float() * 2 - 1
    before = measure_consistency(rows(x), rows(enlarge(x[None], 2)[0].clamp(-1, 1)), 20, 2)
    _, reached = back_project(rows(x), rows(enlarge(x[None], 2)[0].clamp(-1, 1)), x.shape, 2)
    assert 0.25 < reached.largest < before.largest
