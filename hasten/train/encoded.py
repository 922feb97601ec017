"""Captioned images as latents and text embeddings, computed once and kept on disk (`encode_captioned`).

The folder holds `latents.npy`, one array `NAME.npy` of each text condition with a row for each *distinct* caption,
`null_NAME.npy`, and `encoded.json`: what they were made from, and how many rows are complete. Rows are written in
order, and `encoded.json` is replaced atomically after them, so that a killed process loses a few seconds of work.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.model_like import ModelLike
from ..errors import BadInput, check_choice, check_int
from ..files import locked
from ..utils.logs import errors_only
from .components import component_hash
from .data import to_float
from .fingerprint import describe_data
from .messages import pluralize, print_once
from .row_store import Compute, RowStore, rows_of_array
from .sources import Data

__all__ = ["encode_captioned", "image_size"]

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
WAIT = 30.0  # for another process that opens the folder


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
        with errors_only("diffusers"):  # it would warn of every caption that is truncated
            found = model.conditioning.cond(last - first, distinct[first:last])
        return {name: value for name, value in found.items() if not name.startswith("null_")}

    def encode_null(first: int, last: int) -> dict[str, Tensor]:
        found = model.conditioning.cond(1, "")
        return {name: value for name, value in found.items() if name.startswith("null_")}

    folder = Path(folder)
    with locked(folder, wait=WAIT):
        store = RowStore(folder, key, DTYPES[dtype])
        parts: list[tuple[str, int, Compute]] = [("null", 1, encode_null), ("text", len(distinct), encode_text)]
        parts += [] if model.decoder is None else [("latents", rows, encode_images)]
        if any(store.done.get(name, 0) < total for name, total, _ in parts):
            resumed = ", resumed" if store.done else ""
            print_once(
                f"encoding {pluralize(rows, 'image')} and {pluralize(len(distinct), 'caption')} once, "
                f"into {folder}{resumed}"
            )
            report_truncated(model, distinct)
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


def report_truncated(model: ModelLike, captions: Sequence[str]) -> None:
    """Print how many captions are longer than the text encoder reads."""
    tokenizer = getattr(getattr(model.conditioning, "pipe", None), "tokenizer", None)
    length = getattr(tokenizer, "model_max_length", None)
    if not callable(tokenizer) or not isinstance(length, int) or length > 10**6:
        return
    long = sum(len(ids) > length for ids in tokenizer(list(captions), verbose=False)["input_ids"])
    if long:
        print_once(
            f"{pluralize(long, 'caption')} of {len(captions):,} are longer than {length} tokens: the rest is cut"
        )


def describe_row(part: str, row: int, captions: Sequence[str], images: int) -> str:
    """The image or caption of a row, for messages."""
    return f"caption {captions[row][:60]!r}" if part == "text" else f"image {row % images}" if part == "latents" else ""
