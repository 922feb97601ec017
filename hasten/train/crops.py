"""Random crops of images of any sizes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadInput, check_int
from ..utils.random import make_generator
from .any_size import open_any_size
from .messages import join_names, pluralize, print_once
from .sources import Data

__all__ = ["crops", "open_crops"]

CROPS, ROWS = 1024, 2**22  # crops an image, and crops in all


def crops(data: Data, crop: int, flip: bool = False) -> Data:
    """The data of random square crops of images of one size; see `open_crops`.

    Args:
        data: with images of at least `crop` pixels a side; its labels and captions are left out.
        crop: side in pixels.
        flip: also mirrored and turned by 90 degrees.
    """
    sizes = [data.shape[1:]] * len(data)
    return crops_of(sizes, data.shape[0], lambda k: data.images([k])[0], crop, flip, data.source, data.lazy)


def open_crops(
    path: str | Path, crop: int, split: str | None = "train", channels: int | None = None, flip: bool = False
) -> Data:
    """Random square crops of the images of a folder, zip or array, which may be of different sizes.

    A folder of n images is n times 1,024 crops (at most 4,194,304 in all). Which crop an index is depends on the index
    alone, so that a run can be resumed.

    Args:
        path: as `open_data` takes it.
        crop: side in pixels; smaller images are left out, with a message.
        split: as `open_data` takes it.
        channels: 1 or 3. Default: those of the images.
        flip: also mirrored and turned by 90 degrees: each of the eight symmetries of the square is as likely.

    Raises:
        BadInput: where no image has the size, and as `open_data`.
    """
    check_int("crop", crop, 1)
    images = open_any_size(path, split, channels)
    large = [k for k, size in enumerate(images.sizes) if min(size) >= crop]
    if not large:
        most = max(min(size) for size in images.sizes)
        raise BadInput(
            f"{path}: no image has a crop of {crop} pixels, the largest has {most}: set crop (--crop) {most}"
        )
    messages = list(images.messages)
    if small := [images.names[k] for k in range(len(images)) if k not in set(large)]:
        messages.append(f"{pluralize(len(small), 'image')} smaller than {crop} pixels left out: {join_names(small)}")
    images = images.only(large)
    print_once(f"{path}: crops of {crop} x {crop} of {pluralize(len(images), 'image')}")
    for message in messages:
        print_once(f"{path}: {message}")
    return crops_of(images.sizes, images.channels, images.read, crop, flip, images.source, True)


def crops_of(
    sizes: list[tuple[int, int]],
    channels: int,
    read: Callable[[int], Tensor],
    crop: int,
    flip: bool,
    source: str,
    lazy: bool,
) -> Data:
    """The data of the crops of images that `read(k)` gives as uint8 (C, H, W)."""
    each = max(min(CROPS, ROWS // len(sizes)), 1)
    if too_small := [size for size in sizes if min(size) < crop]:
        height, width = too_small[0]
        raise BadInput(f"{source}: images of {width}x{height} hold no crop of {crop} pixels: set crop {min(sizes[0])}")

    def one(row: int) -> Tensor:
        k = row // each
        height, width = sizes[k]
        top, left, turn = torch.rand(3, generator=make_generator(row), dtype=torch.float64).tolist()
        top, left = int(top * (height - crop + 1)), int(left * (width - crop + 1))
        image = read(k)[:, top : top + crop, left : left + crop]
        if flip:
            kind = int(turn * 8)
            image = torch.rot90(image.flip(-1) if kind >= 4 else image, kind % 4, (1, 2))
        return image

    def fetch(rows: list[int]) -> Tensor:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return torch.stack(list(pool.map(one, rows)))

    return Data(len(sizes) * each, (channels, crop, crop), fetch, source=source, lazy=lazy)
