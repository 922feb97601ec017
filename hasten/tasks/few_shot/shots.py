"""The few labelled images: read from a folder with one sub-folder a class, checked, and as samples of the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BadInput
from ...images import to_image_tensor
from ...model.model import Model
from ...train.data import open_data, to_float
from ...train.sources import Data

__all__ = ["check_shots", "images_for", "open_sized_images", "pixels_of", "read_shots", "samples_of"]


def pixels_of(model: Model) -> tuple[int, int, int]:
    """(C, H, W) of the images of a model, in pixels.

    Raises:
        BadInput: for a model of something else than images.
    """
    if model.codec == "raw" or len(model.shape) != 3:
        raise BadInput(f"{model.name} makes samples of shape {model.shape}, which are no images")
    shape = model.shape if model.decoder is None else model.decoder.pixels(model.shape)
    channels, height, width = (int(n) for n in shape)
    return channels, height, width


def images_for(model: Model, X: Any, what: str = "X") -> Tensor:
    """Images as float32 (n, C, H, W) in [-1, 1] of the model's size; rows (n, C H W), as pipelines of scikit-learn pass
    them, are reshaped.

    Raises:
        BadInput: for other sizes, and numbers that are not finite.
    """
    shape = pixels_of(model)
    if isinstance(X, (Tensor, np.ndarray)) and X.ndim == 2 and X.shape[1] == int(np.prod(shape)):
        X = X.reshape(len(X), *shape)
    images = to_image_tensor(X, shape).float()
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or not len(images):
        found = "x".join(str(n) for n in images.shape[1:]) if len(images) else "no images"
        raise BadInput(
            f"{what} must be images {shape[0]}x{shape[1]}x{shape[2]} (channels, height, width), as {model.name} makes "
            f"them, found {found}: resize them"
        )
    if not bool(torch.isfinite(images).all()):
        raise BadInput(f"{what} holds NaN or infinity")
    return images


def samples_of(model: Model, images: Tensor) -> Tensor:
    """Samples of the model (n, *S) on its device, from images: the mode of the autoencoder's posterior for latents.

    Raises:
        BadInput: for a model of latents whose autoencoder cannot encode.
    """
    if model.decoder is None:
        return images.to(model.device)
    if not hasattr(model.decoder, "encode"):
        raise BadInput(f"the autoencoder of {model.name} has no encoder")
    encoded: Tensor = model.decoder.encode(images)
    return encoded.to(model.device, torch.float32)


def check_shots(images: Tensor, y: Any, names: Sequence[str] | None = None) -> tuple[np.ndarray, Tensor]:
    """The classes, sorted, and the index of each image's class.

    Args:
        images: (n, C, H, W).
        y: n labels, numbers or texts.
        names: of the images, for messages.

    Raises:
        BadInput: for another number of labels, one class, and two classes with the same picture.
    """
    labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
    if labels.ndim != 1 or len(labels) != len(images):
        raise BadInput(f"y must have one label for each of the {len(images)} images, found shape {labels.shape}")
    if labels.dtype.kind not in "iubUSO":
        raise BadInput(f"labels must be whole numbers or texts, found {labels.dtype}")
    classes, index = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise BadInput(f"few-shot classification needs shots of two classes or more, found only {classes[0]!s}")
    seen: dict[bytes, int] = {}
    for k, image in enumerate(images):
        digest = hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
        first = seen.setdefault(digest, k)
        if index[first] != index[k]:
            one, other = (f"image {n}" if names is None else names[n] for n in (first, k))
            raise BadInput(
                f"the classes {classes[index[first]]!s} and {classes[index[k]]!s} have the same picture ({one} and "
                f"{other}): remove it from one of them"
            )
    return classes, torch.from_numpy(index.reshape(-1).astype(np.int64))


def read_shots(path: str | Path, model: Model, resize: bool = False) -> tuple[Tensor, np.ndarray, tuple[str, ...]]:
    """The shots of a folder, zip or array with labels, such as a folder with a sub-folder for each class.

    Args:
        path: of the shots.
        model: whose size they must have.
        resize: crop and resize images of other sizes.

    Returns:
        Images (n, C, H, W) in [-1, 1], the name of the class of each, and names of the images.

    Raises:
        BadInput: for no labels, a class without images, and images of another size.
    """
    folder = Path(path)
    if folder.is_dir() and (empty := _empty_classes(folder)):
        raise BadInput(f"{path}: the class {empty[0]} has no images: add some, or remove the folder")
    data = open_sized_images(path, model, resize, labelled=True)
    if data.labels is None or data.classes is None:
        raise BadInput(f"{path} has no classes: put the shots of each class into a folder of its own")
    names = np.asarray([data.classes[k] for k in data.labels.tolist()])
    missing = sorted(set(data.classes) - set(names.tolist()))
    if missing:
        raise BadInput(f"{path}: the class {missing[0]} has no images")
    files = data.files or tuple(f"image {k}" for k in range(len(data)))
    return to_float(data.images(range(len(data)))), names, files


def open_sized_images(path: str | Path, model: Model, resize: bool = False, labelled: bool = False) -> Data:
    """Images of a path in the model's size.

    Args:
        path: of the images.
        model: whose size they must have.
        resize: crop and resize images of other sizes.
        labelled: whether labels that cannot be used are an error.

    Raises:
        BadInput: for images of another size.
    """
    shape = pixels_of(model)
    options: dict[str, Any] = {"split": None, "channels": shape[0], "caption": "none", "report": False}
    if resize:
        options["size"] = shape[1:]
    try:
        data = open_data(path, **options)
    except BadInput as error:
        if "mixes sizes" in str(error) and not resize:
            raise BadInput(f"{path}: its images have several sizes, {_size(shape)} is needed: --resize") from error
        if labelled:
            raise
        data = open_data(path, label="none", **options)
    if tuple(data.shape) != shape:
        raise BadInput(f"{path}: its images are {_size(data.shape)}, {model.name} takes {_size(shape)}: --resize")
    return data


def _size(shape: Sequence[int]) -> str:
    """Width x height."""
    return f"{shape[2]}x{shape[1]}"


def _empty_classes(folder: Path) -> list[str]:
    """Sub-folders without a file, where others have some."""
    subs = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    filled = {p: any(files for _, _, files in os.walk(p)) for p in subs}
    return [p.name for p, full in filled.items() if not full] if any(filled.values()) else []
