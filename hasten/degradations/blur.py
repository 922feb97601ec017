"""Gaussian blur."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput
from ._base import Degradation, to_pixels


@dataclass(frozen=True)
class Blur(Degradation):
    """Gaussian blur with reflected borders.

    Args:
        std: of the kernel in pixels, > 0.
    """

    std: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.std < 1e3:
            raise BadInput(f"blur: std must be positive, found {self.std}")

    def __call__(self, images: Tensor, indices: list[int]) -> Tensor:
        x = images.float()
        for axis in (-1, -2):
            radius = min(math.ceil(3 * self.std), x.shape[axis] - 1)
            offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
            kernel = torch.exp(-((offsets / self.std) ** 2) / 2)
            kernel = (kernel / kernel.sum()).view((1, 1, 1, -1) if axis == -1 else (1, 1, -1, 1))
            pad = (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius)
            flat = F.pad(x.flatten(0, 1)[:, None], pad, mode="reflect")
            x = F.conv2d(flat, kernel).view_as(x)
        return to_pixels(x)
