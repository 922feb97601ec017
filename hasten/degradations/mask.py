"""A hidden square, for inpainting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ._base import Degradation


@dataclass(frozen=True)
class Mask(Degradation):
    """A mid-grey square, at a place that depends on the index of the image alone.

    Args:
        fraction: its side as a fraction of the shorter side, in (0, 1).
        center: always in the middle.
    """

    fraction: float = 0.5
    center: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise BadInput(f"mask: fraction must lie in (0, 1), found {self.fraction}")

    def __call__(self, images: Tensor, indices: list[int]) -> Tensor:
        result = images.clone()
        height, width = images.shape[-2:]
        side = max(round(self.fraction * min(height, width)), 1)
        for image, index in zip(result, indices, strict=True):
            u = torch.rand(2, generator=torch.Generator().manual_seed(index))
            u = torch.full_like(u, 0.5) if self.center else u
            top, left = int(u[0] * (height - side + 1)), int(u[1] * (width - side + 1))
            image[:, top : top + side, left : left + side] = 128
        return result
