"""No colour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ._base import Degradation, to_pixels


@dataclass(frozen=True)
class Grey(Degradation):
    """The luma of ITU-R 601 in all three channels, for colouring."""

    def __call__(self, images: Tensor, indices: list[int]) -> Tensor:
        if images.shape[1] != 3:
            raise BadInput(f"grey: the images must have 3 channels, found {images.shape[1]}")
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return to_pixels((images.float() * weights).sum(1, keepdim=True)).expand(-1, 3, -1, -1).contiguous()
