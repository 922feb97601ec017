"""JPEG artefacts."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput, check_int
from ._base import Degradation


@dataclass(frozen=True)
class Jpeg(Degradation):
    """Compression by Pillow's JPEG encoder.

    Args:
        quality: 1 to 95.
    """

    quality: int = 10

    def __post_init__(self) -> None:
        check_int("jpeg: quality", self.quality, 1, 95)

    def __call__(self, images: Tensor, indices: list[int]) -> Tensor:
        from PIL import Image

        if images.shape[1] not in (1, 3):
            raise BadInput(f"jpeg: the images must have 1 or 3 channels, found {images.shape[1]}")
        mode = "L" if images.shape[1] == 1 else "RGB"
        rows = []
        for image in images:
            buffer = io.BytesIO()
            pixels = image.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels[..., 0] if mode == "L" else pixels).save(buffer, "JPEG", quality=self.quality)
            decoded = np.array(Image.open(buffer).convert(mode))
            rows.append(torch.from_numpy(decoded.reshape(*pixels.shape)).permute(2, 0, 1))
        return torch.stack(rows)
