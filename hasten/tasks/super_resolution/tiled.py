"""Enlarge an image of any size tile by tile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...distributed.ranks import Ranks
from ...errors import BadInput
from ...model.model import Model
from ...model.resolve import Resolved
from .grid import TileGrid
from .noise_field import NoiseField, TileNoise
from .tile_store import to_unit

__all__ = ["TileJob", "channels_for"]

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


class Store(Protocol):
    """What `MemoryStore` and `FileStore` have in common."""

    finished: set[tuple[int, int]]
    bands: int

    def put(self, row: int, column: int, tiles: Tensor) -> None: ...
    def get(self, row: int, column: int) -> Tensor: ...
    def write(self, begin: int, rows: Tensor) -> None: ...
    def end_band(self, band: int) -> None: ...


def channels_for(model: Model, channels: int) -> int:
    """How many images the model makes of one of so many channels: one, or one for each channel.

    Raises:
        BadInput: where neither gives an image.
    """
    own = model.shape[0]
    if own == channels or (own == 3 and channels == 1):
        return 1
    if own == 1:
        return channels
    raise BadInput(f"{model.name} enlarges images of {own} channels, this one has {channels}")


@dataclass
class TileJob:
    """An image to enlarge.

    Tiles are enlarged independently, from windows of one noise field, and blended by windows that sum to one.

    Args:
        model: of super-resolution.
        resolved: how it samples.
        pixels: (h, w, C) of 0..white, or float32 in [-1, 1].
        white: of the pixels.
        grid: the tiles.
        seed: of the noise.
        batch_size: tiles in the network at once.
    """

    model: Model
    resolved: Resolved
    pixels: np.ndarray
    white: int
    grid: TileGrid
    seed: int = 0
    batch_size: int = 8

    def run(
        self,
        store: Store | None,
        advance: Callable[[float], Any] = lambda tiles: None,
        ranks: Ranks | None = None,
    ) -> None:
        """Enlarge what the store has not yet, and set its pixels, row of tiles by row of tiles.

        Args:
            store: of the tiles and the result, in the main process; None in the others.
            advance: called with the tiles, or parts of them, that have been enlarged since the last call.
            ranks: processes among which the batches of each row are dealt; all call this. None: this one alone.

        Raises:
            ProcessLost: where another process ends early.
        """
        ranks = Ranks(self.model.device) if ranks is None else ranks
        rows, columns = self.grid.shape
        for row in range(rows):
            batches = ranks.on_main_process(functools.partial(self._missing, store, row))
            advance(columns - sum(len(batch) for batch in batches))
            if ranks.world == 1 and store is not None:
                for batch in batches:
                    store.put(row, batch[0], self._enlarge(row, batch, advance))
            elif batches:
                pieces = ranks.distribute(len(batches), functools.partial(self._piece, row, batches))
                for batch, piece in zip(batches, pieces, strict=True):
                    if store is not None and piece is not None:
                        store.put(row, batch[0], piece[0])
                        advance(len(batch))
            if store is not None and row >= store.bands:
                begin, end = self.grid.rows.band(row)
                store.write(begin, self._blend(store, row, begin, end))
                store.end_band(row)

    def _missing(self, store: Store | None, row: int) -> list[range]:
        """The batches of columns of a row that the store, that of the main process, lacks."""
        assert store is not None
        if row < store.bands - 1:  # only the last band's tiles are needed for the next one
            return []
        columns = range(self.grid.shape[1])
        batches = [columns[first : first + self.batch_size] for first in columns[:: self.batch_size]]
        return [batch for batch in batches if (row, batch[0]) not in store.finished]

    def _piece(self, row: int, batches: list[range], number: int) -> tuple[Tensor]:
        """The tiles of one of the batches."""
        return (self._enlarge(row, batches[number], lambda tiles: None),)

    def source(self, begin: int, end: int) -> Tensor:
        """Rows of the image, (C, n, w) in [-1, 1]."""
        return to_unit(self.pixels[begin:end], self.white)

    def _enlarge(self, row: int, columns: range, advance: Callable[[float], Any]) -> Tensor:
        """The enlarged tiles (n, C, H, W) of some columns of a row."""
        factor, height, width = self.grid.rows.factor, self.grid.rows.tile, self.grid.columns.tile
        top, lefts = self.grid.rows.starts[row], [self.grid.columns.starts[column] for column in columns]
        small = torch.stack([self._tile(top, left) for left in lefts])
        channels, own = small.shape[1], self.model.shape[0]
        each = channels_for(self.model, channels)
        images = small.flatten(0, 1)[:, None] if each > 1 else small.expand(-1, own, -1, -1)
        places = [(factor * top, factor * left, factor * height, factor * width) for left in lefts for _ in range(each)]
        noise = TileNoise(NoiseField(self.seed, own), places, self.model.device)
        past = 0.0

        def tick(done: int, total: int) -> None:
            nonlocal past
            advance(len(lefts) * done / max(total, 1) - past)
            past = len(lefts) * done / max(total, 1)

        sampled = self.model.sample(
            len(images), images=images, noise=noise, config=self.resolved, batch_size=len(images), progress=tick
        )
        advance(len(lefts) - past)
        if each > 1:
            return sampled.view(len(lefts), channels, *sampled.shape[2:])
        if channels != own:
            return (sampled * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return sampled

    def _tile(self, top: int, left: int) -> Tensor:
        """A tile of the image, (C, h, w) in [-1, 1], mirrored where it reaches beyond its end."""
        height, width = self.grid.rows.tile, self.grid.columns.tile
        part = self.pixels[top : top + height, left : left + width]
        lacking = (height - part.shape[0], width - part.shape[1])
        if any(lacking):
            part = np.pad(part, ((0, lacking[0]), (0, lacking[1]), (0, 0)), mode="symmetric")
        return to_unit(part, self.white)

    def _blend(self, store: Store, row: int, begin: int, end: int) -> Tensor:
        """The rows `begin` to `end` of the result, (C, n, W), of this row of tiles and the one before."""
        vertical, horizontal = self.grid.rows, self.grid.columns
        result = torch.zeros(self.pixels.shape[2], end - begin, horizontal.factor * horizontal.size)
        for above in (row - 1, row) if row else (row,):
            top = vertical.factor * vertical.starts[above]
            length = vertical.factor * vertical.tile
            first, last = max(begin, top), min(end, top + length)
            down = vertical.window(above)[first - top : last - top, None]
            for column, start in enumerate(horizontal.starts):
                left = horizontal.factor * start
                part = result[:, first - begin : last - begin, left : left + horizontal.factor * horizontal.tile]
                weights = down * horizontal.window(column)[: part.shape[2]]
                tile = store.get(above, column)
                part += weights * tile[:, first - top : last - top, : part.shape[2]]
        return result
