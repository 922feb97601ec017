"""Which query of a sampling a pipeline is at, by its scheduler's timesteps and without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput

__all__ = ["Timeline"]


class Timeline:
    """The queries of one sampling after another.

    Attributes:
        values: the scheduler's timesteps, in the network's own time.
        begin: the place in them where the sampling began; -1 where its first time is none of them.
        regular: whether the network has been asked once at each of them, in order. It is not where a pipeline asks
            twice a step, goes back, or has another scheduler than the one that is followed.
    """

    def __init__(self) -> None:
        self.table: Any = None
        self.values: list[float] = []
        self.begin, self.done, self.regular = -1, 0, True

    def ask(self, scheduler: Any, timestep: Any) -> bool:
        """Count one query at this timestep (a number, () or (B,)). Returns whether a sampling begins with it."""
        table, fresh = scheduler.timesteps, scheduler.timesteps is not self.table
        if fresh:
            self.table, self.values = table, as_floats(table)
            self.begin, self.done = -1, 0
            self.regular = getattr(scheduler, "num_inference_steps", 0) is not None  # its set_timesteps was called
        place = index_in_table(timestep, table)
        value = None if place is not None else single_timestep(timestep)
        if self.done and self._open():
            expected = self.begin + self.done
            if self.begin >= 0 and (place == expected if value is None else near(self.values[expected], value)):
                self.done += 1
                return False
            self.regular = False
        if place is None:
            place = self._found(value, getattr(scheduler, "begin_index", None))  # type: ignore[arg-type]
        self.begin, self.done = place, 1
        return True

    def _open(self) -> bool:
        """Whether the sampling is not over."""
        return self.begin < 0 or self.begin + self.done < len(self.values)

    def _found(self, value: float, begin: Any) -> int:
        if isinstance(begin, int) and 0 <= begin < len(self.values) and near(self.values[begin], value):
            return begin
        return next((k for k, known in enumerate(self.values) if near(known, value)), -1)


def near(known: float, value: float) -> bool:
    return abs(known - value) <= 1e-6 * max(1.0, abs(value))


def as_floats(timesteps: Any) -> list[float]:
    """The numbers of a tensor; copied first and widened then, since not every device has float64."""
    return torch.as_tensor(timesteps).detach().cpu().double().flatten().tolist()


def single_timestep(timestep: Any) -> float:
    """The time that all the batch is asked at."""
    found = as_floats(timestep)
    if any(value != found[0] for value in found):
        raise BadInput("an accelerated network must be asked at one time for all its batch")
    return found[0]


def index_in_table(timestep: Any, table: Any) -> int | None:
    """Which entry of a table (N,) a timestep is, where it is a view of one; None where that cannot be told."""
    if not isinstance(timestep, Tensor) or not isinstance(table, Tensor) or table.ndim != 1:
        return None
    if not _same_memory(timestep, table) or timestep.dtype != table.dtype or not timestep.numel():
        return None
    if any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride())):
        return None  # several entries
    place, rest = divmod(timestep.storage_offset() - table.storage_offset(), table.stride(0) or 1)
    return place if not rest and 0 <= place < len(table) else None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    base = b if b._base is None else b._base
    if a._base is not None and a._base is base:
        return True
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
