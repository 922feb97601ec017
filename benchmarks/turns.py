"""Ways of sampling measured in turns, batch by batch: what slows the machine for a while slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from hasten.model.resolve import Resolved
from hasten.plan.draw import draw
from hasten.sampling import Noise

T = TypeVar("T")


def in_turns(rows: Sequence[T], batches: Iterable[tuple[int, int]], sample: Callable[[T, int, int], None]) -> None:
    """Let every row sample every batch, the rows in one order and then in the other.

    Args:
        rows: ways of sampling.
        batches: first seed and number of images of each.
        sample: is called with a row and a batch.
    """
    for turn, (first, count) in enumerate(batches):
        for row in rows if turn % 2 == 0 else rows[::-1]:
            sample(row, first, count)
        print(f"{first + count} images, {time.process_time():.0f} CPU seconds", flush=True)


def timed_draw(
    resolved: Resolved, seeds: range, shape: Sequence[int], cond: Mapping[str, Any],
    decode: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, float]:  # fmt: skip
    """Samples of these seeds, and the CPU seconds that they and their decoding took."""
    begin = time.process_time()
    noise = Noise(seeds, tuple(shape))
    x = decode(draw(resolved.denoiser, None, resolved.times, noise, plan=resolved.plan, cond=dict(cond)))
    return x, time.process_time() - begin
