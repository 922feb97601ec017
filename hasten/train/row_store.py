"""`RowStore`: memory-mapped arrays on disk that are filled row by row, and continue after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput, HastenError
from ..files import write_atomic
from .messages import print_once

__all__ = ["RowStore", "rows_of_array"]

DESCRIPTION = "encoded.json"
EXACT = 64  # conditions of fewer numbers a caption, such as SDXL's sizes, are always float32
REPORT_SECONDS = 60.0  # between two lines about what is done
SAVE_SECONDS = 5.0  # between two updates of encoded.json
Compute = Callable[[int, int], dict[str, Tensor]]


def rows_of_array(array: np.ndarray, rows: Any) -> Tensor:
    """Rows of a memory-mapped array, float32."""
    return torch.from_numpy(np.ascontiguousarray(array[rows])).float()


class RowStore:
    """Arrays in a folder that are filled row by row, and `encoded.json` with the number of complete rows.

    Args:
        folder: of the files.
        key: what the arrays are made from, ready for JSON.
        dtype: of the stored numbers.

    Raises:
        BadInput: if the folder was made from something else.
    """

    def __init__(self, folder: Path, key: dict[str, Any], dtype: torch.dtype) -> None:
        self.folder, self.key, self.dtype = folder, json.loads(json.dumps(key)), dtype
        self.done: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}
        file = folder / DESCRIPTION
        if not file.is_file():
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            saved, self.done, self.names = dict(known["key"]), dict(known["done"]), dict(known["names"])
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise BadInput(f"cannot read {file} ({type(e).__name__}): remove {folder} to encode the data again") from e
        if other := next((name for name in self.key if saved.get(name) != self.key[name]), None):
            raise BadInput(
                f"{folder} holds latents and text embeddings made with another {other}: choose another folder, or "
                "remove it to encode the data again"
            )

    def fill(self, part: str, total: int, batch_size: int, compute: Compute, describe: Callable[[int], str]) -> None:
        """Compute the missing rows of the arrays of one part.

        Args:
            part: names it.
            total: rows.
            batch_size: rows at once.
            compute: (first, last) -> the arrays' rows by name.
            describe: row -> what it is of, for messages.
        """
        first = min(self.done.get(part, 0), total)
        if first == total:
            return
        arrays = self.open(part, write=True) if first else {}
        saved = reported = time.monotonic()
        while first < total:
            last = min(first + batch_size, total)
            for name, value in compute(first, last).items():
                rows = self.stored(name, value, describe, first)
                if first == 0:
                    arrays[name] = self._create(name, (total, *rows.shape[1:]), rows.dtype)
                    self.names[part] = sorted(arrays)
                arrays[name][first:last] = rows
            first = last
            if first == total or time.monotonic() - saved > SAVE_SECONDS:
                for array in arrays.values():
                    array.flush()
                self.done[part] = first
                self._describe()
                saved = time.monotonic()
            if first < total and time.monotonic() - reported > REPORT_SECONDS:
                print_once(f"{self.folder}: {first:,} of {total:,} rows of {part} are encoded")
                reported = time.monotonic()

    def stored(self, name: str, value: Tensor, describe: Callable[[int], str], first: int = 0) -> np.ndarray:
        """Rows in the stored dtype. Raises BadInput if they are not finite, or not finite in fp16."""
        value = value.detach().float().cpu()
        dtype = torch.float32 if value[0].numel() < EXACT else self.dtype
        out = value.to(dtype)
        finite = out.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            of = describe(first + row)
            what = f"{name} of {of}" if of else name
            if bool(value[row].isfinite().all()):
                most = float(value[row].abs().max())
                raise BadInput(f"{what} reaches {most:.3g}, beyond fp16 (65504): store it as fp32")
            raise BadInput(f"{what} is not finite: the autoencoder or text encoder overflows, try float32 weights")
        return np.asarray(out.numpy())

    def open(self, part: str, write: bool = False) -> dict[str, Any]:
        """The arrays of a part, memory-mapped. Raises BadInput if one is missing or damaged."""
        arrays: dict[str, Any] = {}
        for name in self.names.get(part, ()):
            file = self.folder / f"{name}.npy"
            try:
                arrays[name] = np.load(file, mmap_mode="r", allow_pickle=False)
                if write:  # not at once, since that would lengthen a truncated file
                    arrays[name] = np.load(file, mmap_mode="r+", allow_pickle=False)
            except (OSError, ValueError) as e:
                state = "damaged" if file.is_file() else "missing"
                raise BadInput(f"{file} is {state}: remove {self.folder} to encode the data again") from e
        return arrays

    def _create(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """A new array."""
        file = self.folder / f"{name}.npy"
        with self._writing():
            array: np.ndarray = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # on a full disk, writing to a map would end the process
                with open(file, "rb+") as opened:
                    os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
        return array

    def _describe(self) -> None:
        """Write encoded.json."""
        with self._writing():
            text = json.dumps({"key": self.key, "done": self.done, "names": self.names}, indent=1)
            write_atomic(self.folder / DESCRIPTION, text + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an OSError inside into a HastenError."""
        try:
            yield
        except OSError as e:
            raise HastenError(f"cannot write in {self.folder}: {e.strerror or e}") from e
