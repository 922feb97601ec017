"""Images that sampling starts from, and the unknown pixels of inpainting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from .arrays import open_array
from .data import open_data, to_float
from .messages import print_once
from .sources import Data, open_npy
from .tree import SUFFIXES

__all__ = ["read_images"]


def read_images(path: Path, n: int, channels: int, unknown: bool = False, mask: Path | None = None) -> Tensor:
    """Read the first `n` images of a folder, a zip or an array, or one image file `n` times.

    Args:
        path: of the images.
        n: number of images.
        channels: 1 or 3.
        unknown: for inpainting: the pixels to fill in become NaN. They are those that are white in `mask`; without a
            mask those that are more transparent than opaque, or NaN in an `.npy`.
        mask: an image, or a folder, zip or array of at least n, of the same size.

    Returns:
        The images, float32 (n, C, H, W) in [-1, 1].

    Raises:
        BadInput: if there are too few images, a mask does not fit, or an image has no unknown pixels.
    """
    data, missing = open_with_missing(path, channels) if unknown and mask is None else (None, None)
    if data is None:
        data = open_data(path, split=None, channels=channels, label="none", caption="none")
    x = to_float(first_images(data, path, n))
    if not unknown:
        return x
    if mask is not None:
        masks = open_data(mask, split=None, channels=1, label="none", caption="none")
        if masks.shape[1:] != data.shape[1:]:
            raise BadInput(f"the mask {mask} is {size_text(masks)}, the images of {path} are {size_text(data)}")
        hidden = first_images(masks, mask, n) >= 128
        if not bool(hidden.flatten(1).any(1).all()):
            raise BadInput(f"the mask {mask} has no white pixel: white is filled in, black is kept")
    elif missing is not None:
        hidden = missing[:n]
    else:
        hidden = torch.cat([transparent_mask(data, k, path) for k in ([0] * n if is_image_file(path) else range(n))])
    if not bool(hidden.flatten(1).any(1).all()):
        raise BadInput(
            f"{path} has an image without transparent pixels: inpainting fills in what is transparent, or what is "
            "white in --mask"
        )
    return x.masked_fill(hidden, float("nan"))


def first_images(data: Data, path: Path, n: int) -> Tensor:
    """The first n images, uint8 (n, C, H, W); a single image file n times."""
    if is_image_file(path):
        return data.images([0]).expand(n, -1, -1, -1)
    if len(data) < n:
        raise BadInput(f"{path} holds {len(data)} images, fewer than {n} (--n {len(data)} takes all)")
    if len(data) > n:
        print_once(f"{path}: the first {n:,} of {len(data):,} images are used")
    return data.images(range(n))


def is_image_file(path: Path) -> bool:
    """Whether a path is a single image file."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def size_text(data: Data) -> str:
    """Width x height."""
    return f"{data.shape[2]}x{data.shape[1]}"


def transparent_mask(data: Data, k: int, path: Path) -> Tensor:
    """The pixels of image k that are more transparent than opaque, bool (1, 1, H, W)."""
    opacity = None if data.alpha is None else data.alpha(k)
    if opacity is None:
        raise BadInput(
            f"{path}: image {k} has no transparency: inpainting fills in what is transparent, or what is white in "
            "--mask"
        )
    return (opacity < 128)[None, None]


def open_with_missing(path: Path, channels: int) -> tuple[Data | None, Tensor | None]:
    """The data of an `.npy` of floats with some NaN, and the mask of these, bool (n, 1, H, W); None for other paths."""
    if not (path.is_file() and path.name.lower().endswith(".npy")):
        return None, None
    images: Any = open_npy(path)[0]
    if images.dtype.kind != "f" or images.ndim not in (3, 4):
        return None, None
    missing = np.isnan(images)
    if not missing.any() or missing.all():
        return None, None
    data = open_array(np.where(missing, np.nanmin(images), images), None, str(path), None, channels)
    if missing.ndim == 3:
        missing = missing[:, None]
    elif missing.shape[-1] in (1, 3):
        missing = np.moveaxis(missing, -1, 1)
    return data, torch.from_numpy(missing.any(1, keepdims=True))
