"""Where enlarged tiles and rows of pixels are kept until an image is complete: in memory, or in a folder."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ...files import append_json_line, first_difference, read_json_lines, write_atomic

__all__ = ["FileStore", "MemoryStore", "from_unit", "to_unit"]

Shape = tuple[int, int, int]


def to_unit(values: np.ndarray, white: int) -> Tensor:
    """Pixels (h, w, C) of 0..white, or floats in [-1, 1], as floats (C, h, w) in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))
    return (x if values.dtype == np.float32 else x.div_(white / 2).sub_(1)).permute(2, 0, 1)


def from_unit(x: Tensor, white: int, dtype: Any) -> np.ndarray:
    """Floats (C, h, w) in [-1, 1] as pixels (h, w, C) of 0..white, or as floats."""
    x = x.permute(1, 2, 0)
    if dtype == np.float32:
        return np.ascontiguousarray(x.numpy())
    return x.add(1).mul_(white / 2).round_().clamp_(0, white).numpy().astype(dtype)


class MemoryStore:
    """Tiles and pixels in memory.

    Args:
        tiles: shape (columns, C, height, width) of a row of tiles.
        pixels: shape (H, W, C) of the result.
        dtype: of its pixels, uint8, uint16 or float32.
        white: of the pixels.
    """

    def __init__(self, tiles: tuple[int, int, int, int], pixels: Shape, dtype: Any, white: int) -> None:
        self.dtype, self.white, self.size = np.dtype(dtype), white, pixels
        self.pixels = np.zeros(pixels, self.dtype)
        self.rows = torch.zeros(2, *tiles)
        self.finished: set[tuple[int, int]] = set()
        self.bands = 0

    def put(self, row: int, column: int, tiles: Tensor) -> None:
        """Keep tiles (n, C, h, w) of a row, from a column on; those of two rows before are overwritten."""
        self.rows[row % 2, column : column + len(tiles)] = tiles
        self.finished.add((row, column))

    def get(self, row: int, column: int) -> Tensor:
        """A tile (C, h, w) of the present row or the one before."""
        return self.rows[row % 2, column]

    def write(self, begin: int, rows: Tensor) -> None:
        """Set rows of the result, (C, n, W) in [-1, 1], from row `begin`."""
        self.pixels[begin : begin + rows.shape[1]] = from_unit(rows, self.white, self.dtype)

    def end_band(self, band: int) -> None:
        """All rows of the result up to this band's are set."""
        self.bands = band + 1

    def read(self, begin: int, end: int) -> Tensor:
        """Rows of the result, (C, n, W) in [-1, 1]."""
        return to_unit(self.pixels[begin:end], self.white)

    def close(self) -> None:
        """Release the files, if any."""


class FileStore:
    """Tiles and pixels in a folder, of which only what is read or written is in memory. What was finished when the
    process ended, however that happened, is found again.

    Args:
        folder: of this result alone.
        tiles, pixels, dtype, white: see `MemoryStore`.
        config: all that the result depends on.

    Attributes:
        changed: the setting in which the config differs from that of what the folder held, which was removed: its
            name, old and new value; None where nothing was.
    """

    def __init__(
        self,
        folder: Path,
        tiles: tuple[int, int, int, int],
        pixels: Shape,
        dtype: Any,
        white: int,
        config: dict[str, Any],
    ) -> None:
        self.folder, self.shape, self.size = folder, tiles, pixels
        self.dtype, self.white = np.dtype(dtype), white
        config = {**config, "tiles": list(tiles), "pixels": list(pixels), "dtype": str(self.dtype), "white": white}
        known: Any = None
        with suppress(OSError, ValueError):
            known = json.loads((folder / "config.json").read_text())
        self.changed = first_difference(known, config) if isinstance(known, dict) else None
        if not isinstance(known, dict) or self.changed is not None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "config.json", json.dumps(config))
        self.log = folder / "finished.jsonl"
        lines = read_json_lines(self.log)
        self.finished = {(line["row"], line["column"]) for line in lines if "row" in line}
        self.bands = 1 + max((line["band"] for line in lines if "band" in line), default=-1)
        self.tile_bytes = 4 * tiles[1] * tiles[2] * tiles[3]
        self.row_bytes = pixels[1] * pixels[2] * self.dtype.itemsize
        self.tile_file, self.pixel_file = self._open("tiles.bin"), self._open("pixels.bin")

    def _open(self, name: str) -> BinaryIO:
        """A file for reading and writing, which is there afterwards."""
        path = self.folder / name
        return open(path, "r+b" if path.exists() else "w+b", buffering=0)

    def put(self, row: int, column: int, tiles: Tensor) -> None:
        """See `MemoryStore.put`."""
        self.tile_file.seek((row % 2 * self.shape[0] + column) * self.tile_bytes)
        _write_all(self.tile_file, tiles.float().contiguous().numpy().tobytes())
        append_json_line(self.log, {"row": row, "column": column})
        self.finished.add((row, column))

    def get(self, row: int, column: int) -> Tensor:
        """See `MemoryStore.get`."""
        self.tile_file.seek((row % 2 * self.shape[0] + column) * self.tile_bytes)
        data = bytearray(_read_all(self.tile_file, self.tile_bytes))
        return torch.frombuffer(data, dtype=torch.float32).view(self.shape[1:])

    def write(self, begin: int, rows: Tensor) -> None:
        """See `MemoryStore.write`."""
        self.pixel_file.seek(begin * self.row_bytes)
        _write_all(self.pixel_file, from_unit(rows, self.white, self.dtype).tobytes())

    def end_band(self, band: int) -> None:
        """See `MemoryStore.end_band`."""
        append_json_line(self.log, {"band": band})
        self.bands = band + 1

    def read(self, begin: int, end: int) -> Tensor:
        """See `MemoryStore.read`."""
        self.pixel_file.seek(begin * self.row_bytes)
        data = _read_all(self.pixel_file, (end - begin) * self.row_bytes)
        return to_unit(np.frombuffer(data, self.dtype).reshape(-1, *self.size[1:]), self.white)

    def close(self) -> None:
        """Close the files; the folder stays."""
        self.tile_file.close()
        self.pixel_file.close()

    def remove(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write all of the data, synced to disk, so that the log never names what is not there."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def _read_all(file: BinaryIO, count: int) -> bytes:
    """So many bytes. Raises OSError where the file ends before."""
    parts = []
    while count:
        part = file.read(count)
        if not part:
            raise OSError(f"{getattr(file, 'name', 'a file')} ends early: remove its folder")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
