"""Tiny models that read a source image, and images to train them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.model.model import Model
from hasten.nets.lwtdm import LWTDM
from hasten.schedules import VPCosine
from hasten.schedules.discrete import Discrete
from hasten.utils.resizing import enlarge

SIDE, FACTOR = 16, 2


class Own(nn.Module):
    """A stranger's network: two convolutions of [x, source], and the time."""

    source_channels, source_factor = 3, FACTOR

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.config = {"width": width}
        self.first, self.conv_out = nn.Conv2d(6, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.time = nn.Linear(1, width)

    def forward(self, x: Tensor, time: Tensor, source: Tensor) -> Tensor:
        h = self.first(torch.cat([x, enlarge(source.to(x.dtype), FACTOR)], 1))
        return self.conv_out(torch.tanh(h + self.time(time[:, None].to(h.dtype))[:, :, None, None]))


class Points(nn.Module):
    """Exact where each source has a single image: x0 is twice the negated enlarged source, whatever x_t."""

    source_channels, source_factor = 3, FACTOR

    def __init__(self, scale: float = -2.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, time: Tensor, source: Tensor) -> Tensor:
        return self.scale * enlarge(source, FACTOR)


def lwtdm() -> LWTDM:
    """The smallest LWTDM, x2."""
    torch.manual_seed(0)
    return LWTDM(3, factor=FACTOR, width=32, levels=1, inner=8, middle=1, dropout=0.0).eval()


def source_model(net: nn.Module | None = None, prediction: str = "v", **changes: Any) -> Model:
    """A model of 16 x 16 from 8 x 8 pixels, of the codec residual; eps on a table of 100, other predictions on the
    cosine."""
    torch.manual_seed(0)
    net = lwtdm() if net is None else net
    schedule: Any = VPCosine(offset=0.0)
    if prediction == "eps":
        schedule = Discrete.from_betas(torch.linspace(1e-3, 0.1, 100, dtype=torch.float64))
    denoiser = Denoiser(net, schedule, prediction).requires_grad_(False).eval()
    card = {"process": "super_resolution:factor=2", "degrade": "low_resolution:factor=2", "crop": SIDE, "flip": True}
    common = {"codec": "residual", "residual_std": 0.2, "card": card, "steps": 4}
    return Model(denoiser, "tiny", (3, SIDE, SIDE), **{**common, **changes})


def pictures(folder: Path, count: int = 4) -> Path:
    """A folder of images of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for k in range(count):
        small = Image.fromarray(rng.integers(0, 256, (6, 7 + k, 3), dtype=np.uint8))
        small.resize((30 + 2 * k, 24), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
    return folder
