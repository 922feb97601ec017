"""One noise for a whole image, of which every tile sees its part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import check_int
from ...utils.devices import upload
from ...utils.random import MAX_SEED, Noise, make_generator

__all__ = ["NoiseField", "TileNoise"]

BLOCK = 64  # pixels


@dataclass(frozen=True)
class NoiseField:
    """Standard normal noise on the whole plane: a pixel's depends on the seed, its place and `draw` alone.

    It is made in squares, each by a generator whose seed is a SHA-256 of these, so that no more of it than a window is
    ever in memory, and windows that overlap agree.

    Args:
        seed: from 0 to 2^64 - 1.
        channels: C of a pixel.
    """

    seed: int
    channels: int

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0, MAX_SEED)

    def window(self, top: int, left: int, height: int, width: int, draw: int = 0) -> Tensor:
        """The noise (C, height, width) of a window, float32. draw: 0, the initial noise; 1 and on, that of steps."""
        result = torch.empty(self.channels, height, width)
        for i in range(top // BLOCK, (top + height - 1) // BLOCK + 1):
            for j in range(left // BLOCK, (left + width - 1) // BLOCK + 1):
                y, x = i * BLOCK - top, j * BLOCK - left
                rows, columns = slice(max(y, 0), y + BLOCK), slice(max(x, 0), x + BLOCK)
                block = self._block(i, j, draw)[:, max(-y, 0) :, max(-x, 0) :]
                part = result[:, rows, columns]
                part.copy_(block[:, : part.shape[1], : part.shape[2]])
        return result

    def _block(self, i: int, j: int, draw: int) -> Tensor:
        """Square (i, j) of the field, (C, BLOCK, BLOCK)."""
        digest = hashlib.sha256(f"{self.seed} {draw} {i} {j}".encode()).digest()
        generator = make_generator(int.from_bytes(digest[:8], "big"))
        return torch.randn((self.channels, BLOCK, BLOCK), generator=generator)


class TileNoise(Noise):
    """The noise of a batch of tiles: windows of one field, also of the noise of each step.

    Args:
        field: of the image.
        places: top, left, height and width of each tile, in pixels of the result; all of one size.
        device: of the results.
    """

    def __init__(
        self, field: NoiseField, places: Sequence[tuple[int, int, int, int]], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__([field.seed] * len(places), (field.channels, *places[0][2:]), torch.float32, device)
        self.field, self.places, self.drawn = field, tuple(places), 0

    def initial(self) -> Tensor:
        """The initial noise, (B, C, H, W); the same at every call."""
        return self._windows(0)

    def draw(self) -> Tensor:
        """The next noise, (B, C, H, W)."""
        self.drawn += 1
        return self._windows(self.drawn)

    __call__ = draw

    def rows(self, part: slice) -> TileNoise:
        """The noise of these tiles alone, from its beginning."""
        return TileNoise(self.field, self.places[part], self.device)

    def _windows(self, draw: int) -> Tensor:
        """The windows of one draw of the field."""
        windows = torch.stack([self.field.window(*place, draw=draw) for place in self.places])
        return upload(windows, self.device, self.dtype)
