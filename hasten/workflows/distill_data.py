"""What a distillation trains on: real samples with labels or captions, prompts alone, or classes alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..model.model import Model
from ..tasks.speech.features import Corpus
from ..tasks.speech.samples import speech_samples
from ..train import open_data
from ..train.data import Data, to_float
from ..train.encoded import encode_captioned
from ..train.names import match_labels
from .source_data import PairSettings, paired_samples, reads_source

BLANK_IMAGES = 1024  # samples of the data set without real images
ENCODED = "encoded"  # folder of latents and text embeddings in that of the run
CACHE_BYTES = 2**31  # of what is encoded in memory: what comes after is encoded again each time


def training_data(
    model: Model,
    data: str | Path | Data | Corpus | Tensor | list[str] | tuple[str, ...] | None,
    out: Path | None = None,
    pairs: PairSettings | None = None,
) -> Data:
    """The data of a distillation: samples of the model's shape, with its labels, or with its conditions of captions.

    Args:
        model: the teacher.
        data: see `distill_model`; a list of texts are prompts. Of a model that speaks, a corpus or its path.
        out: folder of the run, in which a cache of encoded images may be written; None: nothing is written.
        pairs: of a model that reads a source image: what makes the sources; None: the data has them.

    Raises:
        BadInput: for data that does not fit the model.
    """
    if "speech" in model.card and isinstance(data, (str, Path, Corpus)):
        return speech_samples(model, data, out)
    if isinstance(data, Corpus):
        raise BadInput(f"{model.name} makes no speech: give images, not a corpus of recordings")
    if reads_source(model):
        if data is None or isinstance(data, (list, tuple)):
            raise BadInput(
                f"{model.name} makes its samples from source images: give --data, images like those of its training, "
                "from which they are made"
            )
        return paired_samples(model, data, pairs)
    if model.conditioning is None:
        if isinstance(data, (list, tuple)):
            raise BadInput(f"{model.name} takes no prompts: leave out --prompts")
        return class_labels_only(model) if data is None else training_samples(model, data)
    if data is None:
        raise BadInput(
            f"{model.name} takes prompts: give some, --prompts FILE with one a line or data=[...], or captioned images"
        )
    if isinstance(data, (list, tuple)):
        return prompts_only(model, data)
    return captioned_samples(model, data, out)


def shared_training_data(ranks: Ranks, make: Callable[[], Data]) -> Data:
    """The data of all processes: the main one encodes it first, then the others open its files one by one."""
    made: list[Data] = []
    ranks.on_main_process(lambda: made.append(make()))
    for rank in range(1, ranks.world):
        if rank == ranks.rank:
            made.append(make())
        ranks.barrier()
    return made[0]


def null_conditions(model: Model, data: Data) -> dict[str, Tensor]:
    """What takes the place of each condition of a model of prompts in the unconditional branch, (1, ...) by name."""
    if model.conditioning is None:
        return {}
    found = data.null_conditions or model.conditions(1, "")
    return {
        key.removeprefix("null_"): value.to(model.device) for key, value in found.items() if key.startswith("null_")
    }


def prompts_only(model: Model, prompts: Sequence[str]) -> Data:
    """Prompts without images, for methods that train on the teacher's own samples."""
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise BadInput(f"prompts must be texts, at least one, got {list(prompts)[:3]!r}")
    blank = torch.zeros(1, *model.shape, dtype=torch.uint8)
    shape: Any = tuple(model.shape)
    fetch = Encoded(lambda rows: embed(model, [prompts[k] for k in rows]), [*prompts])
    return Data(
        len(prompts),
        shape,
        lambda rows: blank.expand(len(rows), *model.shape),
        lazy=True,
        captions=tuple(prompts),
        conditions=fetch,
    )


def captioned_samples(model: Model, data: str | Path | Data | Tensor, out: Path | None) -> Data:
    """Captioned samples of a model of prompts, encoded for its network, into the run's folder if there is one."""
    if isinstance(data, Tensor):
        raise BadInput(
            f"{model.name} takes prompts: samples alone are not enough, give a Data with captions, a folder of "
            "captioned images, or prompts"
        )
    shape: Any = tuple(model.shape)
    size = shape if model.decoder is None else tuple(model.decoder.pixels(model.shape))
    if not isinstance(data, Data):
        channels, height, width = size
        data = open_data(data, size=(height, width), channels=channels, label="none")
    where = data.source or "the data"
    if data.captions is None and data.conditions is None:
        raise BadInput(
            data.caption_problem
            or f"{where} has no captions, {model.name} takes prompts: write metadata.jsonl with file_name and text, "
            "or a .txt beside each image"
        )
    if tuple(data.shape) not in (shape, size):
        raise BadInput(f"{model.name} makes samples of shape {shape} from images of {size}, data has {data.shape}")
    data = replace(data, labels=None, classes=None)
    if out is not None and data.conditions is None and tuple(data.shape) == size:
        return encode_captioned(model, data, out / ENCODED)
    if tuple(data.shape) != shape:  # images for a model of latents
        images, latents = data, model.decoder
        encode = Encoded(lambda rows: {"x": latents.encode(to_float(images.images(rows)))}, None, rows=1)
        data = replace(data, shape=shape, fetch=lambda rows: encode(rows)["x"], lazy=True)
    if data.conditions is None:
        captions = data.captions
        assert captions is not None
        fetch = Encoded(lambda rows: embed(model, [captions[k] for k in rows]), captions)
        data = replace(data, conditions=fetch)
    return data


