"""Degradations: what each keeps and loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.errors import BadInput
from hasten.pick import method_names, pick

IMAGES = torch.randint(0, 256, (3, 3, 16, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("name", method_names("degradations"))
def test_shape_type_and_repetition(name: str) -> None:
    degrade = pick("degradations", name)
    out = degrade(IMAGES, [5, 6, 7])
    small = name == "low_resolution"
    assert out.shape == ((3, 3, 4, 6) if small else IMAGES.shape) and out.dtype == torch.uint8
    assert small or not torch.equal(out, IMAGES)
    assert torch.equal(out, degrade(IMAGES, [5, 6, 7]))
    assert torch.equal(out[1:2], degrade(IMAGES[1:2], [6]))
    assert torch.equal(IMAGES, torch.randint(0, 256, (3, 3, 16, 24), generator=torch.Generator().manual_seed(0)))


def test_each_in_its_own_way() -> None:
    flat = torch.full((1, 1, 8, 8), 200, dtype=torch.uint8)
    for name in ("downscale:factor=2", "blur:std=1", "jpeg:quality=90"):
        assert int((pick("degradations", name)(flat, [0]).int() - 200).abs().max()) <= 1
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(8).expand(1, 1, 16, 16).contiguous()
    assert float(pick("degradations", "blur:std=3")(stripes, [0]).float().std()) < 20
    point = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    point[..., 16, 16] = 255
    spread = pick("degradations", "blur:std=1")(point, [0]).double()[0, 0]
    places = torch.arange(33, dtype=torch.float64) - 16
    assert float((spread.sum(0) * places**2).sum() / spread.sum()) == pytest.approx(1, abs=0.15)
    small = pick("degradations", "low_resolution:factor=4,noise=50,blur=2,jpeg=20")(flat, [1])
    assert small.shape == (1, 1, 2, 2) and 0 < float((small.float() - 200).abs().max()) < 150
    from PIL import Image

    pillow = Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).resize((6, 4), Image.Resampling.BICUBIC)
    ours = pick("degradations", "low_resolution:factor=4")(IMAGES[:1], [0])[0].permute(1, 2, 0)
    assert int((ours.int() - torch.from_numpy(np.array(pillow)).int()).abs().max()) <= 1
    masked = pick("degradations", "mask:fraction=0.5")(flat, [3])
    assert int((masked == 128).sum()) == 16
    grey = pick("degradations", "grey")(IMAGES, [0, 1, 2])
    assert torch.equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("downscale:factor=5", "does not divide"), ("downscale:factor=1", "at least 2"), ("blur:std=0", "positive"),
        ("mask:fraction=1", r"\(0, 1\)"), ("jpeg:quality=0", "quality"),
    ],
)  # fmt: skip
def test_bad_options(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        pick("degradations", text)(IMAGES, [0, 1, 2])
    with pytest.raises(BadInput, match="3 channels"):
        pick("degradations", "grey")(IMAGES[:, :1], [0, 1, 2])
