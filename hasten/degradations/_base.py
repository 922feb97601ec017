"""Base class of the degradations."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Degradation"]


class Degradation:
    """A frozen dataclass that turns clean images into degraded ones of the same shape, or of a
    smaller one."""

    def __call__(self, images: Tensor, indices: list[int]) -> Tensor:
        """Degraded images, uint8 (n, C, H, W), or (n, C, H / factor, W / factor).

        Args:
            images: uint8 (n, C, H, W).
            indices: of the images in their data: what is random depends on these alone.
        """
        raise NotImplementedError


def to_pixels(x: Tensor) -> Tensor:
    """Floats in 0..255, rounded and clamped, as uint8."""
    return x.round().clamp(0, 255).to(torch.uint8)
