"""Captioned images as latents and text embeddings, computed once and kept on disk (`encode_captioned`).

The folder holds `latents.npy`, one array `NAME.npy` of each text condition with a row for each *distinct* caption,
`null_NAME.npy`, and `encoded.json`: what they were made from, and how many rows are complete. Rows are written in
order, and `encoded.json` is replaced atomically after them, so that a killed process loses a few seconds of work.
"""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.model_like import ModelLike
from ..errors import BadInput, HastenError, check_choice, check_int
from ..files import locked, write_atomic
from .components import component_hash
from .data import to_float
from .fingerprint import describe_data
from .messages import pluralize, print_once
from .sources import Data

__all__ = ["encode_captioned", "image_size"]

DESCRIPTION = "encoded.json"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
EXACT = 64  # conditions of fewer numbers a caption, such as SDXL's sizes, are always float32
WAIT = 30.0  # for another process that opens the folder
SAVE_SECONDS = 5.0  # between two updates of encoded.json
Compute = Callable[[int, int], dict[str, Tensor]]


def image_size(model: ModelLike) -> tuple[int, int, int]:
    """(C, H, W) in pixels of the images that a model of latents or of images is trained on."""
    shape = model.shape if model.decoder is None else model.decoder.pixels(model.shape)
    channels, height, width = (int(n) for n in shape)
    return channels, height, width


def encode_captioned(
    model: ModelLike,
    data: Data,
    folder: str | Path,
    *,
    batch_size: int | None = None,
    dtype: str = "fp16",
    flip: bool = False,
) -> Data:
    """Latents and text embeddings of captioned images, computed once with the pipeline's own encoders.

    A killed process leaves what it has finished, and the same call continues: the files end up with the same bytes.
    Opened again with the same data, autoencoder, text encoder and settings, nothing is computed.

    Args:
        model: with `conditioning` (prompts), and `decoder` for a model of latents (mode of the posterior, model scale).
        data: images of `image_size(model)` with captions.
        folder: of the files.
        batch_size: images that the autoencoder is given at once. Default: as many as have a million pixels.
        dtype: stored numbers, `fp16` or `fp32`; what is returned is float32 always.
        flip: add the mirrored images, encoded themselves: row n + k is the mirrored image k.

    Returns:
        Data whose `images(rows)` are latents, whose `conditions(rows)` are those of the captions by the names that the
        network has for them (`text`, ...), with `null_conditions` (`null_text`, ...) and `captions`, memory-mapped.

    Raises:
        BadInput: for data without captions or of another size; if the folder holds the files of other data, another
            autoencoder or text encoder, or other settings; if numbers are too large for fp16.
        HastenError: if the files cannot be written.
    """
    check_choice("dtype", dtype, DTYPES)
    captions = check_encodable(model, data)
    if batch_size is None:
        batch_size = max(1, min(64, 2**20 // (data.shape[1] * data.shape[2])))
    check_int("batch_size", batch_size, 1)
    distinct = list(dict.fromkeys(captions))
    key = {
        "version": 1,
        "images": len(data),
        "data": {name: value for name, value in describe_data(data).items() if name in ("captions", "pixels", "shape")},
        "autoencoder": None if model.decoder is None else component_hash(model.decoder),
        "text encoder": component_hash(model.conditioning, distinct[:32]),
        "dtype": dtype,
        "flip": flip,
    }
    decoder: Any = copy.copy(model.decoder)
    if hasattr(decoder, "rows"):
        decoder.rows = batch_size
    count, rows = len(data), len(data) * (2 if flip else 1)

    def encode_images(first: int, last: int) -> dict[str, Tensor]:
        images = to_float(data.images([row % count for row in range(first, last)]))
        mirrored = torch.arange(first, last) >= count
        images[mirrored] = images[mirrored].flip(-1)
        if data.unreadable:
            damaged = min(data.unreadable)
            raise BadInput(f"{data.source}: image {damaged} cannot be read, and no other has its caption: remove it")
        return {"latents": decoder.encode(images)}

    def encode_text(first: int, last: int) -> dict[str, Tensor]:
        found = model.conditioning.cond(last - first, distinct[first:last])
        return {name: value for name, value in found.items() if not name.startswith("null_")}

    def encode_null(first: int, last: int) -> dict[str, Tensor]:
        found = model.conditioning.cond(1, "")
        return {name: value for name, value in found.items() if name.startswith("null_")}

    folder = Path(folder)
    with locked(folder, wait=WAIT):
        store = Store(folder, key, DTYPES[dtype])
        parts: list[tuple[str, int, Compute]] = [("null", 1, encode_null), ("text", len(distinct), encode_text)]
        parts += [] if model.decoder is None else [("latents", rows, encode_images)]
        if any(store.done.get(name, 0) < total for name, total, _ in parts):
            resumed = ", resumed" if store.done else ""
            print_once(
                f"encoding {pluralize(rows, 'image')} and {pluralize(len(distinct), 'caption')} once, "
                f"into {folder}{resumed}"
            )
        for name, total, compute in parts:
            store.fill(name, total, batch_size, compute, partial(describe_row, name, captions=distinct, images=count))
    row_of = {text: k for k, text in enumerate(distinct)}
    index = np.array([row_of[text] for text in captions] * (rows // count))
    texts, latents = store.open("text"), store.open("latents").get("latents")

    def images_of(indices: list[int]) -> Tensor:
        if latents is not None:
            return rows_of_array(latents, indices)
        images = to_float(data.images([row % count for row in indices]))
        mirrored = torch.tensor(indices) >= count
        images[mirrored] = images[mirrored].flip(-1)
        return images

    return Data(
        rows,
        (int(model.shape[0]), int(model.shape[1]), int(model.shape[2])),
        images_of,
        source=data.source,
        lazy=data.lazy,
        unreadable=data.unreadable,
        captions=tuple(captions) * (rows // count),
        conditions=lambda indices: {name: rows_of_array(array, index[indices]) for name, array in texts.items()},
        null_conditions={name: rows_of_array(array, [0]) for name, array in store.open("null").items()},
    )


def check_encodable(model: ModelLike, data: Data) -> tuple[str, ...]:
    """The captions of the data. Raises BadInput unless these are captioned images for a model that takes prompts."""
    if model.conditioning is None:
        raise BadInput(f"{model.name} takes no prompts: captions are for a text-to-image pipeline")
    if data.captions is None:
        where = data.source or "the data"
        raise BadInput(
            data.caption_problem
            or f"{where} has no captions: write metadata.jsonl (file_name and text), or a .txt beside each image"
        )
    size = image_size(model)
    if len(model.shape) != 3 or tuple(data.shape) != size:
        raise BadInput(
            f"{model.name} is trained on images of {size[2]} x {size[1]} and {size[0]} channels, the data has "
            f"{data.shape[2]} x {data.shape[1]} and {data.shape[0]}: open it with size=({size[1]}, {size[2]}), "
            f"channels={size[0]}"
        )
    return data.captions


def describe_row(part: str, row: int, captions: Sequence[str], images: int) -> str:
    """The image or caption of a row, for messages."""
    return f"caption {captions[row][:60]!r}" if part == "text" else f"image {row % images}" if part == "latents" else ""


def rows_of_array(array: np.ndarray, rows: Any) -> Tensor:
    """Rows of a memory-mapped array, float32."""
    return torch.from_numpy(np.ascontiguousarray(array[rows])).float()


class Store:
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
        saved = time.monotonic()
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
        with self._writing():
            array: np.ndarray = np.lib.format.open_memmap(
                self.folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape
            )
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
