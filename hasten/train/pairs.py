"""Pairs of a source and a target image, for bridges and for networks that read the source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import PurePosixPath

from torch import Tensor

from ..errors import BadInput
from .data import to_float
from .messages import print_once
from .sources import Data

__all__ = ["degraded_pairs", "folder_pairs"]


def degraded_pairs(data: Data, degrade: Callable[[Tensor, list[int]], Tensor]) -> Data:
    """The data with `source`, degraded copies of its images, as a condition.

    Args:
        data: the clean images.
        degrade: `degrade(images uint8 (n, C, H, W), indices) -> uint8 (n, C, H, W)`.
    """
    degrade(data.images([0]), [0])  # what cannot be is refused before the training
    return replace(data, conditions=lambda rows: {"source": to_float(degrade(data.images(rows), list(rows)))})


def folder_pairs(data: Data, source: Data) -> Data:
    """The data with the images of `source` as the condition `source`, paired by file name, or in arrays by order.

    Args:
        data: the targets.
        source: of the same size.

    Raises:
        BadInput: for images without a partner, and for sources of another size.
    """
    here, there = data.source or "the data", source.source or "the sources"
    if data.shape[1:] != source.shape[1:]:
        sizes = [f"{one.shape[2]}x{one.shape[1]}" for one in (data, source)]
        raise BadInput(f"{there}: pairs need images of one size, found {sizes[1]} where {here} has {sizes[0]}")
    if data.files is None or source.files is None:
        if len(data) != len(source):
            raise BadInput(f"pairs of arrays are made by order: {here} holds {len(data)} images, {there} {len(source)}")
        order = list(range(len(data)))
    else:
        row_of: dict[str, int] = {}
        for row, name in enumerate(source.files):
            if row_of.setdefault(stem(name), row) != row:
                raise BadInput(f"{there}: {source.files[row_of[stem(name)]]} and {name} would pair with the same image")
        missing = [name for name in data.files if stem(name) not in row_of]
        if missing:
            more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BadInput(f"{there} has no image named as {missing[0]} of {here}{more}: pairs have equal file names")
        if len(source) > len(data):
            print_once(f"{there}: {len(source) - len(data)} images without a target are not used")
        order = [row_of[stem(name)] for name in data.files]
    return replace(data, conditions=lambda rows: {"source": to_float(source.images([order[int(row)] for row in rows]))})


def stem(name: str) -> str:
    """A file's path without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))
