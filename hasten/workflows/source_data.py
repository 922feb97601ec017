"""Data of models that read a source image: samples as their process has them, each with its source.

The pairs are made as those of the model's training, by what its card records, or by what is given in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..model.model import Model
from ..pick import pick
from ..train.crops import crops, open_crops
from ..train.data import open_data, to_float
from ..train.names import match_labels
from ..train.pairs import degraded_pairs, folder_pairs
from ..train.sources import Data

__all__ = ["PairSettings", "calibration_sources", "paired_samples", "reads_source", "sources_of"]

SOURCES = 64  # of the calibration of a model, by default


@dataclass(frozen=True)
class PairSettings:
    """What makes the sources of the data of a model that reads them.

    Args:
        source: folder of the sources, with the file names of the data.
        degrade: makes the sources from the data, such as `"low_resolution:factor=4,blur=2"`.
        crop: whether the data is random crops of images of any sizes, with the side of the model's samples.
        flip: whether crops are mirrored and turned too.
    """

    source: str | None = None
    degrade: str | None = None
    crop: bool = False
    flip: bool = False

    @classmethod
    def of(cls, model: Model, source: str | None = None, degrade: str | None = None) -> PairSettings:
        """Those of a model's training, with another source or degradation where one is given.

        Raises:
            BadInput: where both are given, or neither and the model's card has none.
        """
        if source is not None and degrade is not None:
            raise BadInput("--source and --degrade both give the sources of the pairs: leave one out")
        card, factor = model.card, model.source_factor
        if source is not None and factor > 1:
            raise BadInput(f"{model.name} reads small images that are made from the data: give --degrade, not --source")
        if source is None and degrade is None:
            degrade = card.get("degrade") or (f"low_resolution:factor={factor}" if factor > 1 else None)
            if degrade is None:
                known = f" (that of its training was {card['source']})" if card.get("source") else ""
                raise BadInput(
                    f"{model.name} makes its samples from source images: give --source, a folder with the file names "
                    f"of the data{known}, or --degrade, such as downscale:factor=4"
                )
        crop = factor > 1 and "process" not in card or card.get("crop") is not None
        return cls(source, degrade, crop and source is None, bool(card.get("flip")) and crop)

    def card(self) -> dict[str, Any]:
        """The entries of the card of a model that was trained on such pairs."""
        given = {"source": self.source, "degrade": self.degrade, "flip": self.flip or None}
        return {key: value for key, value in given.items() if value is not None}


def reads_source(model: Model) -> bool:
    """Whether the model draws from noise with a network that reads a source image; bridges, and models whose source is
    a generator's, do not."""
    generated = model.start is not None and getattr(pick("starts", model.start), "gives_source", False)
    bridge = getattr(model.denoiser.schedule, "bridge", False)
    return bool(getattr(model.denoiser, "source_channels", 0)) and not bridge and not generated


def paired_samples(model: Model, data: str | Path | Data | Tensor, settings: PairSettings | None = None) -> Data:
    """Samples as the model's process has them, float32 (n, C, H, W), with the condition `source` and their labels.

    Args:
        model: that reads a source.
        data: what `open_data` reads, images of any sizes where the settings say `crop`; a `Data`, with its sources as
            the condition `source` or without; or images uint8 (n, C, H, W).
        settings: what makes the sources; None: `PairSettings.of(model)`.

    Raises:
        BadInput: for data that does not fit the model.
    """
    if isinstance(data, Tensor):
        data = Data.of(data, source="the tensor")
    if not isinstance(data, Data) or data.conditions is None:
        data = with_sources_of(model, data, PairSettings.of(model) if settings is None else settings)
    check_pairs(model, data)
    fetch, conditions = remembered(data.fetch), data.conditions
    assert conditions is not None
    fetch_source = remembered(lambda rows: {"source": conditions(rows)["source"]})

    def samples(rows: list[int]) -> Tensor:
        return model.encode(to_float(fetch(rows)), fetch_source(rows)["source"])

    # lazy: floats of many crops are not all hashed
    return replace(data, fetch=samples, conditions=fetch_source, null_conditions=None, lazy=True)


