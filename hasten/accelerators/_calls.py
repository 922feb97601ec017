"""Calls of a network that are looked at beforehand: drawn in batches that fit into memory, and put together again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import Call, Recorder

__all__ = ["empty_prompt", "in_batches", "merged", "model_calls", "rows_at_once"]

PLACES = 2**16  # latents or pixels of a batch that is only looked at: 4 images of SDXL at 1024 x 1024


def rows_at_once(shape: Any, n: int) -> int:
    """How many of n samples (C, H, W) are drawn in one batch."""
    places = 1
    for side in tuple(shape)[1:]:
        places *= int(side)
    return max(1, min(n, PLACES // max(places, 1)))


def in_batches(n: int, shape: Any, some: Callable[[int, int], list[Any]]) -> list[Any]:
    """The calls when n samples (C, H, W) are drawn: `some(first, rows)` draws the samples from number `first` on."""
    rows = rows_at_once(shape, n)
    return merged([some(first, min(rows, n - first)) for first in range(0, n, rows)])


def model_calls(model: Any, n: int, seed: int, setting: dict[str, Any]) -> list[Call]:
    """What a model's network is asked, call by call, when n images are drawn with this setting of `sample`."""
    classes = len(model.classes or ())

    def some(first: int, rows: int) -> list[Call]:
        recorder = Recorder(model.denoiser)
        told = {"label": [(first + k) % classes for k in range(rows)]} if classes else {}
        drawn: Any = replace(model, denoiser=recorder, decoder=None)
        drawn.sample(rows, seed=seed + first, batch_size=rows, **{**told, **setting})
        return recorder.calls

    if model.conditioning is not None:
        empty_prompt(model.name)
    return in_batches(n, model.shape, some)


def empty_prompt(name: str) -> None:
    """Say that a network of prompts is looked at without one."""
    warnings.warn(
        f"{name} is looked at with the empty prompt alone: give prompts as those to come, "
        "hasten.accelerate(pipe, ..., prompts=[...]), or calls=",
        stacklevel=3,
    )


def merged(parts: Sequence[list[Any]]) -> list[Any]:
    """The calls of several batches as those of one; where these differ in number (adaptive samplers), all of them."""
    if len(parts) == 1:
        return parts[0]
    if len({len(part) for part in parts}) > 1:
        return [call for part in parts for call in part]
    return [together(same) for same in zip(*parts)]


def together(calls: Sequence[Any]) -> Any:
    """Calls at one time as one. Under guidance the rows of its two halves stay together."""
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
