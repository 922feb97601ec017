"""Overlapping tiles of an image, and the windows that blend them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BadInput

__all__ = ["Axis", "TileGrid"]


@dataclass(frozen=True)
class Axis:
    """Tiles along one side of an image: evenly spread, neighbours overlap by `overlap` pixels or more.

    Between two neighbours the weight passes from one to the other along half a period of a cosine, half of `overlap`
    wide and in the middle of what they share; the windows sum to 1. What is nearer to the edge of a tile than a quarter
    of `overlap` has weight 0, where another tile has it too.

    Args:
        size: of the image, in pixels.
        tile: side of a tile; a smaller image has one tile, beyond its end.
        overlap: at least, at most a third of `tile`.
        factor: of the windows and bands, whose pixels are those of the result.
    """

    size: int
    tile: int
    overlap: int
    factor: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.tile < 1:
            raise BadInput(f"an image and its tiles need pixels, got {self.size} and {self.tile}")
        if not 0 <= self.overlap <= self.tile // 3:
            raise BadInput(f"tiles of {self.tile} can overlap by 0 to {self.tile // 3} pixels, got {self.overlap}")

    @property
    def starts(self) -> tuple[int, ...]:
        """The first pixel of each tile."""
        if self.size <= self.tile:
            return (0,)
        n = math.ceil((self.size - self.overlap) / (self.tile - self.overlap))
        return tuple(round(k * (self.size - self.tile) / (n - 1)) for k in range(n))

    def ramp(self, k: int) -> tuple[int, int]:
        """Where the weight passes from tile k to the next, in pixels of the result: first pixel, and one past the
        last."""
        starts = self.starts
        middle = self.factor * (starts[k] + self.tile + starts[k + 1]) // 2
        half = self.factor * self.overlap // 4
        return middle - half, middle + half

    def band(self, k: int) -> tuple[int, int]:
        """The pixels of the result that need tiles up to k and no later one, and are not in an earlier band."""
        last = len(self.starts) - 1
        begin = 0 if k == 0 else self.ramp(k - 1)[0]
        return begin, self.factor * self.size if k == last else self.ramp(k)[0]

    def window(self, k: int) -> Tensor:
        """Weights (factor * tile,) of tile k, float32."""
        first, length = self.factor * self.starts[k], self.factor * self.tile
        at = torch.arange(first, first + length, dtype=torch.float64) + 0.5
        weights = torch.ones_like(at)
        for junction, sign in ((k - 1, 1.0), (k, -1.0)):
            if 0 <= junction < len(self.starts) - 1:
                low, high = self.ramp(junction)
                part = ((at - low) / max(high - low, 1e-9)).clamp(0, 1)
                weights = weights * (0.5 - sign * 0.5 * torch.cos(math.pi * part))
        return weights.float()


@dataclass(frozen=True)
class TileGrid:
    """The tiles of an image, row by row.

    Args:
        rows, columns: of the tiles.
    """

    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, size: tuple[int, int], tile: tuple[int, int], overlap: int, factor: int) -> TileGrid:
        """The tiles of an image of `size` (height, width). tile: their height and width; overlap: as of `Axis`."""
        height, width = (Axis(s, t, overlap, factor) for s, t in zip(size, tile, strict=True))
        return cls(height, width)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows.starts), len(self.columns.starts)

    def __len__(self) -> int:
        """The number of tiles."""
        return self.shape[0] * self.shape[1]
