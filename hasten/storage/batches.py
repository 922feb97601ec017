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
    """Batches of images on disk, in a subfolder named by the hash of all that they depend on.

    Args:
        folder: holds the subfolder; other files in it are ignored.
        metadata: all that the images depend on, as JSON can hold it.
    """

    def __init__(self, folder: str | Path, metadata: dict[str, Any]) -> None:
        text = json.dumps(metadata, sort_keys=True, default=str)
        self.folder = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]

    def put(self, first: int, images: Tensor) -> None:
        """Save a batch atomically.

        Args:
            first: index of the first image.
            images: (n, *S) on the CPU.
        """
        stream = io.BytesIO()
        np.save(stream, images.numpy())
        with contextlib.suppress(BadInput):  # without a cache an interrupted run starts again
            write_file(check_writable(self.folder / f"{first:08d}-{len(images)}.npy"), stream.getvalue())

    def get(self, first: int, count: int) -> Tensor | None:
        """A saved batch (count, *S), None where it is missing or damaged."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            images = np.load(self.folder / f"{first:08d}-{count}.npy")
            if len(images) == count and images.dtype == np.float32:
                return torch.from_numpy(images)
        return None

    def count(self) -> int:
        """The number of images saved."""
        return sum(int(path.stem.partition("-")[2]) for path in self.folder.glob("*-*.npy"))

    def clear(self, last: bool = True) -> None:
        """Remove the batches, once the run's results are written.

        Args:
            last: remove `folder` too, if it is empty.
        """
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*.npy"):
                path.unlink(missing_ok=True)
            self.folder.rmdir()
        with contextlib.suppress(OSError):  # it is not empty
            if last:
                self.folder.parent.rmdir()
