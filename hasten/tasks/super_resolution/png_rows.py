"""PNG files of any size and 8 or 16 bits, written some rows at a time."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

__all__ = ["PngRows"]

COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels: grey, grey + alpha, RGB, RGBA


class PngRows:
    """A writer of a PNG file. Every row has the filter with the least sum of absolute differences.

    Args:
        file: to write to.
        shape: height, width and channels, 1 to 4; with 2 and 4 the last is the opacity.
        bits: 8 or 16.
        profile: ICC profile, or None.
        text: metadata, for text chunks.

    References:
        ISO/IEC 15948 (PNG).
    """

    def __init__(
        self,
        file: BinaryIO,
        shape: tuple[int, int, int],
        bits: int,
        profile: bytes | None = None,
        text: Mapping[str, str] | None = None,
    ) -> None:
        height, width, channels = shape
        self.file, self.shape, self.step = file, shape, channels * bits // 8
        self.dtype = np.dtype(np.uint8 if bits == 8 else ">u2")
        self.above: np.ndarray = np.zeros(width * self.step, np.uint8)
        self.deflate = zlib.compressobj(6)
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, COLOUR[channels], 0, 0, 0))
        if profile:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
        for key, value in (text or {}).items():
            self._chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + value.encode())

    def write(self, rows: np.ndarray) -> None:
        """The next rows, unsigned integers (n, W, C)."""
        raw = np.ascontiguousarray(rows, self.dtype).view(np.uint8).reshape(len(rows), -1)
        if len(raw):
            self._data(self.deflate.compress(self._filtered(raw).tobytes()))

    def close(self) -> None:
        """The end of the file."""
        self._data(self.deflate.flush())
        self._chunk(b"IEND", b"")

    def _data(self, data: bytes) -> None:
        """Some of the compressed pixels."""
        if data:
            self._chunk(b"IDAT", data)

    def _chunk(self, kind: bytes, data: bytes) -> None:
        """A chunk with its length and check sum."""
        self.file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    def _filtered(self, raw: np.ndarray) -> np.ndarray:
        """The rows (n, bytes) after their filters, whose numbers are the first column."""
        up = np.concatenate([self.above[None], raw[:-1]])
        self.above = raw[-1].copy()
        left, corner = np.zeros_like(raw), np.zeros_like(raw)
        left[:, self.step :], corner[:, self.step :] = raw[:, : -self.step], up[:, : -self.step]
        a, b, c = (values.astype(np.int16) for values in (left, up, corner))
        pa, pb, pc = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
        paeth = np.where((pa <= pb) & (pa <= pc), left, np.where(pb <= pc, up, corner))
        best = np.concatenate([np.ones((len(raw), 1), np.uint8), raw - left], 1)
        cost = _cost(raw - left)
        for number, guess in ((2, up), (4, paeth)):
            rest = raw - guess
            less = (this := _cost(rest)) < cost
            best[less, 0], best[less, 1:], cost = number, rest[less], np.minimum(cost, this)
        return best


def _cost(rest: np.ndarray) -> np.ndarray:
    """The sum of absolute values of each row, of bytes as signed."""
    return np.abs(rest.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64)
