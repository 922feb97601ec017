"""Flat buffers in which tensors travel from one evaluation to the next, while the layers go on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import HastenError

__all__ = ["Received", "Relay", "Track"]

Received = tuple[Tensor, Tensor | None]
ALIGN = 8  # bytes: every number format fits there


class Track:
    """A flat buffer with a slot for every tensor of an evaluation, in their order.

    `out` (bytes,) is what this rank says, a buffer (copies * bytes,) what it heard; a chunk of slots that go together
    is one contiguous piece of either. Where slots are drawn on, what was heard one time before is kept in a second one.
    """

    def __init__(self, copies: int, heard: Sequence[Tensor], chunk: int, drawn_on: Collection[int] = ()) -> None:
        self.copies = copies
        self.slots: list[tuple[torch.Size, torch.dtype, int, int]] = []
        self.bounds: list[tuple[int, int]] = []
        end = 0
        for k, tensor in enumerate(heard):
            if k % chunk == 0:
                self.bounds.append((end, end))
            begin, size = end, tensor[0].numel() * tensor.element_size()
            end = begin + size + -size % ALIGN
            self.slots.append((tensor.shape[1:], tensor.dtype, begin, size))
            self.bounds[-1] = self.bounds[-1][0], end
        self.chunk, self.drawn_on = chunk, frozenset(drawn_on)
        count = 2 if self.drawn_on else 1
        self.out, *self.buffers = (
            torch.zeros(size, dtype=torch.uint8, device=heard[0].device) for size in (end, *count * [copies * end])
        )
        self.latest = [0] * len(self.bounds)  # in which buffer each chunk was heard last
        for buffer in self.buffers:
            for k, tensor in enumerate(heard):
                self._slot(buffer, k).copy_(tensor)

    def turn(self, c: int) -> tuple[Tensor, Tensor]:
        """Chunk c of what is said, and where it is heard, from now on: in place of what was heard longest ago."""
        self.latest[c] = (self.latest[c] + 1) % len(self.buffers)
        begin, end = self.bounds[c]
        return self.out[begin:end], self._piece(self.buffers[self.latest[c]], c)

    def said(self, k: int) -> Tensor:
        """Slot k of this rank."""
        shape, dtype, begin, size = self.slots[k]
        return self.out[begin : begin + size].view(dtype).view(shape)

    def heard(self, k: int) -> Tensor:
        """Slot k of all ranks that are heard: (copies, *shape)."""
        return self._slot(self.buffers[self.latest[k // self.chunk]], k)

    def before(self, k: int) -> Tensor | None:
        """What was heard of slot k one time before, where it is drawn on."""
        return self._slot(self.buffers[1 - self.latest[k // self.chunk]], k) if k in self.drawn_on else None

    def _piece(self, buffer: Tensor, c: int) -> Tensor:
        begin, end = self.bounds[c]
        return buffer[self.copies * begin : self.copies * end]

    def _slot(self, buffer: Tensor, k: int) -> Tensor:
        shape, dtype, begin, size = self.slots[k]
        c = k // self.chunk
        begin -= self.bounds[c][0]
        rows = self._piece(buffer, c).view(self.copies, -1)[:, begin : begin + size]
        return rows.view(dtype).view(self.copies, *shape)


class Relay:
    """Tensors that are said in one evaluation and heard in the next, chunk by chunk, while the layers go on.

    A chunk is sent off once all its slots are written and read, which is when the next one is asked for; it is waited
    for when its first slot is needed again.
    """

    def __init__(self, tracks: Sequence[Track], launch: Callable[[Sequence[Track], int], list[Any]]) -> None:
        self.tracks, self._launch, self.chunk = tracks, launch, tracks[0].chunk
        self.works: dict[int, list[Any]] = {}
        self._next, self._due = 0, -1

    def trade(self, own: Sequence[Tensor]) -> list[Received]:
        """Say the tensors of the next slot, and give what was heard of it, and before: views that last until the next
        call."""
        self._flush()
        k, c = self._next, self._next // self.chunk
        if k >= len(self.tracks[0].slots) or own[0].shape != self.tracks[0].slots[k][0]:
            raise HastenError("patch_parallel: the layers came in another order than in the evaluation before")
        for work in self.works.pop(c, ()):
            work.wait()
        for track, tensor in zip(self.tracks, own):
            track.said(k).copy_(tensor)
        self._next += 1
        if self._next == len(self.tracks[0].slots) or self._next % self.chunk == 0:
            self._due = c
        return [(track.heard(k), track.before(k)) for track in self.tracks]

    def finish(self) -> None:
        """The evaluation is over: send off what is left."""
        self._flush()
        self._next = 0

    def drain(self) -> None:
        """Wait for all that is under way."""
        while self.works:
            for work in self.works.popitem()[1]:
                work.wait()

    def _flush(self) -> None:
        if self._due >= 0:
            self.works[self._due] = self._launch(self.tracks, self._due)
            self._due = -1
