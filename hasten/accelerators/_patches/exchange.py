"""What the ranks of one image exchange in a model evaluation, at once or for the next one."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from ...distributed.groups import ProcessGroup, all_gather, check_same_noise
from ...errors import BadInput
from .buffers import Received, Relay, Track

__all__ = ["Exchange", "RowPartition"]

KINDS = ("halo", "keys", "moments", "rows")
MIN_ROWS = 3  # of the coarsest level: patches with fewer depend on one another so much that extrapolation overshoots


@dataclass(frozen=True)
class RowPartition:
    """Which rank has which rows.

    Attributes:
        units: rows of the coarsest level, one count per rank, from the top of the image down.
        me: this rank's position.
    """

    units: tuple[int, ...]
    me: int

    @classmethod
    def of(cls, rows: int, ranks: int, me: int) -> RowPartition:
        """The most even partition; the first ranks have one more row where it does not divide.

        Args:
            rows: of the coarsest level.
            ranks: how many.
            me: this rank's position.
        """
        minimum, more = divmod(rows, ranks)
        return cls(tuple(minimum + (k < more) for k in range(ranks)), me)

    @property
    def even(self) -> bool:
        """Whether all ranks have the same number of rows."""
        return min(self.units) == max(self.units)

    def span(self, rows: int) -> tuple[int, int]:
        """This rank's rows [begin, end) of an image or a feature map of so many."""
        before, total = sum(self.units[: self.me]), sum(self.units)
        return rows * before // total, rows * (before + self.units[self.me]) // total

    def counts(self, mine: int) -> tuple[int, ...]:
        """How many of something each rank has (rows, tokens), where this one has `mine`."""
        return tuple(mine * units // self.units[self.me] for units in self.units)


class Exchange:
    """The communication of the ranks that share an image.

    In a synchronous evaluation every tensor is exchanged where it is needed, and those of the last synchronous one are
    stored; in later evaluations layers use what was sent one evaluation before.

    Args:
        group: the processes.
        mode: "async", "sync" or "naive", and so norm, warmup, keys, chunk and forecast, see `PatchParallel`.
        norm: see `PatchParallel`.
        warmup: see `PatchParallel`.
        keys: see `PatchParallel`.
        chunk: see `PatchParallel`.
        forecast: see `PatchParallel`.

    Attributes:
        traffic: bytes that this rank sent to others in the last evaluation, by kind: "halo", "keys" (and values),
            "moments", "rows" (of the output). A tensor that goes to k ranks counts k times.
        collectives: how many messages it sent, by "gather" (keys, values and moments together), "neighbours", "rows".
        sync: whether this evaluation is a synchronous one.
        step: the number of this evaluation in the trajectory.
        open: whether it has begun.
        multiple: how many rows of the image are one of the network's coarsest level.
        ratio: how far what was received is extrapolated, in steps as long as the one before.
        partition: of the rows.
    """

    def __init__(
        self, group: ProcessGroup, mode: str, norm: str, warmup: int, keys: str, chunk: int, forecast: int = 0
    ) -> None:
        self.group, self.mode, self.norm, self.warmup, self.chunk = group, mode, norm, warmup, chunk
        self.forecast = forecast == 1
        self.keys_dtype = torch.bfloat16 if keys == "bf16" else None
        self.gathers: Relay | None = None
        self.halos: Relay | None = None
        self.partition = RowPartition((1,) * group.size, group.me)
        self._seen: Any = None
        self._fractions: tuple[Any, Tensor] | None = None
        self.multiple = 1
        self.reset()

    def reset(self) -> None:
        """A new trajectory begins."""
        self.step, self.sync, self.open, self._fills = 0, True, False, False
        self._checked = False  # whether the processes have compared their noise
        self._times: list[Tensor] = []
        self.ratio: Tensor | None = None
        self._seen = None
        self._drop()
        self._clear()

    def __del__(self) -> None:
        """What is on its way must arrive before its buffers are freed, or the other ranks wait for ever."""
        if not sys.is_finalizing():
            with contextlib.suppress(Exception):
                self._drop()

    def begin(self, x: Tensor, patch: int = 1) -> None:
        """Begin a model evaluation.

        Args:
            x: (B, C, H, W).
            patch: how many rows of the image each row of x is.

        Raises:
            BadInput: where the rows cannot be divided among the ranks, and where a gradient is needed, which is lost
                between processes.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise BadInput("patch_parallel has no gradient: do not use guides that need one")
        self.divide(x.shape[2] * patch)
        if not self._checked:
            check_same_noise(self.group, x, "patch_parallel")
            self._checked = True
        self.open = True
        if self._seen not in (None, (x.shape, x.dtype)):
            self.step = min(self.step, self.warmup)  # another batch: nothing that was received fits it
            self._drop()
        self._seen = x.shape, x.dtype
        late = self.mode == "async"
        self.sync = not late or self.step <= self.warmup
        self._fills = late and self.step == self.warmup
        if late and self.step == self.warmup + 1 and min(self.partition.units) < MIN_ROWS:
            warnings.warn(
                f"patch_parallel: a process has {min(self.partition.units)} of the network's coarsest rows, too few to "
                "be near one process with features of other processes one evaluation late: use fewer processes, "
                "norm=full or mode=sync",
                stacklevel=2,
            )
        self._clear()

    def set_time(self, time: Tensor) -> None:
        """Set the network's time () or (B,) of this evaluation, which features are extrapolated to.

        At most by the distance between the last two evaluations, and never backwards.
        """
        if self.forecast and self.mode == "async":
            self._times = [*self._times[-2:], time.detach().float().reshape(-1)[0]]
            before, last, now = (3 * self._times[:1] + self._times)[-3:]
            step = last - before
            self.ratio = torch.where(step == 0, step, (now - last) / step).clamp(0, 1)

    def divide(self, image_rows: int) -> None:
        """Divide the rows of an image among the ranks.

        Args:
            image_rows: of the image.

        Raises:
            BadInput: where they are no multiple of `multiple`, or fewer of these than ranks.
        """
        ranks = self.group.size
        rows, rest = divmod(image_rows, self.multiple)
        if rest:
            raise BadInput(
                f"patch_parallel: this network's images are divided in multiples of {self.multiple} rows, found "
                f"{image_rows}"
            )
        if ranks > rows:
            raise BadInput(
                f"patch_parallel: {image_rows} rows are {rows} at the coarsest level of this network, found {ranks} "
                f"processes for them (choices: 1 to {rows})"
            )
        self.partition = RowPartition.of(rows, ranks, self.group.me)

    def finish(self) -> None:
        """End the evaluation: store what the last synchronous one exchanged, or send the last chunk."""
        if self._fills:
            extrapolates = self.forecast and min(self.partition.units) >= MIN_ROWS
            if self._gathered:
                slots = [k for k, kind in enumerate(self._kinds) if kind == "keys" and extrapolates]
                self.gathers = Relay([Track(self.group.size, self._gathered, self.chunk, slots)], self._gather_chunk)
            if self._above:
                slots = list(range(len(self._above))) if extrapolates else []
                tracks = [Track(1, received, self.chunk, slots) for received in (self._above, self._below)]
                self.halos = Relay(tracks, self._neighbour_chunk)
            self._forget()
        elif not self.sync:
            for relay in (self.gathers, self.halos):
                if relay is not None:
                    relay.finish()
        self.step += 1
        self.open = False

    def gather(self, kind: str, own: Tensor, now: bool = False) -> Received:
        """A tensor of every rank.

        Args:
            kind: of `KINDS`, for the statistics.
            own: this rank's, of the same shape on all.
            now: always those of this evaluation, and store nothing.

        Returns:
            (ranks, *shape): those of this evaluation if it is synchronous, else of the one before; and, where it is
            extrapolated, of two before.
        """
        self.traffic[kind] += own.numel() * own.element_size() * (self.group.size - 1)
        if self.gathers is not None and not (self.sync or now):
            return self.gathers.trade([own])[0]
        received = self._all_gather(own)
        self.collectives["gather"] += 1
        if self._fills and not now:
            self._gathered.append(received)
            self._kinds.append(kind)
        return received, None

    def halo(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the neighbours.

        Args:
            up: goes to the rank above.
            down: goes to the rank below.

        Returns:
            The rows above, of the shape of `down`, and below, of the shape of `up`; zeros beyond the image.
        """
        me, last = self.group.me, self.group.size - 1
        self.traffic["halo"] += sum(
            rows.numel() * rows.element_size() for rows, there in ((up, me > 0), (down, me < last)) if there
        )
        if self.halos is not None and not self.sync:
            above, below = (self.extrapolate(*received) for received in self.halos.trade([down, up]))
            return above[0], below[0]
        above, below = down.new_zeros(down.shape), up.new_zeros(up.shape)
        for handle in self._neighbours([(down.contiguous(), above), (up.contiguous(), below)], 0):
            handle.wait()
        if self._fills:
            self._above.append(above[None])
            self._below.append(below[None])
        return above, below

    def extrapolate(self, received: Tensor, before: Tensor | None, out: Tensor | None = None) -> Tensor:
        """What was received, linearly extrapolated to the time of this evaluation.

        Args:
            received: in the last evaluation.
            before: in the one before; None: `received` is used as it is.
            out: is written to, if given.
        """
        if before is None or self.ratio is None:
            return received if out is None else out.copy_(received)
        if out is not None and out.dtype != received.dtype:
            return out.copy_(self.extrapolate(received, before))
        return torch.lerp(before, received, (1 + self.ratio).to(received.dtype), out=out)

    def fractions(self, like: Tensor) -> Tensor:
        """The fraction of the image that each rank has (ranks,), which sum to 1."""
        key = (self.partition, like.dtype, like.device)
        if self._fractions is None or self._fractions[0] != key:
            units = torch.tensor(self.partition.units, dtype=torch.float64)
            self._fractions = key, (units / units.sum()).to(like.dtype).to(like.device)
        return self._fractions[1]

    def gather_rows(self, own: Tensor) -> Tensor:
        """All rows of an output (B, C, H, W), of which `own` are this rank's."""
        counts = self.partition.counts(own.shape[2])
        own = own if self.partition.even else F.pad(own, (0, 0, 0, max(counts) - own.shape[2]))
        self.traffic["rows"] += own.numel() * own.element_size() * (self.group.size - 1)
        self.collectives["rows"] += 1
        return torch.cat([part[:, :, :count] for part, count in zip(self._all_gather(own), counts)], dim=2)

    def _clear(self) -> None:
        """Reset the statistics."""
        self.traffic = dict.fromkeys(KINDS, 0)
        self.collectives = {"gather": 0, "neighbours": 0, "rows": 0}
        self._forget()

    def _forget(self) -> None:
        """Drop what this evaluation received, which is stored where it is the last synchronous one."""
        self._kinds: list[str] = []
        self._gathered: list[Tensor] = []
        self._above: list[Tensor] = []
        self._below: list[Tensor] = []

    def _drop(self) -> None:
        """Drop the buffers, once nothing is on its way into them."""
        for relay in (self.gathers, self.halos):
            if relay is not None:
                relay.drain()
        self.gathers = self.halos = None

    def _all_gather(self, own: Tensor) -> Tensor:
        """Every rank's `own`: (ranks, *shape)."""
        into = own.new_empty((self.group.size * own.numel(),))
        all_gather(into, own.contiguous().view(-1), self.group.group)
        return into.view(self.group.size, *own.shape)

    def _gather_chunk(self, tracks: Sequence[Track], c: int) -> list[Any]:
        """Start to gather chunk c."""
        out, into = tracks[0].turn(c)
        self.collectives["gather"] += 1
        return [all_gather(into, out, self.group.group, later=True)]

    def _neighbour_chunk(self, tracks: Sequence[Track], c: int) -> list[Any]:
        """Start to send chunk c to the neighbours, and to receive theirs."""
        return self._neighbours([track.turn(c) for track in tracks], c)

    def _neighbours(self, pairs: Sequence[tuple[Tensor, Tensor]], c: int) -> list[Any]:
        """Send and receive: the first pair downwards (to the rank below, from the rank above), the second upwards."""
        ranks, me, group = self.group.ranks, self.group.me, self.group.group
        above = ranks[me - 1] if me else None
        below = ranks[me + 1] if me + 1 < len(ranks) else None
        operations = []
        directions = zip(pairs, (below, above), (above, below))
        for direction, ((out, into), to, source) in enumerate(directions):
            for act, tensor, peer in ((distributed.isend, out, to), (distributed.irecv, into, source)):
                if peer is not None and tensor.numel():
                    operations.append(distributed.P2POp(act, tensor, peer, group, tag=2 * c + direction))
        if not operations:
            return []
        self.collectives["neighbours"] += 1
        return list(distributed.batch_isend_irecv(operations))
