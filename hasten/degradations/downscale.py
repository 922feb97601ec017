"""Fewer pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput, check_int
from ._base import Degradation, to_pixels


@dataclass(frozen=True)
class Downscale(Degradation):
    """Bicubic reduction with antialiasing, and bicubic enlargement to the size before.

    Args:
        factor: of the reduction, which must divide height and width; at least 2.
    """

    factor: int = 4

    def __post_init__(self) -> None:
        check_int("downscale: factor", self.factor, 2)

    def __call__(self, images: Tensor, indices: list[int]) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise BadInput(f"downscale: factor {self.factor} does not divide images of {width}x{height}")
        small = (height // self.factor, width // self.factor)
        low = F.interpolate(images.float(), small, mode="bicubic", antialias=True).round().clamp(0, 255)
        return to_pixels(F.interpolate(low, (height, width), mode="bicubic"))
