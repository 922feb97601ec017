"""Which evaluation of a sampling a pipeline is at, from its scheduler's timesteps, without a device synchronisation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput

__all__ = ["Branches", "Timeline", "index_in_table"]


class Timeline:
    """Counts the evaluations of consecutive samplings.

    Attributes:
        values: the scheduler's timesteps, as numbers.
        begin: the index of the timestep where the sampling began; -1 where its first time is none of them.
        done: evaluations since then.
        regular: whether the network was evaluated once at each timestep, in order. It is not where a pipeline evaluates
            twice per step, goes back, or has another scheduler.
    """

    def __init__(self) -> None:
        self.table: Any = None
        self.values: list[float] = []
        self.begin, self.done, self.regular = -1, 0, True

    def advance(self, scheduler: Any, timestep: Any) -> bool:
        """Count one evaluation.

        Args:
            scheduler: of the pipeline.
            timestep: a number, () or (B,).

        Returns:
            Whether a sampling begins with it.
        """
        table = scheduler.timesteps
        if table is not self.table:
            self.table, self.values = table, as_floats(table)
            self.begin, self.done = -1, 0
            self.regular = getattr(scheduler, "num_inference_steps", 0) is not None  # its set_timesteps was called
        index = index_in_table(timestep, table)
        value = None if index is not None else single_timestep(timestep)
        if self.done and self._unfinished():
            expected = self.begin + self.done
            if self.begin >= 0 and (index == expected if value is None else is_close(self.values[expected], value)):
                self.done += 1
                return False
            self.regular = False
        if value is not None:
            index = self._nearest_index(value, getattr(scheduler, "begin_index", None))
        self.begin, self.done = -1 if index is None else index, 1
        return True

    def at(self, timestep: Any) -> bool:
        """Whether a timestep is that of the evaluation counted last."""
        if not self.done or self.begin < 0:
            return False
        last, index = self.begin + self.done - 1, index_in_table(timestep, self.table)
        return index == last if index is not None else is_close(self.values[last], single_timestep(timestep))

    def _unfinished(self) -> bool:
        """Whether timesteps remain."""
        return self.begin < 0 or self.begin + self.done < len(self.values)

    def _nearest_index(self, value: float, begin: Any) -> int:
        """The index of a time in `values`, `begin` where several are equal; -1 where it is none of them."""
        if isinstance(begin, int) and 0 <= begin < len(self.values) and is_close(self.values[begin], value):
            return begin
        return next((k for k, known in enumerate(self.values) if is_close(known, value)), -1)


class Branches:
    """The evaluations that a pipeline makes one after the other in each step: the branches of guidance.

    A further branch is an evaluation at the same timestep of the very tensor that the one before had.

    Attributes:
        timelines: one per branch.
        current: the branch of the evaluation counted last.
    """

    def __init__(self) -> None:
        self.timelines = [Timeline()]
        self.current = 0
        self._x: Any = None  # a weak reference

    @property
    def timeline(self) -> Timeline:
        """The timeline of the current branch."""
        return self.timelines[self.current]

    def repeats(self, x: Tensor) -> bool:
        """Whether the evaluation before had this very tensor as its sample."""
        return self._x is not None and self._x() is x

    def advance(self, scheduler: Any, timestep: Any, x: Tensor) -> bool:
        """Count one evaluation, see `Timeline.advance`.

        Args:
            scheduler: of the pipeline.
            timestep: a number, () or (B,).
            x: the sample.
        """
        again = self.repeats(x) and self.timelines[0].at(timestep)
        self.current = self.current + 1 if again else 0
        self._x = weakref.ref(x)
        if self.current == len(self.timelines):
            self.timelines.append(Timeline())
        return self.timeline.advance(scheduler, timestep)


def is_close(known: float, value: float) -> bool:
    """Whether two times are equal up to rounding."""
    return abs(known - value) <= 1e-6 * max(1.0, abs(value))


def as_floats(timesteps: Any) -> list[float]:
    """The numbers of a tensor; moved to the CPU before the cast, since not every device has float64."""
    return torch.as_tensor(timesteps).detach().cpu().double().flatten().tolist()


def single_timestep(timestep: Any) -> float:
    """The timestep of all samples of the batch.

    Raises:
        BadInput: where they differ.
    """
    values = as_floats(timestep)
    if any(value != values[0] for value in values):
        raise BadInput("an accelerated network must be evaluated at one time for all samples of a batch")
    return values[0]


def index_in_table(timestep: Any, table: Any) -> int | None:
    """The index in a table (N,) of a timestep that is a view of one of its entries; else None."""
    if not isinstance(timestep, Tensor) or not isinstance(table, Tensor) or table.ndim != 1:
        return None
    if not _same_memory(timestep, table) or timestep.dtype != table.dtype or not timestep.numel():
        return None
    if any(size > 1 and stride for size, stride in zip(timestep.shape, timestep.stride())):
        return None  # several entries
    index, rest = divmod(int(timestep.storage_offset()) - int(table.storage_offset()), table.stride(0) or 1)
    return index if not rest and 0 <= index < len(table) else None


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share their storage."""
    base = b if b._base is None else b._base
    if a._base is not None and a._base is base:
        return True
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
