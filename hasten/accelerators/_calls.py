"""Recorded model evaluations of calibration images: sampled in batches that fit into memory, and merged again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from . import Call, Recorder

__all__ = ["concat_calls", "in_batches", "merge_calls", "model_calls", "rows_at_once", "warn_empty_prompt"]

PIXELS = 2**16  # latents or pixels of a calibration batch: 4 images of SDXL at 1024 x 1024


def rows_at_once(shape: Any, n: int) -> int:
    """How many of n samples (C, H, W) are drawn in one batch.

    Args:
        shape: (C, H, W) of one sample.
        n: the number of samples, 1 or more.
    """
    pixels = 1
    for side in tuple(shape)[1:]:
        pixels *= int(side)
    return max(1, min(n, PIXELS // max(pixels, 1)))


def in_batches(n: int, shape: Any, sample: Callable[[int, int], list[Any]]) -> list[Any]:
    """The model evaluations of n samples, drawn in batches.

    Args:
        n: the number of samples.
        shape: (C, H, W) of one sample.
        sample: `sample(first, rows)` draws the samples from number `first` on and returns their model evaluations.
    """
    rows = rows_at_once(shape, n)
    return merge_calls([sample(first, min(rows, n - first)) for first in range(0, n, rows)])


def model_calls(model: Any, n: int, seed: int, setting: dict[str, Any]) -> list[Call]:
    """The model evaluations of n images of a model.

    Args:
        model: a `Model`; one of prompts is sampled with its `calibration_prompts`, image k with number k mod their
            count, and one that reads source images likewise with its `calibration_sources`.
        n: how many images are sampled.
        seed: of the first of them.
        setting: arguments of `Model.sample`.

    Raises:
        BadInput: for a model that reads source images and has none.
    """
    classes = len(model.classes or ())
    prompts = tuple(getattr(model, "calibration_prompts", ()))
    sources: Tensor | None = getattr(model, "calibration_sources", None)

    def sample(first: int, rows: int) -> list[Call]:
        recorder = Recorder(model.denoiser)
        choices = range(classes) if classes else prompts if model.conditioning is not None else ()
        labels = {"label": [choices[(first + k) % len(choices)] for k in range(rows)]} if choices else {}
        images: dict[str, Any] = {}
        if sources is not None:
            images["images"] = sources[(torch.arange(rows) + first) % len(sources)]
        recorded: Any = replace(model, denoiser=recorder, decoder=None)
        recorded.sample(rows, seed=seed + first, batch_size=rows, **{**labels, **images, **setting})
        return recorder.calls

    if getattr(model.denoiser, "source_channels", 0) and sources is None and "images" not in setting:
        raise BadInput(
            f"{model.name} makes its samples from source images and has none to be calibrated on: give --data "
            "(hasten.workflows.source_data.calibration_sources), or set its calibration_sources"
        )
    if model.conditioning is not None and not any(prompts):
        warn_empty_prompt(model.name)
    return in_batches(n, model.shape, sample)


def warn_empty_prompt(name: str) -> None:
    """Warn that a text-to-image network is calibrated without prompts."""
    warnings.warn(
        f"{name} is calibrated with the empty prompt alone: give prompts like those to come, "
        "hasten.accelerate(pipe, ..., prompts=[...]), or calls=",
        stacklevel=3,
    )


def merge_calls(batches: Sequence[list[Any]]) -> list[Any]:
    """The model evaluations of several batches as those of one.

    Where their numbers differ (adaptive samplers), all of them one after the other.
    """
    if len(batches) == 1:
        return batches[0]
    if len({len(batch) for batch in batches}) > 1:
        return [call for batch in batches for call in batch]
    return [concat_calls(calls) for calls in zip(*batches)]


def concat_calls(calls: Sequence[Any]) -> Any:
    """Model evaluations at one time as one; the rows of guidance's two halves stay in their half."""
    rows = [len(x) for x, _, _ in calls]

    def joined(values: Sequence[Any]) -> Any:
        if not all(isinstance(v, Tensor) and v.ndim and len(v) == n for v, n in zip(values, rows)):
            return values[0]
        if any(n % 2 for n in rows):
            return torch.cat(list(values))
        halves = [v.chunk(2) for v in values]
        return torch.cat([*(first for first, _ in halves), *(second for _, second in halves)])

    cond = {key: joined([other[key] for _, _, other in calls]) for key in calls[0][2]}
    return joined([x for x, _, _ in calls]), calls[0][1], cond
