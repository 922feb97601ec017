"""Differentiable augmentation, so that a discriminator sees real and generated images augmented by the same policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput

__all__ = ["Augment"]


@dataclass(frozen=True)
class Augment:
    """A random augmentation of each image, differentiable in the image: `(B, C, H, W) -> (B, C, H, W)`.

    Tensors that are not images pass unchanged. The same policy must be applied to real and generated images, and the
    generator's gradient must pass through it: augmenting the real images alone teaches the generator to make augmented
    ones. Random numbers come from torch's global generator.

    Args:
        brightness: a number in [-brightness, brightness] is added to the whole image; >= 0, 0 for none.
        translation: maximum shift along each axis as a fraction of the side, in [0, 1]; the border is repeated.
        cutout: a rectangle of this fraction of each side, at a random position (clipped at the border), is set to 0;
            in [0, 1].

    Raises:
        BadInput: if a value is out of range.

    References:
        Zhao, Liu, Lin, Zhu, Han 2020, arXiv:2006.10738 (theirs: 1/2 for images in [-1, 1], 1/8, 1/2).
    """

    brightness: float = 0.5
    translation: float = 0.125
    cutout: float = 0.5

    def __post_init__(self) -> None:
        if self.brightness < 0 or not (0 <= self.translation <= 1 and 0 <= self.cutout <= 1):
            raise BadInput(
                "Augment needs brightness >= 0, and translation and cutout in [0, 1], got "
                f"{self.brightness}, {self.translation} and {self.cutout}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """Augment each image of `x` (B, C, H, W)."""
        if x.ndim != 4:
            return x
        n, device = len(x), x.device
        if self.brightness:
            x = x + self.brightness * (2 * torch.rand(n, 1, 1, 1, device=device).to(x.dtype) - 1)
        if self.translation:
            rows, columns = (self._source_indices(n, side, device) for side in x.shape[2:])
            x = x.gather(2, rows[:, None, :, None].expand_as(x)).gather(3, columns[:, None, None, :].expand_as(x))
        if self.cutout:
            rows, columns = (self._cutout_mask(n, side, device) for side in x.shape[2:])
            x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
        return x

    def _source_indices(self, n: int, side: int, device: torch.device | str = "cpu") -> Tensor:
        """The source row of each row of the shifted images, int64 (n, side)."""
        maximum = round(self.translation * side)
        shifts = torch.randint(-maximum, maximum + 1, (n, 1), device=device)
        return (torch.arange(side, device=device) + shifts).clamp(0, side - 1)

    def _cutout_mask(self, n: int, side: int, device: torch.device | str = "cpu") -> Tensor:
        """Which rows lie in the rectangle, bool (n, side)."""
        length = round(self.cutout * side)
        start = torch.randint(-(length // 2), side - (length + 1) // 2 + 1, (n, 1), device=device)
        row = torch.arange(side, device=device)
        return (row >= start) & (row < start + length)
