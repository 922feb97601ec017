"""TIFF files of any size and 8 or 16 bits, written some rows at a time."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

import numpy as np

__all__ = ["TiffRows"]

ROWS = 64  # of a strip
SHORT, LONG, LONG8, ASCII, UNDEFINED = 3, 4, 16, 2, 7
CODES = {SHORT: "H", LONG: "I", LONG8: "Q"}
LARGE = 2**32 - 2**26  # bytes of pixels from which on the file is a BigTIFF


class TiffRows:
    """A writer of a TIFF file, in strips, compressed by deflate with horizontal differences.

    Args:
        file: to write to, from its beginning.
        shape: height, width and channels, 1 to 4; with 2 and 4 the last is the opacity.
        bits: 8 or 16.
        profile: ICC profile, or None.
        text: a description, ASCII.
        large: write a BigTIFF, whose offsets have 64 bits. Default: where the pixels might need it.

    References:
        Adobe 1992, "TIFF, revision 6.0"; Adobe 2002, "Photoshop TIFF technical notes" (deflate).
    """

    def __init__(
        self,
        file: BinaryIO,
        shape: tuple[int, int, int],
        bits: int,
        profile: bytes | None = None,
        text: str = "",
        large: bool | None = None,
    ) -> None:
        height, width, channels = shape
        self.file, self.shape, self.bits = file, shape, bits
        self.large = height * width * channels * bits // 8 > LARGE if large is None else large
        self.dtype = np.dtype(np.uint8 if bits == 8 else "<u2")
        self.waiting: np.ndarray = np.empty((0, width, channels), self.dtype)
        self.offsets: list[int] = []
        self.counts: list[int] = []
        self.profile, self.text = profile, text
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if self.large else struct.pack("<2sHI", b"II", 42, 0))
        self.at = 16 if self.large else 8

    def write(self, rows: np.ndarray) -> None:
        """The next rows, unsigned integers (n, W, C)."""
        self.waiting = np.concatenate([self.waiting, rows.astype(self.dtype)])
        while len(self.waiting) >= ROWS:
            self._strip(self.waiting[:ROWS])
            self.waiting = self.waiting[ROWS:].copy()

    def close(self) -> None:
        """The rest of the pixels and the directory."""
        if len(self.waiting):
            self._strip(self.waiting)
        height, width, channels = self.shape
        offset = LONG8 if self.large else LONG
        entries: list[tuple[int, int, bytes, int]] = []

        def add(tag: int, kind: int, *values: int) -> None:
            entries.append((tag, kind, struct.pack(f"<{len(values)}{CODES[kind]}", *values), len(values)))

        add(256, LONG, width)
        add(257, LONG, height)
        add(258, SHORT, *[self.bits] * channels)
        add(259, SHORT, 8)  # deflate
        add(262, SHORT, 1 if channels < 3 else 2)  # grey or RGB
        if self.text:
            data = self.text.encode("ascii", "replace") + b"\0"
            entries.append((270, ASCII, data, len(data)))
        add(273, offset, *self.offsets)
        add(277, SHORT, channels)
        add(278, LONG, ROWS)
        add(279, offset, *self.counts)
        add(284, SHORT, 1)  # channels of a pixel side by side
        add(317, SHORT, 2)  # horizontal differences
        if channels in (2, 4):
            add(338, SHORT, 2)  # opacity, not multiplied
        add(339, SHORT, *[1] * channels)  # unsigned
        if self.profile:
            entries.append((34675, UNDEFINED, self.profile, len(self.profile)))
        self._directory(entries)

    def _strip(self, rows: np.ndarray) -> None:
        """A strip of pixels."""
        differences = rows.copy()
        differences[:, 1:] -= rows[:, :-1]
        data = zlib.compress(differences.tobytes(), 6)
        self.offsets.append(self.at)
        self.counts.append(len(data))
        self._append(data)

    def _append(self, data: bytes) -> None:
        """Write data, and a zero where its length is odd."""
        data += b"\0" * (len(data) % 2)
        self.file.write(data)
        self.at += len(data)

    def _directory(self, entries: list[tuple[int, int, bytes, int]]) -> None:
        """The values that have no room in the directory, the directory, and its place in the header."""
        room, number = (8, "Q") if self.large else (4, "I")
        fields = []
        for tag, kind, data, count in entries:
            if len(data) > room:
                fields.append(struct.pack(f"<HH{number}{number}", tag, kind, count, self.at))
                self._append(data)
            else:
                fields.append(struct.pack(f"<HH{number}", tag, kind, count) + data.ljust(room, b"\0"))
        place = self.at
        head = struct.pack("<Q" if self.large else "<H", len(fields))
        self._append(head + b"".join(fields) + b"\0" * room)
        self.file.seek(8 if self.large else 4)
        self.file.write(struct.pack(f"<{number}", place))
        self.file.seek(0, 2)
