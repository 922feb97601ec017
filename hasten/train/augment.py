"""Augmentation that gradients pass through, so that a critic sees real and made images changed in the same way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput

__all__ = ["Augment"]


@dataclass(frozen=True)
class Augment:
    """A random change of each image, differentiable in the image: `(B, C, H, W) -> (B, C, H, W)`.

    brightness: a number in [-brightness, brightness] is added to the whole image.
    translation: a shift of up to this share of the side, each way; the border is repeated.
    cutout: a rectangle of this share of each side, anywhere (cut by the border), is set to 0.
    0 turns each off. Data that are not images pass unchanged.

    The same policy must meet real and made images, and the generator's gradient must pass through it: augmenting the
    real images alone teaches the generator to make augmented ones. Draws come from torch's global generator.

    translation, cutout in [0, 1], brightness >= 0; BadInput otherwise.
    Reference: Zhao, Liu, Lin, Zhu, Han 2020, arXiv:2006.10738 (theirs: 1/2 for images in [-1, 1], 1/8, 1/2).
    """

    brightness: float = 0.5
    translation: float = 0.125
    cutout: float = 0.5

    def __post_init__(self) -> None:
        if self.brightness < 0 or not (0 <= self.translation <= 1 and 0 <= self.cutout <= 1):
            raise BadInput(
                "Augment needs brightness >= 0, and translation and cutout in [0, 1], found "
                f"{self.brightness}, {self.translation} and {self.cutout}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return x
        n, device = len(x), x.device
        if self.brightness:
            x = x + self.brightness * (2 * torch.rand(n, 1, 1, 1, device=device).to(x.dtype) - 1)
        if self.translation:
            rows, columns = (self._shifted(n, side, device) for side in x.shape[2:])
            x = x.gather(2, rows[:, None, :, None].expand_as(x)).gather(3, columns[:, None, None, :].expand_as(x))
        if self.cutout:
            rows, columns = (self._cut(n, side, device) for side in x.shape[2:])
            x = x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0.0)
        return x

    def _shifted(self, n: int, side: int, device: torch.device | str = "cpu") -> Tensor:
        """Where each row of a shifted image comes from, int64 (n, side)."""
        most = round(self.translation * side)
        moves = torch.randint(-most, most + 1, (n, 1), device=device)
        return (torch.arange(side, device=device) + moves).clamp(0, side - 1)

    def _cut(self, n: int, side: int, device: torch.device | str = "cpu") -> Tensor:
        """Which rows lie in the rectangle, bool (n, side)."""
        length = round(self.cutout * side)
        start = torch.randint(-(length // 2), side - (length + 1) // 2 + 1, (n, 1), device=device)
        row = torch.arange(side, device=device)
        return (row >= start) & (row < start + length)
