"""Fingerprints of data sets (shape, classes, labels, captions, pixels), to recognise the data of a resumed run."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import BadInput
from .sources import Data

SAMPLE = 64  # images decoded of a set that is too large for memory
ROWS = 4096  # images hashed at a time
HEAD = 2**16  # bytes hashed of a single file
IMAGES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "avif", "jfif", "ppm", "jp2", "heic")
SUFFIXES = (*(f".{suffix}" for suffix in (*IMAGES, "npy", "npz", "gz", "csv", "json", "jsonl")), "ubyte")
FILES = 4096  # maximum number of files of a folder whose first bytes are hashed
DEPTH = 16  # maximum depth of folders, since links may be circular

_described: WeakKeyDictionary[Data, dict[str, Any]] = WeakKeyDictionary()


def describe_data(data: Data) -> dict[str, Any]:
    """The fingerprint of a data set, ready for JSON.

    Returns:
        `{"images", "shape", "classes", "labels", "captions", "pixels"}`. The last three are digests of 16 hexadecimal
        digits; labels and captions are None if there are none. The pixels are those of all images for data in memory;
        for larger data they are those of some images, with the names and sizes of all files.
    """
    if data not in _described:
        labels = None if data.labels is None else _digest([data.labels.numpy().tobytes()])
        _described[data] = {
            "images": len(data),
            "shape": list(data.shape),
            "classes": None if data.classes is None else list(data.classes),
            "labels": labels,
            "captions": None if data.captions is None else _digest(text.encode() for text in data.captions),
            "pixels": _sampled_pixels(data) if data.lazy else _all_pixels(data),
        }
    return _described[data]


def _all_pixels(data: Data) -> str:
    """The digest of the pixels of all images."""
    n = len(data)
    return _digest(data.images(range(k, min(k + ROWS, n))).contiguous().numpy().tobytes() for k in range(0, n, ROWS))


def _sampled_pixels(data: Data) -> str:
    """The digest of the pixels of some images, and of the names and sizes of all files."""
    pieces = [listing(Path(data.source)).encode()] if data.source else []
    for k in sorted(set(torch.linspace(0, len(data) - 1, SAMPLE).round().long().tolist())):
        try:
            pieces.append(data.images([k]).contiguous().numpy().tobytes())
        except BadInput:  # unreadable
            pieces.append(b"unreadable")
    return _digest(pieces)


def listing(path: Path) -> str:
    """One line for each file of a folder, zip or single file, which changes when its content does.

    Of a folder: names, sizes and digests of the first bytes (for at most `FILES` of the files). Of a zip: names, sizes
    and checksums. Of another file: its size and the digest of its first bytes.
    """
    if path.is_dir():
        entries: list[Path] = []
        for place, folders, files in os.walk(path, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if len(Path(place).relative_to(path).parts) > DEPTH:
                folders.clear()
            names = [name for name in sorted(files) if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
            entries += [file for name in names if (file := Path(place, name)).is_file()]
        lines = [f"{file.relative_to(path).as_posix()} {file.stat().st_size}" for file in entries]
        for k in range(0, len(entries), len(entries) // FILES + 1):
            lines[k] += f" {head_digest(entries[k], 4096)}"
        return "\n".join(lines)
    if not path.is_file():
        return ""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "\n".join(f"{each.filename} {each.file_size} {each.CRC}" for each in archive.infolist())
    return f"{path.stat().st_size} {head_digest(path, HEAD)}"


def head_digest(path: Path, size: int) -> str:
    """The digest of the first `size` bytes of a file; "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return _digest([file.read(size)])
    except OSError:
        return ""


def _digest(pieces: Iterable[bytes]) -> str:
    """The digest of byte strings, 16 hexadecimal digits."""
    total = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        total.update(len(piece).to_bytes(8, "little"))
        total.update(piece)
    return total.hexdigest()
