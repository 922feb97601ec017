"""Images that sampling starts from: one file or many, and their unknown pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.errors import BadInput
from hasten.train.start_images import read_images

HOLE = (slice(2, 5), slice(3, 6))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    pixels = np.full((8, 8, 4), 255, np.uint8)
    pixels[..., :3] = 90
    Image.fromarray(pixels[..., :3]).save(tmp_path / "opaque.png")
    pixels[HOLE][..., 3] = 0
    Image.fromarray(pixels).save(tmp_path / "hole.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[HOLE] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def unknown(x: torch.Tensor) -> bool:
    """NaN in the hole and nowhere else, and the rest as it was."""
    inside = torch.zeros_like(x, dtype=torch.bool)
    inside[..., HOLE[0], HOLE[1]] = True
    return bool((x.isnan() == inside).all()) and bool(((x[~inside] + 1) * 127.5 - 90).abs().max() < 0.01)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_hole_is_transparent_or_in_a_mask(place: Path, channels: int) -> None:
    assert unknown(read_images(place / "hole.png", 2, channels, unknown=True))
    assert unknown(read_images(place / "opaque.png", 2, channels, unknown=True, mask=place / "mask.png"))
    assert not read_images(place / "hole.png", 2, channels).isnan().any()
    (place / "many").mkdir()
    for k in range(2):
        (place / "many" / f"{k}.png").write_bytes((place / "hole.png").read_bytes())
    assert unknown(read_images(place / "many", 2, channels, unknown=True))


def test_a_hole_in_an_array_is_nan(place: Path) -> None:
    for scale, shift in ((1 / 255, 0.0), (1 / 127.5, -1.0)):
        pixels = np.full((2, 8, 8, 3), 90 * scale + shift, np.float32)
        pixels[:, 0, 0], pixels[:, 0, 1] = shift, 255 * scale + shift  # so that the range shows
        pixels[:, HOLE[0], HOLE[1], 1] = np.nan
        np.save(place / "a.npy", pixels)
        x = read_images(place / "a.npy", 2, 3, unknown=True)
        inside = x.isnan()
        assert inside[:, :, HOLE[0], HOLE[1]].all() and int(inside[0, 0].sum()) == 9
        assert ((x[:, :, 7] + 1) * 127.5 - 90).abs().max() < 1


def test_masks_that_do_not_match_raise(place: Path) -> None:
    Image.new("L", (8, 6), 255).save(place / "small.png")
    Image.new("L", (8, 8), 1).save(place / "empty.png")
    for mask, message in (("small.png", "8x6, the images .* are 8x8"), ("empty.png", "no white pixel")):
        with pytest.raises(BadInput, match=message):
            read_images(place / "opaque.png", 1, 1, unknown=True, mask=place / mask)
    with pytest.raises(BadInput, match="has no transparency"):
        read_images(place / "opaque.png", 1, 1, unknown=True)
    Image.new("LA", (8, 8), (90, 255)).save(place / "opaque_grey.png")
    with pytest.raises(BadInput, match="without transparent pixels"):
        read_images(place / "opaque_grey.png", 1, 1, unknown=True)


def test_too_few_images_raise_and_too_many_are_reported(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(place / "a.npy", np.zeros((3, 8, 8), np.uint8))
    assert read_images(place / "a.npy", 2, 1).shape == (2, 1, 8, 8)
    assert "the first 2 of 3 images are used" in capsys.readouterr().err
    with pytest.raises(BadInput, match="holds 3 images, fewer than 4"):
        read_images(place / "a.npy", 4, 1)
    assert read_images(place / "opaque.png", 4, 3).shape == (4, 3, 8, 8)  # one image for all
