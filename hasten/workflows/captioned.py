"""Captioned real pictures as what a text-to-image model is measured against."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..files import check_writable, write_file
from ..metrics import Reference, extract, floor_table, make_reference, save_reference
from ..metrics import reference as load_reference
from ..metrics.prompt_match import CANDIDATES, PromptMatch, prompt_match
from ..metrics.references import CARD
from ..metrics.text_judge import BUNDLED_JUDGES, TextJudge, load_judge, read_json_file
from ..progress import ignore_messages
from ..train.data import Data, open_data
from ..utils.environment import cache_folder
from .prompts import read_prompts
from .reference_images import MINIMUM_IMAGES, file_states

__all__ = ["CaptionedSet", "bundled_captions", "open_captioned", "save_captioned"]

BATCH = 256
VERSION = 1
CAPTIONS, CALIBRATION = "captions.txt", "calibration.txt"
CALIBRATION_PROMPTS = 64
BASELINE_COUNTS = (50, 100, 200, 400, 800, 1600)


@dataclass(frozen=True)
class CaptionedSet:
    """Real pictures with captions, in the space of a judge.

    Args:
        judge: what extracts features, and compares images with texts.
        captions: of the real pictures, in a fixed random order: the first n are the prompts of n images.
        reference: statistics of the pictures' features; its baseline is that of training pictures.
        match: the prompt match of the pictures themselves.
        held_out: the pictures, uint8 (N, C, H, W), with their features (N, D); None where only statistics are there.
        open_train: opens the training pictures; None without them.
        train_features: theirs, (M, D).
        train_captions: theirs; empty where they have none.
    """

    judge: TextJudge
    captions: tuple[str, ...]
    reference: Reference
    match: PromptMatch | None
    held_out: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    open_train: Callable[[], Data] | None = field(default=None, repr=False)
    train_features: Tensor | None = field(default=None, repr=False)
    train_captions: tuple[str, ...] = field(default=(), repr=False)

    def prompts(self, n: int | None = None) -> list[str]:
        """The prompts of n images, at most one of each picture. n: None for all."""
        return list(self.captions[:n])

    @cached_property
    def distinct(self) -> dict[str, int]:
        """The different captions, numbered."""
        return {text: k for k, text in enumerate(dict.fromkeys(self.captions))}

    @property
    def calibration_prompts(self) -> tuple[str, ...]:
        """Captions of training pictures, chosen at random, on which accelerators are calibrated; empty without any."""
        order = torch.randperm(len(self.train_captions), generator=torch.Generator().manual_seed(0)).tolist()
        return tuple(self.train_captions[k] for k in order[:CALIBRATION_PROMPTS])

    @cached_property
    def text_vectors(self) -> Tensor:
        """Of `distinct`, (M, E)."""
        return self.judge.texts(list(self.distinct))

    def prompt_match(self, features: Tensor, prompts: Sequence[str], seed: int = 0) -> PromptMatch | None:
        """The prompt match of images, given their features (N, D) and prompts; None where there are no other captions.

        Prompts that are not captions of the set are candidates too.
        """
        others = [text for text in dict.fromkeys(prompts) if text not in self.distinct]
        distinct = [*self.distinct, *others]
        if len(distinct) < 2:
            return None
        texts = torch.cat([self.text_vectors, self.judge.texts(others)]) if others else self.text_vectors
        return prompt_match(self.judge.image_vectors(features), prompts, texts, distinct, seed=seed)

    def with_baseline(self, n: int) -> CaptionedSet:
        """The same with the real-data baseline of n images: n training pictures against these, up to four times."""
        if self.train_features is None or n < 10 or self.reference.floor_at("frechet", n) is not None:
            return self
        table = train_baseline(self.train_features, self.reference, (n,))
        merged = {key: {**self.reference.floor.get(key, {}), **table.get(key, {})} for key in table}
        return replace(self, reference=replace(self.reference, floor={**self.reference.floor, **merged}))


def train_baseline(features: Tensor, reference: Reference, counts: Sequence[int]) -> dict[str, dict[int, float]]:
    """The metrics of n training pictures, chosen at random, against held-out ones."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    return floor_table(features[order], reference, counts)


def open_captioned(
    path: str | Path,
    judge: str | Path | TextJudge,
    shape: Sequence[int],
    split: str = "test",
    device: torch.device | None = None,
    report: Callable[[str], None] = ignore_messages,
) -> CaptionedSet:
    """Open captioned pictures and compute what a text-to-image model is compared with.

    Features are cached on disk under a hash of the files.

    Args:
        path: a folder or zip of pictures with captions, see `train.open_data`.
        judge: a judge, or what `load_judge` takes.
        shape: (C, H, W) of the images to be measured, to which the pictures are resized.
        split: of the pictures that are held out; the training pictures are those of `train`.
        device: of the judge.
        report: receives lines on what is there.

    Raises:
        BadInput: for a judge or data that cannot be read, pictures without captions, and fewer than 20 of them.
    """
    judge = load_judge(judge)
    judge = judge if device is None else judge.to(device)
    states = file_states(Path(path))
    held_out = open_split(path, split, shape)
    captions = captions_of(held_out, path)
    if len(held_out) < MINIMUM_IMAGES:
        raise BadInput(
            f"{path}: the split {split!r} holds {len(held_out)} captioned pictures: a reference needs at least "
            f"{MINIMUM_IMAGES}, better 200 or more"
        )
    key = {"files": states, "split": split, "shape": list(shape)}
    features, _ = cached_features(lambda: held_out, judge, key)
    more: dict[str, Any] = {}
    if split != "train":
        with contextlib.suppress(BadInput):  # data without training pictures
            open_train = functools.partial(open_split, path, "train", shape)
            known, texts = cached_features(open_train, judge, {**key, "split": "train"})
            more = {"open_train": open_train, "train_features": known, "train_captions": texts}
    if not more:
        report(f"{path} has no training pictures: neither the real-data baseline nor nearest neighbours are measured")
    reference = make_reference(features, Path(path).name, split, judge.name)
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = tuple(captions[k] for k in order)
    pixels = torch.cat([held_out.images(order[k : k + BATCH]) for k in range(0, len(order), BATCH)])
    found = CaptionedSet(judge, shuffled, reference, None, (pixels, features[order]), **more)
    for line in caption_notes(found):
        report(line)
    return replace(found, match=found.prompt_match(features[order], shuffled))


