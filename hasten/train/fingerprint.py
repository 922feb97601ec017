"""What tells one training set from another: its size, shape, classes, labels and pixels."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import BadInput
from .sources import Data

SAMPLE = 64  # images that are decoded of a set that is too large to be held in memory
ROWS = 4096
HEAD = 2**16  # bytes of a single file that are looked at
PICTURES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".jfif",
    ".ppm",
    ".jp2",
    ".heic",
)

_known: WeakKeyDictionary[Data, dict[str, Any]] = WeakKeyDictionary()


def describe_data(data: Data) -> dict[str, Any]:
    """`{"images", "shape", "classes", "labels", "pixels"}` of a training set, ready for JSON.

    labels and pixels are 16 hexadecimal digits, labels None where there are none. The pixels are all the images where
    they are held in memory; of larger sets they are some images, and the names and sizes of all files.
    """
    if data not in _known:
        labels = None if data.labels is None else _digest([data.labels.numpy().tobytes()])
        _known[data] = {
            "images": len(data), "shape": list(data.shape),
            "classes": None if data.classes is None else list(data.classes),
            "labels": labels, "pixels": _some(data) if data.lazy else _all(data),
        }  # fmt: skip
    return _known[data]


def _all(data: Data) -> str:
    """The pixels of all images."""
    n = len(data)
    return _digest(data.images(range(k, min(k + ROWS, n))).contiguous().numpy().tobytes() for k in range(0, n, ROWS))


def _some(data: Data) -> str:
    """The pixels of a few images, and what the files of all are called and how large they are."""
    pieces = [listing(Path(data.source)).encode()] if data.source else []
    for k in sorted(set(torch.linspace(0, len(data) - 1, SAMPLE).round().long().tolist())):
        try:
            pieces.append(data.images([k]).contiguous().numpy().tobytes())
        except BadInput:  # one that cannot be read
            pieces.append(b"unreadable")
    return _digest(pieces)


def listing(path: Path) -> str:
    """Names and sizes of the images in a folder or a zip; the size and the first bytes of another file."""
    if path.is_dir():
        found = []
        for place, folders, files in os.walk(path, followlinks=False):
            folders.sort()
            for name in sorted(files):
                file = Path(place, name)
                if name.lower().endswith(PICTURES) and not name.startswith(".") and file.exists():
                    found.append(f"{file.relative_to(path).as_posix()} {file.stat().st_size}")
        return "\n".join(found)
    if not path.is_file():
        return ""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "\n".join(f"{each.filename} {each.file_size} {each.CRC}" for each in archive.infolist())
    with open(path, "rb") as file:
        return f"{path.stat().st_size} {hashlib.sha256(file.read(HEAD)).hexdigest()}"


def _digest(pieces: Any) -> str:
    """16 hexadecimal digits of byte strings."""
    total = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        total.update(len(piece).to_bytes(8, "little"))
        total.update(piece)
    return total.hexdigest()
