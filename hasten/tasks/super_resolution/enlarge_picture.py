"""One picture from its pixels to the rows of its enlargement: tiles, consistency, opacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...distributed.ranks import Ranks
from ...errors import BadInput, check_int
from ...utils.random import MAX_SEED
from .consistency import ConsistencyResult, back_project, measure_consistency
from .grid import TileGrid
from .pictures import Picture
from .tile_store import FileStore, MemoryStore, from_unit, to_unit
from .tiled import TileJob, channels_for

if TYPE_CHECKING:
    from ...model.model import Model
    from ...model.resolve import Resolved

__all__ = ["Enlarged", "UpscaleRequest", "enlarge_picture", "grid_for"]

MakeStore = Callable[[tuple[int, int, int, int], tuple[int, int, int], Any, int], "MemoryStore | FileStore"]


@dataclass(frozen=True)
class UpscaleRequest:
    """How images are enlarged, beside how the model samples.

    Args:
        seed: of the noise field of each image.
        tile: side of a tile in pixels of the small image. Default: the size that the model was trained with.
        overlap: of tiles, in pixels of the small image, at most a third of a tile. Default: a quarter of a tile.
        consistent: correct the result so that it reduces to the small image, by iterative back-projection.
        batch_size: tiles in the network at once.

    Raises:
        BadInput: for numbers out of range.
    """

    seed: int = 0
    tile: int | None = None
    overlap: int | None = None
    consistent: bool = False
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0, MAX_SEED)
        check_int("batch_size", self.batch_size, 1)
        if self.tile is not None:
            check_int("tile", self.tile, 1)
        if self.overlap is not None:
            check_int("overlap", self.overlap, 0)


def grid_for(model: Model, size: tuple[int, int], request: UpscaleRequest) -> TileGrid:
    """The tiles of an image of this height and width.

    Raises:
        BadInput: for tiles that the network does not take, and too large an overlap.
    """
    factor = model.source_factor
    own = tuple(side // factor for side in model.shape[1:])
    tile = own if request.tile is None else (request.tile, request.tile)
    step = max(int(getattr(model.denoiser.net, "multiple", factor)) // factor, 1)
    if any(side % step for side in tile):
        below, above = max(tile[0] // step, 1) * step, -(-tile[0] // step) * step
        choices = f"{below} or {above}" if below != above else f"{above}"
        raise BadInput(f"tile must be a multiple of {step} for {model.name}, got {tile[0]}: use {choices}")
    overlap = min(tile) // 4 if request.overlap is None else request.overlap
    if overlap > min(tile) // 3:
        raise BadInput(f"overlap must be at most a third of the tile of {min(tile)}, {min(tile) // 3}, got {overlap}")
    return TileGrid.of(size, (tile[0], tile[1]), overlap, factor)


@dataclass
class Enlarged:
    """The result for one picture, of which rows are read as they are needed.

    Args:
        picture: the small one.
        factor: of the enlargement.
        rows: function of the first row and one past the last: (C, n, W) in [-1, 1].
        consistency: of the result in whole values with the small picture.
    """

    picture: Picture
    factor: int
    rows: Callable[[int, int], Tensor]
    consistency: ConsistencyResult

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels, with the opacity."""
        height, width, channels = self.picture.pixels.shape
        return height * self.factor, width * self.factor, channels + (self.picture.alpha is not None)

    def values(self, begin: int, end: int) -> np.ndarray:
        """Rows of pixels (n, W, C) of the type of the small ones, the opacity last."""
        picture = self.picture
        pixels = from_unit(self.rows(begin, end), picture.white, picture.pixels.dtype)
        if picture.alpha is None:
            return pixels
        return np.concatenate([pixels, enlarge_alpha(picture.alpha, self.factor, begin, end)[..., None]], axis=2)


def enlarge_picture(
    model: Model,
    resolved: Resolved,
    picture: Picture,
    request: UpscaleRequest,
    make_store: MakeStore = MemoryStore,
    advance: Callable[[float], Any] = lambda tiles: None,
    ranks: Ranks | None = None,
) -> Enlarged | None:
    """Enlarge a picture.

    Args:
        model: of super-resolution.
        resolved: how it samples.
        picture: of uint8, uint16, or float32 in [-1, 1].
        request: tiles, seed and consistency.
        make_store: of the shapes of tiles and pixels, their type and white: a store; see `MemoryStore`.
        advance: called with the tiles that have been enlarged since the last call.
        ranks: processes that share the tiles; all call this. None: this one alone.

    Returns:
        the result, which reads from the store; None in other processes than the main one.
    """
    grid, factor = grid_for(model, picture.size, request), model.source_factor
    height, width, channels = picture.pixels.shape
    channels_for(model, channels)
    dtype, white = picture.pixels.dtype, picture.white
    if request.consistent and dtype == np.uint8:
        dtype, white = np.dtype(np.uint16), 2**16 - 1  # which is rounded to 8 bits after the correction
    columns = grid.shape[1]
    job = TileJob(model, resolved, picture.pixels, picture.white, grid, request.seed, request.batch_size)
    if ranks is not None and not ranks.is_main_process:
        job.run(None, ranks=ranks)
        return None
    store = make_store(
        (columns, channels, factor * grid.rows.tile, factor * grid.columns.tile),
        (factor * height, factor * width, channels),
        dtype,
        white,
    )
    job.run(store, advance, ranks)
    rows: Callable[[int, int], Tensor] = store.read
    if request.consistent:
        rows, _ = back_project(job.source, store.read, (channels, height, width), factor)

    def rounded(begin: int, end: int) -> Tensor:
        """The rows as they are written."""
        return to_unit(from_unit(rows(begin, end), picture.white, picture.pixels.dtype), picture.white)

    return Enlarged(picture, factor, rows, measure_consistency(job.source, rounded, height, factor))


def enlarge_alpha(alpha: np.ndarray, factor: int, begin: int, end: int) -> np.ndarray:
    """Rows of the opacity (h, w), enlarged by Lanczos interpolation."""
    from PIL import Image

    height, width = alpha.shape
    margin = 4  # rows: the kernel reaches three
    first, last = max(begin // factor - margin, 0), min(-(-end // factor) + margin, height)
    part = Image.fromarray(alpha[first:last].astype(np.float32))
    box = (0, begin / factor - first, width, end / factor - first)
    large = np.asarray(part.resize((width * factor, end - begin), Image.Resampling.LANCZOS, box=box))
    return large.round().clip(0, np.iinfo(alpha.dtype).max).astype(alpha.dtype)


def to_tensor(values: np.ndarray) -> Tensor:
    """Floats (h, w, C) as a tensor (C, h, w)."""
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