def caption_notes(found: CaptionedSet) -> Iterator[str]:
    """Lines on captions that are few, or longer than the judge reads."""
    if len(found.distinct) < CANDIDATES:
        yield (
            f"{len(found.distinct)} different captions: prompt match is among {len(found.distinct)}, not {CANDIDATES}"
        )
    if cut := found.judge.truncated(found.captions):
        yield f"the judge reads {found.judge.length} tokens: {cut} of {len(found.captions)} captions are longer"


def open_split(path: str | Path, split: str, shape: Sequence[int]) -> Data:
    """The pictures of a split at the size of the model's images."""
    channels, height, width = shape
    return open_data(path, split, (height, width), channels, label="none", report=False)


def captions_of(data: Data, path: str | Path) -> tuple[str, ...]:
    """The captions of pictures. Raises BadInput where there are none, or where those that are there cannot be used."""
    if data.captions is not None:
        return data.captions
    raise BadInput(
        data.caption_problem
        or f"{path} has no captions to use as prompts: write metadata.jsonl (file_name and text), or a .txt beside "
        "each image"
    )


def cached_features(
    open_pictures: Callable[[], Data], judge: TextJudge, key: dict[str, Any]
) -> tuple[Tensor, tuple[str, ...]]:
    """The judge's features of pictures, (N, D), and their captions, from the cache if they are there.

    Args:
        open_pictures: opens the pictures, where the cache does not have them.
        judge: what extracts the features.
        key: what tells these pictures from others.

    Raises:
        BadInput: if the pictures cannot be opened.
    """
    from safetensors import safe_open
    from safetensors.torch import save

    text = json.dumps({**key, "features": judge.name, "version": VERSION})
    cached = cache_folder() / "features" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    with contextlib.suppress(Exception), safe_open(cached, "pt") as file:  # missing or damaged: extracted again
        return file.get_tensor("features"), tuple(json.loads(file.metadata()["captions"]))
    data = open_pictures()
    batches = (range(first, min(first + BATCH, len(data))) for first in range(0, len(data), BATCH))
    features, captions = torch.cat([extract(judge, data.images(batch))[0] for batch in batches]), data.captions or ()
    with contextlib.suppress(BadInput, OSError):  # no cache
        write_file(check_writable(cached), save({"features": features}, {"captions": json.dumps(captions)}))
    return features, captions


# ---- statistics without the pictures ----


def save_captioned(found: CaptionedSet, folder: str | Path) -> None:
    """Write the captions and statistics into the folder of their judge, where `bundled_captions` finds them."""
    folder = Path(folder)
    if found.train_features is not None:
        counts = [n for n in BASELINE_COUNTS if n <= len(found.train_features)]
        table = train_baseline(found.train_features, found.reference, counts)
        reference = replace(found.reference, floor=table)
    else:
        reference = found.reference
    for name, texts in {CAPTIONS: found.captions, CALIBRATION: found.calibration_prompts}.items():
        if texts:
            write_file(check_writable(folder / name), "".join(f"{text}\n" for text in texts).encode())
    save_reference(reference, folder, {"prompt_match": None if found.match is None else vars(found.match)})


def bundled_captions(judge: str | Path, device: torch.device | None = None) -> CaptionedSet | None:
    """The captions and statistics that lie in a judge's folder; None where there are none.

    Args:
        judge: a bundled name, or a folder.
        device: of the judge.

    Raises:
        BadInput: for damaged files, and statistics of another judge.
    """
    folder = BUNDLED_JUDGES.get(str(judge), Path(judge))
    if not ((folder / CAPTIONS).is_file() and (folder / CARD).is_file()):
        return None
    net = load_judge(judge)
    statistics = load_reference(folder)
    if statistics.features != net.name:
        raise BadInput(f"{folder}: the statistics are of {statistics.features}, the judge is {net.name}")
    match = read_json_file(folder / CARD).get("prompt_match")
    captions = tuple(read_prompts(folder / CAPTIONS))
    train = tuple(read_prompts(folder / CALIBRATION)) if (folder / CALIBRATION).is_file() else ()
    net = net if device is None else net.to(device)
    return CaptionedSet(
        net, captions, statistics, None if match is None else PromptMatch(**match), train_captions=train
    )
