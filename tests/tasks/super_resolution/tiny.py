"""A tiny model of super-resolution whose output depends on few pixels, and pictures to enlarge."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.denoiser import Denoiser
from hasten.model import Model
from hasten.schedules import VPCosine


class LocalNet(nn.Module):
    """One 3x3 convolution of the noisy image and one of the source: an output pixel depends on its neighbours alone."""

    def __init__(self, channels: int = 3, factor: int = 2) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"channels": channels, "factor": factor}
        self.source_channels, self.source_factor, self.multiple = channels, factor, factor
        self.classes, self.null_label = 0, None
        self.noisy = nn.Conv2d(channels, channels, 3, padding=1)
        self.small = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, source: Tensor | None = None) -> Tensor:
        assert source is not None
        large = F.interpolate(self.small(source), scale_factor=float(self.source_factor), mode="nearest")
        return torch.tanh(self.noisy(x) + large) * (1 + time[:, None, None, None])


def local_model(channels: int = 3, factor: int = 2, side: int = 24, **options: Any) -> Model:
    """A model of `LocalNet`, trained (in name) on sources of side x side pixels."""
    torch.manual_seed(0)
    denoiser = Denoiser(LocalNet(channels, factor), VPCosine(offset=0.0), "v").eval().requires_grad_(False)
    shape = (channels, side * factor, side * factor)
    options = {"codec": "residual", "residual_std": 0.2, "sampler": "ddim", "times": "uniform", "steps": 2, **options}
    return Model(denoiser, "local", shape, **options)


def scene(height: int, width: int, channels: int = 3, seed: int = 0, white: int = 255) -> np.ndarray:
    """A smooth picture, uint8 or uint16 (height, width, channels), with no value at the ends of the range."""
    noise = torch.rand(1, channels, height // 4 + 2, width // 4 + 2, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(noise, (height, width), mode="bicubic", align_corners=False).clamp(0, 1) * 0.7 + 0.15
    return (x[0].permute(1, 2, 0).numpy() * white).round().astype(np.uint16 if white > 255 else np.uint8)
