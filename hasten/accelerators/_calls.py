"""Calls of a network that are looked at beforehand: drawn in batches that fit into memory, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["merged", "rows_at_once"]

PLACES = 2**16  # latents or pixels of a batch that is only looked at: 4 images of SDXL at 1024 x 1024


def rows_at_once(shape: Any, n: int) -> int:
    """How many of n samples (C, H, W) are drawn in one batch."""
    places = 1
    for side in tuple(shape)[1:]:
        places *= int(side)
    return max(1, min(n, PLACES // max(places, 1)))


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