def with_sources_of(model: Model, data: str | Path | Data, settings: PairSettings) -> Data:
    """Images of the model's size with their sources and labels."""
    channels, height, width = model.shape
    if settings.crop:
        if height != width:
            raise BadInput(f"{model.name} makes images of {width}x{height}: crops of the data are squares")
        if isinstance(data, Data):
            images = data if tuple(data.shape) == tuple(model.shape) else crops(data, height, settings.flip)
        else:
            images = open_crops(data, height, channels=channels, flip=settings.flip)
    elif isinstance(data, Data):
        images = data
    else:
        images = open_data(data, size=(height, width), channels=channels, caption="none")
    images = match_labels(replace(images, captions=None), model.classes, model.name)
    if tuple(images.shape) != tuple(model.shape):
        raise BadInput(f"{model.name} makes samples of shape {tuple(model.shape)}, data has {tuple(images.shape)}")
    images = replace(images, fetch=remembered(images.fetch))
    if settings.degrade is not None:
        return degraded_pairs(images, pick("degradations", settings.degrade))
    assert settings.source is not None
    sources = open_data(settings.source, size=(height, width), channels=channels, label="none", caption="none")
    return folder_pairs(images, sources)


def check_pairs(model: Model, data: Data) -> None:
    """Refuse data whose sources are not those of the model, before anything runs.

    Raises:
        BadInput: with both shapes.
    """
    assert data.conditions is not None
    if tuple(data.shape) != tuple(model.shape):
        raise BadInput(f"{model.name} makes samples of shape {tuple(model.shape)}, data has {tuple(data.shape)}")
    source = data.conditions([0]).get("source")
    if source is None:
        raise BadInput(
            f"{model.name} reads source images: the conditions of the data need source, found "
            f"{', '.join(data.conditions([0])) or 'none'}"
        )
    if tuple(source.shape[1:]) != tuple(model.source_shape or ()):
        raise BadInput(
            f"{model.name} reads sources of shape {tuple(model.source_shape or ())}, data has {tuple(source.shape[1:])}"
        )


def calibration_sources(
    model: Model, data: str | Path | Data | Tensor | None, settings: PairSettings | None = None, n: int = SOURCES
) -> Model:
    """The model with `calibration_sources`, evenly spaced among those of the data; a model that reads none as it is.

    Args:
        model: any.
        data: see `paired_samples`; None: the model must have sources already.
        settings: what makes the sources; None: `PairSettings.of(model)`.
        n: at most so many.

    Raises:
        BadInput: without data for a model that reads sources, and as `paired_samples`.
    """
    if not reads_source(model):
        return model
    if data is None:
        if model.calibration_sources is None:
            raise BadInput(
                f"{model.name} makes its samples from source images: give --data, images like those to come, from "
                "which they are made"
            )
        return model
    return replace(model, calibration_sources=sources_of(paired_samples(model, data, settings), n))


def sources_of(pairs: Data, n: int) -> Tensor:
    """At most n sources (n, C, h, w) of data with the condition `source`, evenly spaced."""
    assert pairs.conditions is not None
    return pairs.conditions(spread_rows(len(pairs), n))["source"]


def spread_rows(size: int, n: int) -> list[int]:
    """At most n different indices below `size`, evenly spaced."""
    return sorted(set(torch.linspace(0, size - 1, min(n, size)).round().long().tolist()))


def remembered(fetch: Callable[[list[int]], Any]) -> Callable[[list[int]], Any]:
    """The function with its last result kept: samples and sources of a batch are made of the same images."""
    last: tuple[list[int], Any] | None = None

    def get(rows: Sequence[int]) -> Any:
        nonlocal last
        wanted, found = [int(row) for row in rows], last  # read once: batches are fetched by several threads
        if found is None or found[0] != wanted:
            last = found = wanted, fetch(wanted)
        return found[1]

    return get
