"""Flat buffers for tensors that are sent in one model evaluation and used in the next, while the layers run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import HastenError

__all__ = ["Received", "Relay", "Track"]

Received = tuple[Tensor, Tensor | None]  # of one evaluation ago; of two, where it is extrapolated
ALIGN = 8  # bytes: every number format is aligned there


class Track:
    """A flat buffer with a slot for every tensor of a model evaluation, in their order.

    `out` (bytes,) is sent by this rank, a buffer (copies * bytes,) was received; a chunk of slots that are sent in one
    message is a contiguous piece of either. For slots that are extrapolated, a second buffer holds what was received
    before.

    Args:
        copies: how many ranks are received from.
        received: (copies, *shape) each, the first contents.
        chunk: how many slots are sent together.
        extrapolated: numbers of the slots that are extrapolated.
    """

    def __init__(self, copies: int, received: Sequence[Tensor], chunk: int, extrapolated: Collection[int] = ()) -> None:
        self.copies = copies
        self.slots: list[tuple[torch.Size, torch.dtype, int, int]] = []
        self.bounds: list[tuple[int, int]] = []
        end = 0
        for k, tensor in enumerate(received):
            if k % chunk == 0:
                self.bounds.append((end, end))
            begin, size = end, tensor[0].numel() * tensor.element_size()
            end = begin + size + -size % ALIGN
            self.slots.append((tensor.shape[1:], tensor.dtype, begin, size))
            self.bounds[-1] = self.bounds[-1][0], end
        self.chunk, self.extrapolated = chunk, frozenset(extrapolated)
        count = 2 if self.extrapolated else 1
        self.out, *self.buffers = (
            torch.zeros(size, dtype=torch.uint8, device=received[0].device) for size in (end, *count * [copies * end])
        )
        self.latest = [0] * len(self.bounds)  # the buffer that received each chunk last
        for buffer in self.buffers:
            for k, tensor in enumerate(received):
                self._slot(buffer, k).copy_(tensor)

    def turn(self, c: int) -> tuple[Tensor, Tensor]:
        """Chunk c to send, and the place of the oldest one received, which it now overwrites."""
        self.latest[c] = (self.latest[c] + 1) % len(self.buffers)
        begin, end = self.bounds[c]
        return self.out[begin:end], self._piece(self.buffers[self.latest[c]], c)

    def outgoing(self, k: int) -> Tensor:
        """Slot k of this rank (*shape), to be filled before its chunk is sent."""
        shape, dtype, begin, size = self.slots[k]
        return self.out[begin : begin + size].view(dtype).view(shape)

    def received(self, k: int) -> Tensor:
        """Slot k of all ranks that are received from: (copies, *shape)."""
        return self._slot(self.buffers[self.latest[k // self.chunk]], k)

    def before(self, k: int) -> Tensor | None:
        """Slot k as it was received one evaluation earlier; None where it is not extrapolated."""
        return self._slot(self.buffers[1 - self.latest[k // self.chunk]], k) if k in self.extrapolated else None

    def _piece(self, buffer: Tensor, c: int) -> Tensor:
        """Chunk c of a receive buffer."""
        begin, end = self.bounds[c]
        return buffer[self.copies * begin : self.copies * end]

    def _slot(self, buffer: Tensor, k: int) -> Tensor:
        """Slot k of a receive buffer: (copies, *shape)."""
        shape, dtype, begin, size = self.slots[k]
        c = k // self.chunk
        begin -= self.bounds[c][0]
        rows = self._piece(buffer, c).view(self.copies, -1)[:, begin : begin + size]
        return rows.view(dtype).view(self.copies, *shape)


class Relay:
    """Tensors that are sent in one model evaluation and used in the next, chunk by chunk, while the layers run.

    A chunk is sent once all its slots are written and read, which is when the next one is needed; it is awaited when
    its first slot is needed again.

    Args:
        tracks: with the same chunks.
        launch: `launch(tracks, c)` starts to send and receive chunk c and returns handles to wait for.
    """

    def __init__(self, tracks: Sequence[Track], launch: Callable[[Sequence[Track], int], list[Any]]) -> None:
        self.tracks, self._launch, self.chunk = tracks, launch, tracks[0].chunk
        self.handles: dict[int, list[Any]] = {}
        self._next, self._due = 0, -1

    def trade(self, own: Sequence[Tensor]) -> list[Received]:
        """Send the tensors of the next slot, one for each track.

        Returns:
            What was received of the slot, and before: views that are valid until the next call.

        Raises:
            HastenError: where the layers run in another order than in the evaluation before.
        """
        self._flush()
        k, c = self._next, self._next // self.chunk
        if k >= len(self.tracks[0].slots) or own[0].shape != self.tracks[0].slots[k][0]:
            raise HastenError("patch_parallel: the layers came in another order than in the evaluation before")
        for handle in self.handles.pop(c, ()):
            handle.wait()
        for track, tensor in zip(self.tracks, own):
            track.outgoing(k).copy_(tensor)
        self._next += 1
        if self._next == len(self.tracks[0].slots) or self._next % self.chunk == 0:
            self._due = c
        return [(track.received(k), track.before(k)) for track in self.tracks]

    def finish(self) -> None:
        """End the evaluation: send the last chunk."""
        self._flush()
        self._next = 0

    def drain(self) -> None:
        """Wait for all chunks on their way."""
        while self.handles:
            for handle in self.handles.popitem()[1]:
                handle.wait()

    def _flush(self) -> None:
        """Send the chunk that is complete, if there is one."""
        if self._due >= 0:
            self.handles[self._due] = self._launch(self.tracks, self._due)
            self._due = -1
