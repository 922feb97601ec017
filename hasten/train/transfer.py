"""Moving batches to the device, and the precision of its matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..utils.devices import has_pinned_memory
from .data import Batches


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products inside; `highest` leaves the user's setting."""
    before = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def to_device(value: Tensor, device: torch.device, channels_last: bool) -> Tensor:
    """Copy a tensor of a batch to the device, asynchronously where it comes from pinned memory."""
    value = value.to(device, non_blocking=has_pinned_memory(device))
    return value.contiguous(memory_format=torch.channels_last) if channels_last and value.ndim == 4 else value


@contextlib.contextmanager
def prefetch(batches: Any, device: torch.device) -> Iterator[Callable[[int], dict[str, Tensor]]]:
    """Yield `step -> batch`, which loads the next batch in a thread while the current step runs.

    Batches are prefetched where images are decoded on demand, or for a GPU. For a GPU they lie in pinned memory, from
    which copies are asynchronous.

    Args:
        batches: `batches[k]` is the batch of step k.
        device: the device that the batches are for.
    """
    pinned = has_pinned_memory(device)

    def load(step: int) -> dict[str, Tensor]:
        batch = batches[step]
        if not pinned:
            return batch
        return {key: value.pin_memory() if value.device.type == "cpu" else value for key, value in batch.items()}

    if not isinstance(batches, Batches) or not (batches.data.lazy or pinned):
        yield load
        return
    with ThreadPoolExecutor(1) as pool:
        pending: dict[int, Future[dict[str, Tensor]]] = {}

        def take(step: int) -> dict[str, Tensor]:
            batch = pending.pop(step) if step in pending else pool.submit(load, step)
            pending[step + 1] = pool.submit(load, step + 1)
            return batch.result()

        yield take