def embed(model: Model, texts: Sequence[str]) -> dict[str, Tensor]:
    """The conditions of texts, each (n, ...) float32 on the CPU."""
    found = model.conditioning.cond(len(texts), list(texts))
    return {key: value.float().cpu() for key, value in found.items() if not key.startswith("null_")}


class Encoded:
    """Rows that are computed when first used, and then kept in memory: `encoded([k, ...]) -> {name: (n, ...)}`.

    Args:
        compute: rows -> tensors by name, (n, ...) each.
        keys: equal for rows that are the same; None: all differ.
        rows: computed at once; 1 where the result depends on it by rounding, as a resumed run must not.
    """

    def __init__(
        self, compute: Callable[[list[int]], dict[str, Tensor]], keys: Sequence[Any] | None, rows: int = 64
    ) -> None:
        self.compute, self.keys, self.rows = compute, keys, rows
        self._known: dict[Any, dict[str, Tensor]] = {}
        self._bytes = 0
        self._lock = threading.Lock()  # batches are prefetched by a thread

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        with self._lock:
            keys = list(rows) if self.keys is None else [self.keys[k] for k in rows]
            first = dict(zip(reversed(keys), reversed(rows)))
            missing = [(key, row) for key, row in first.items() if key not in self._known]
            fresh: dict[Any, dict[str, Tensor]] = {}
            for start in range(0, len(missing), self.rows):
                part = missing[start : start + self.rows]
                found = self.compute([row for _, row in part])
                for k, (key, _) in enumerate(part):
                    fresh[key] = {name: value[k].clone() for name, value in found.items()}
            for key, value in fresh.items():
                size = sum(v.numel() * v.itemsize for v in value.values())
                if self._bytes + size <= CACHE_BYTES:
                    self._known[key] = value
                    self._bytes += size
            values = [self._known.get(key) or fresh[key] for key in keys]
            return {name: torch.stack([value[name] for value in values]) for name in values[0]}


def training_samples(model: Model, data: str | Path | Data | Tensor) -> Data:
    """Real samples of the model's shape, with labels as the model's classes."""
    if isinstance(data, Tensor):
        values = data
        shape: Any = tuple(values.shape[1:])
        data = Data(len(values), shape, lambda rows: values[rows], source="the tensor")
    if isinstance(data, Data):
        if tuple(data.shape) != tuple(model.shape):
            raise BadInput(f"{model.name} makes samples of shape {tuple(model.shape)}, data has {tuple(data.shape)}")
        return match_labels(data, model.classes, model.name)
    if len(model.shape) != 3 or model.codec == "raw":
        raise BadInput(
            f"{model.name} makes samples of shape {tuple(model.shape)}, which no images are: give data as a tensor "
            "(n, *shape) or a Data, in Python"
        )
    if model.decoder is None:
        return training_images(model, data)
    latents = model.decoder
    images = training_images(replace(model, shape=latents.pixels(model.shape)), data)
    return replace(images, shape=model.shape, fetch=lambda rows: latents.encode(to_float(images.images(rows))))


def training_images(model: Model, data: str | Path) -> Data:
    """The images of `data`, with labels as the model's classes, matched by name."""
    channels, height, width = model.shape
    source = open_data(data, size=(height, width), channels=channels)
    return match_labels(source, model.classes, model.name)


def class_labels_only(model: Model) -> Data:
    """What a method gets that trains on the model's own samples alone: its classes in equal parts, and blank images."""
    known = [k for k in range(len(model.classes or ())) if k != model.denoiser.null_label]
    size = len(known) * -(-BLANK_IMAGES // len(known)) if known else BLANK_IMAGES
    labels = torch.tensor(known).repeat(size // len(known)) if known else None
    blank = torch.zeros(1, *model.shape, dtype=torch.uint8)
    shape: Any = model.shape
    return Data(size, shape, lambda indices: blank.expand(len(indices), *model.shape), labels, model.classes)
