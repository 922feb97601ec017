"""Images that a command is given to begin from, and what of them is unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .arrays import open_array
from .data import open_data, to_float
from .notes import note
from .sources import Data, open_npy
from .tree import SUFFIXES

__all__ = ["read_images"]


def read_images(path: Path, n: int, channels: int, unknown: bool = False, mask: Path | None = None) -> Tensor:
    """The first `n` images of a folder, a zip or an array, or one image file `n` times: (n, C, H, W) in [-1, 1].

    unknown: for inpainting. Pixels to be filled in become NaN: those that are white in `mask` (an image, or a folder,
        zip or array of at least n, of the same size); without a mask those that are more transparent than opaque, or
        NaN in an `.npy`.
    Raises BadInput where there are too few, where a mask does not fit, and where nothing is unknown that should be.
    """
    data, missing = with_missing(path, channels) if unknown and mask is None else (None, None)
    if data is None:
        data = open_data(path, split=None, channels=channels, label="none")
    x = to_float(take(data, path, n))
    if not unknown:
        return x
    if mask is not None:
        masks = open_data(mask, split=None, channels=1, label="none")
        if masks.shape[1:] != data.shape[1:]:
            raise BadInput(f"the mask {mask} is {size_of(masks)}, the images of {path} are {size_of(data)}")
        hidden = take(masks, mask, n) >= 128
        if not bool(hidden.flatten(1).any(1).all()):
            raise BadInput(f"the mask {mask} has no white pixel: what is white is filled in, what is black is kept")
    elif missing is not None:
        hidden = missing[:n]
    else:
        hidden = torch.cat([clear(data, k, path) for k in ([0] * n if is_file(path) else range(n))])
    if not bool(hidden.flatten(1).any(1).all()):
        raise BadInput(
            f"{path} has an image without transparent pixels: inpainting fills in what is transparent, or what is "
            "white in --mask"
        )
    return x.masked_fill(hidden, float("nan"))


def take(data: Data, path: Path, n: int) -> Tensor:
    """The first n images, uint8; one image file n times."""
    if is_file(path):
        return data.images([0]).expand(n, -1, -1, -1)
    if len(data) < n:
        raise BadInput(f"{path} holds {len(data)} images, asked for {n} (--n {len(data)} takes all)")
    if len(data) > n:
        note(f"{path}: the first {n:,} of {len(data):,} images are used")
    return data.images(range(n))


def is_file(path: Path) -> bool:
    """Whether a path is one image."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def size_of(data: Data) -> str:
    """Width x height."""
    return f"{data.shape[2]}x{data.shape[1]}"


def clear(data: Data, k: int, path: Path) -> Tensor:
    """Where image k is more transparent than opaque, bool (1, 1, H, W)."""
    opacity = None if data.alpha is None else data.alpha(k)
    if opacity is None:
        raise BadInput(
            f"{path}: image {k} has no transparency: inpainting fills in what is transparent, or what is white in "
            "--mask"
        )
    return (opacity < 128)[None, None]


def with_missing(path: Path, channels: int) -> tuple[Data | None, Tensor | None]:
    """The data of an `.npy` of floats with NaN in it, and where they are, (n, 1, H, W); None for other paths."""
    import numpy as np

    if not (path.is_file() and path.name.lower().endswith(".npy")):
        return None, None
    images: Any = open_npy(path)[0]
    if images.dtype.kind != "f" or images.ndim not in (3, 4):
        return None, None
    lost = np.isnan(images)
    if not lost.any() or lost.all():
        return None, None
    data = open_array(np.where(lost, np.nanmin(images), images), None, str(path), None, channels)
    lost = lost[:, None] if lost.ndim == 3 else np.moveaxis(lost, -1, 1) if lost.shape[-1] in (1, 3) else lost
    return data, torch.from_numpy(lost.any(1, keepdims=True))
