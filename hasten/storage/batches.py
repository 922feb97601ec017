"""Finished batches of images on disk, from which an interrupted run resumes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from ..files import check_writable, write_file


class SavedBatches:
    """Finished batches of images on disk, under the hash of all that they depend on, until the whole is written.

    folder: holds a folder of that name; nothing else in it is looked at.
    """

    def __init__(self, folder: str | Path, told: dict[str, Any]) -> None:
        text = json.dumps(told, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]

    def put(self, first: int, images: Tensor) -> None:
        """Keep the images `first`, `first + 1`, ..., whole or not at all."""
        stream = io.BytesIO()
        np.save(stream, images.numpy())
        with contextlib.suppress(BadInput):  # a cache that cannot be written costs what a stop would lose, no more
            write_file(check_writable(self.folder / f"{first:08d}-{len(images)}.npy"), stream.getvalue())

    def get(self, first: int, count: int) -> Tensor | None:
        """What `put` kept, or None where it is not there, or damaged."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            found = np.load(self.folder / f"{first:08d}-{count}.npy")
            if len(found) == count and found.dtype == np.float32:
                return torch.from_numpy(found)
        return None

    def count(self) -> int:
        """How many images are there."""
        return sum(int(path.stem.partition("-")[2]) for path in self.folder.glob("*-*.npy"))

    def clear(self, last: bool = True) -> None:
        """Remove them, once the whole is written. last: and the folder, where nobody is about to keep more in it."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*.npy"):
                path.unlink(missing_ok=True)
            self.folder.rmdir()
        with contextlib.suppress(OSError):  # which says that something else lies in it
            if last:
                self.folder.parent.rmdir()
