"""Random crops of images of any sizes."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadInput, check_int
from ..utils.random import make_generator
from .data import open_data
from .decode import decode, readable_suffixes
from .folders import choose_split, folder_tree, read_headers, zip_tree
from .messages import join_names, pluralize, print_once
from .sources import MEMORY, Data, find_idx

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
    path = Path(path)
    name = path.name.lower()
    is_tree = name.endswith(".zip") or path.is_dir() and not (find_idx(path) or (path / "images.npy").is_file())
    if not is_tree or not path.exists():
        return crops(open_data(path, split, channels=channels, label="none", caption="none"), crop, flip)
    tree = zip_tree(path) if name.endswith(".zip") else folder_tree(path)
    suffixes = readable_suffixes()
    names = [name for name in tree.names if name.lower().endswith(suffixes)]
    if not names:
        raise BadInput(f"{path} holds no images (looked for {', '.join(suffixes)})")
    parts, messages = choose_split(tree, names, split)
    names = [name for _, part in parts for name in part]
    headers = read_headers(tree, names)
    large = [k for k, one in enumerate(headers) if min(one.height, one.width) >= crop]
    if not large:
        most = max(min(one.height, one.width) for one in headers)
        raise BadInput(
            f"{path}: no image has a crop of {crop} pixels, the largest has {most}: set crop (--crop) {most}"
        )
    if small := [names[k] for k in range(len(names)) if k not in set(large)]:
        messages.append(f"{pluralize(len(small), 'image')} smaller than {crop} pixels left out: {join_names(small)}")
    names, headers = [names[k] for k in large], [headers[k] for k in large]
    depth = channels or (1 if all(one.grey for one in headers) else 3)
    sizes = [(one.height, one.width) for one in headers]
    print_once(f"{path}: crops of {crop} x {crop} of {pluralize(len(names), 'image')}")
    for message in (*tree.messages, *messages):
        print_once(f"{path}: {message}")
    read = keep_read(lambda k: decode(tree, names[k], (depth, *sizes[k]), False), [depth * h * w for h, w in sizes])
    return crops_of(sizes, depth, read, crop, flip, str(path), True)


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


def keep_read(read: Callable[[int], Tensor], sizes: list[int]) -> Callable[[int], Tensor]:
    """`read` with the last results kept, up to `MEMORY` bytes. sizes: in bytes, of each result."""
    kept: OrderedDict[int, Tensor] = OrderedDict()
    lock, used = threading.Lock(), 0

    def get(k: int) -> Tensor:
        nonlocal used
        if (found := kept.get(k)) is not None:
            return found
        image = read(k)
        with lock:
            if k not in kept:
                kept[k] = image
                used += sizes[k]
            while used > MEMORY and len(kept) > 1:
                oldest, _ = kept.popitem(last=False)
                used -= sizes[oldest]
        return image

    return get
