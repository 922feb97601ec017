"""The data set of a distillation: real samples, or only labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import BadInput
from ..model.model import Model
from ..train import open_data
from ..train.data import Data, to_float
from ..train.names import match_labels

BLANK_IMAGES = 1024  # samples of the data set without real images


def training_data(model: Model, data: str | Path | Data | torch.Tensor) -> Data:
    """Real samples of the model's shape, with labels as the model's classes."""
    if isinstance(data, torch.Tensor):
        values = data
        data = Data(len(values), tuple(values.shape[1:]), lambda rows: values[rows], source="the tensor")  # type: ignore
    if isinstance(data, Data):
        if tuple(data.shape) != tuple(model.shape):
            raise BadInput(f"{model.name} makes samples of shape {tuple(model.shape)}, data has {tuple(data.shape)}")
        return match_labels(data, model.classes, model.name)
    if len(model.shape) != 3 or model.codec == "raw":
        raise BadInput(
            f"{model.name} has samples of shape {tuple(model.shape)}, which are no images: set data to a tensor "
            "(n, *shape) or a Data, in Python"
        )
    if model.decoder is None:
        return real_images(model, data)
    latents = model.decoder
    images = real_images(replace(model, shape=latents.pixels(model.shape)), data)
    return replace(images, shape=model.shape, fetch=lambda rows: latents.encode(to_float(images.images(rows))))  # type: ignore


def real_images(model: Model, data: str | Path) -> Data:
    """The images of `data`, with labels as the model's classes, matched by name."""
    channels, height, width = model.shape
    source = open_data(data, size=(height, width), channels=channels)
    return match_labels(source, model.classes, model.name)


def labels_only(model: Model) -> Data:
    """The data set of a method that trains on the model's own samples: all classes in equal parts, and blank images."""
    known = [k for k in range(len(model.classes or ())) if k != model.denoiser.null_label]
    size = len(known) * -(-BLANK_IMAGES // len(known)) if known else BLANK_IMAGES
    labels = torch.tensor(known).repeat(size // len(known)) if known else None
    blank = torch.zeros(1, *model.shape, dtype=torch.uint8)
    shape: Any = model.shape
    return Data(size, shape, lambda indices: blank.expand(len(indices), *model.shape), labels, model.classes)
