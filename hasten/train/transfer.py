"""Batches on their way to the device, and the precision of its matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .data import Batches


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Float32 matrix products of this precision within the block; `highest` leaves what the user has set."""
    before = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def moved(value: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """An entry of a batch on the device, without waiting for the copy where it comes from pinned memory."""
    value = value.to(device, non_blocking=True)
    return value.contiguous(memory_format=torch.channels_last) if channels_last and value.ndim == 4 else value


@contextlib.contextmanager
def prefetch(batches: Batches, device: torch.device) -> Iterator[Callable[[int], dict[str, Tensor]]]:
    """`step -> batch`; where images are decoded on demand, or go to a GPU, the next batch is made while the step runs.

    For a GPU the batches lie in pinned memory, from which the copy does not block.
    """
    pinned = device.type == "cuda"

    def made(step: int) -> dict[str, Tensor]:
        batch = batches[step]
        if not pinned:
            return batch
        return {key: value.pin_memory() if value.device.type == "cpu" else value for key, value in batch.items()}

    if not isinstance(batches, Batches) or not (batches.data.lazy or pinned):
        yield made
        return
    with ThreadPoolExecutor(1) as pool:
        waiting: dict[int, Any] = {}

        def take(step: int) -> dict[str, Tensor]:
            batch = waiting.pop(step) if step in waiting else pool.submit(made, step)
            waiting[step + 1] = pool.submit(made, step + 1)
            return batch.result()

        yield take
