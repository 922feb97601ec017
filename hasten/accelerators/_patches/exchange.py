"""What the ranks of one image tell each other in an evaluation, at once or for the next one."""

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
from .buffers import Heard, Relay, Track

__all__ = ["Exchange", "Shares"]

KINDS = ("halo", "keys", "moments", "rows")
ENOUGH = 3  # rows of the coarsest level: parts with fewer hang on one another so much that a line overshoots


@dataclass(frozen=True)
class Shares:
    """Who has which rows: `units`, rows of the coarsest level, one count a rank, from the top of the image down."""

    units: tuple[int, ...]
    me: int

    @classmethod
    def of(cls, rows: int, ranks: int, me: int) -> Shares:
        """As even as can be: the first ranks have one more where it does not divide."""
        least, more = divmod(rows, ranks)
        return cls(tuple(least + (k < more) for k in range(ranks)), me)

    @property
    def even(self) -> bool:
        """Whether all have the same."""
        return min(self.units) == max(self.units)

    def span(self, rows: int) -> tuple[int, int]:
        """This rank's rows [begin, end) of an image or a feature map of so many."""
        before, whole = sum(self.units[: self.me]), sum(self.units)
        return rows * before // whole, rows * (before + self.units[self.me]) // whole

    def others(self, mine: int) -> tuple[int, ...]:
        """How many of something each rank has (rows, tokens), where this one has `mine`."""
        return tuple(mine * units // self.units[self.me] for units in self.units)


class Exchange:
    """The ranks' talk. In a synchronous evaluation every tensor is exchanged where it is needed, and what the last of
    these exchanged is kept; from then on the layers are given what was said one evaluation before.

    Attributes:
        traffic: bytes that this rank sent to others in the last evaluation, by kind: "halo", "keys" (and values),
            "moments", "rows" (of the answer). A tensor that goes to k ranks counts k times.
        collectives: how often it spoke, by "gather" (keys, values and moments together), "neighbours" and "rows".
        sync: whether this evaluation is a synchronous one; step: which one of the trajectory it is; open: whether it
            has begun.
        multiple: how many rows of the image are one of the network's coarsest level.
        ratio: how far what is heard is drawn on, in steps as long as the one before.
    """

    def __init__(
        self, team: ProcessGroup, mode: str, norm: str, warmup: int, keys: str, chunk: int, forecast: int = 0
    ) -> None:
        self.team, self.mode, self.norm, self.warmup, self.chunk = team, mode, norm, warmup, chunk
        self.forecast = forecast == 1
        self.keys_dtype = torch.bfloat16 if keys == "bf16" else None
        self.gathers: Relay | None = None
        self.halos: Relay | None = None
        self.shares = Shares((1,) * team.size, team.me)
        self._seen: Any = None
        self._weights: tuple[Any, Tensor] | None = None
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
        """What is on its way must arrive before its buffers are freed, or the others wait for ever."""
        if not sys.is_finalizing():
            with contextlib.suppress(Exception):
                self._drop()

    def begin(self, x: Tensor, patch: int = 1) -> None:
        """An evaluation begins, of x (B, C, H, W) in which each row is `patch` rows of the image.

        Raises BadInput where the rows cannot be parted among the ranks, and for a gradient, which the talk loses.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise BadInput("patch_parallel has no gradient: leave out the guides that need one")
        self.part(x.shape[2] * patch)
        if not self._checked:
            check_same_noise(self.team, x, "patch_parallel")
            self._checked = True
        self.open = True
        if self._seen not in (None, (x.shape, x.dtype)):
            self.step = min(self.step, self.warmup)  # another batch: nothing that was heard fits it
            self._drop()
        self._seen = x.shape, x.dtype
        late = self.mode == "async"
        self.sync = not late or self.step <= self.warmup
        self._fills = late and self.step == self.warmup
        if late and self.step == self.warmup + 1 and min(self.shares.units) < ENOUGH:
            warnings.warn(
                f"patch_parallel: a process has {min(self.shares.units)} of the network's coarsest rows, too few to be "
                "near one process where others' features are a query late: use fewer processes, norm=full or mode=sync",
                stacklevel=2,
            )
        self._clear()

    def at(self, time: Tensor) -> None:
        """The network's time () or (B,) of the evaluation that begins: how far it is drawn on, if it is.

        Further than from the one before the last to the last is too far, and backwards is not at all.
        """
        if self.forecast and self.mode == "async":
            self._times = [*self._times[-2:], time.detach().float().reshape(-1)[0]]
            before, last, now = (3 * self._times[:1] + self._times)[-3:]
            step = last - before
            self.ratio = torch.where(step == 0, step, (now - last) / step).clamp(0, 1)

    def part(self, whole: int) -> None:
        """This rank's rows of an image of so many. Raises BadInput where they cannot be parted among the ranks."""
        ranks = self.team.size
        rows, rest = divmod(whole, self.multiple)
        if rest:
            raise BadInput(
                f"patch_parallel: this network's images are parted in multiples of {self.multiple} rows, found {whole}"
            )
        if ranks > rows:
            raise BadInput(
                f"patch_parallel: {whole} rows are {rows} at the coarsest level of this network, found {ranks} "
                f"processes for them (choices: 1 to {rows})"
            )
        self.shares = Shares.of(rows, ranks, self.team.me)

    def finish(self) -> None:
        """It is over: what the last synchronous one exchanged is kept, and of an asynchronous one the rest goes off."""
        if self._fills:
            draws = self.forecast and min(self.shares.units) >= ENOUGH
            if self._gathered:
                lines = [k for k, kind in enumerate(self._kinds) if kind == "keys" and draws]
                self.gathers = Relay([Track(self.team.size, self._gathered, self.chunk, lines)], self._gather_chunk)
            if self._above:
                lines = list(range(len(self._above))) if draws else []
                tracks = [Track(1, heard, self.chunk, lines) for heard in (self._above, self._below)]
                self.halos = Relay(tracks, self._neighbour_chunk)
            self._forget()
        elif not self.sync:
            for line in (self.gathers, self.halos):
                if line is not None:
                    line.finish()
        self.step += 1
        self.open = False

    def gathered(self, kind: str, own: Tensor, now: bool = False) -> Heard:
        """`own` of every rank, (ranks, *shape): fresh in a synchronous evaluation, else as it was one before; and,
        where it is drawn on, as it was two before.

        now: fresh always, and nothing is kept.
        """
        self.traffic[kind] += own.numel() * own.element_size() * (self.team.size - 1)
        if self.gathers is not None and not (self.sync or now):
            return self.gathers.trade([own])[0]
        heard = self._all_gather(own)
        self.collectives["gather"] += 1
        if self._fills and not now:
            self._gathered.append(heard)
            self._kinds.append(kind)
        return heard, None

    def halo(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Rows from the neighbours, (above, below): of the shapes of `down`, which goes to the rank below, and of `up`,
        which goes to the rank above. Zeros beyond the image."""
        me, last = self.team.me, self.team.size - 1
        self.traffic["halo"] += sum(
            rows.numel() * rows.element_size() for rows, there in ((up, me > 0), (down, me < last)) if there
        )
        if self.halos is not None and not self.sync:
            above, below = (self.line(*heard) for heard in self.halos.trade([down, up]))
            return above[0], below[0]
        above, below = down.new_zeros(down.shape), up.new_zeros(up.shape)
        for work in self._neighbours([(down.contiguous(), above), (up.contiguous(), below)], 0):
            work.wait()
        if self._fills:
            self._above.append(above[None])
            self._below.append(below[None])
        return above, below

    def line(self, heard: Tensor, before: Tensor | None, out: Tensor | None = None) -> Tensor:
        """What was heard, drawn on to this evaluation's time along the line from what was heard before."""
        if before is None or self.ratio is None:
            return heard if out is None else out.copy_(heard)
        if out is not None and out.dtype != heard.dtype:
            return out.copy_(self.line(heard, before))
        return torch.lerp(before, heard, (1 + self.ratio).to(heard.dtype), out=out)

    def weights(self, like: Tensor) -> Tensor:
        """The ranks' shares of the image (ranks,), which sum to 1."""
        key = (self.shares, like.dtype, like.device)
        if self._weights is None or self._weights[0] != key:
            units = torch.tensor(self.shares.units, dtype=torch.float64)
            self._weights = key, (units / units.sum()).to(like.dtype).to(like.device)
        return self._weights[1]

    def rows(self, own: Tensor) -> Tensor:
        """The whole of an answer (B, C, H, W) of which `own` are this rank's rows."""
        counts = self.shares.others(own.shape[2])
        own = own if self.shares.even else F.pad(own, (0, 0, 0, max(counts) - own.shape[2]))
        self.traffic["rows"] += own.numel() * own.element_size() * (self.team.size - 1)
        self.collectives["rows"] += 1
        return torch.cat([part[:, :, :count] for part, count in zip(self._all_gather(own), counts)], dim=2)

    def _clear(self) -> None:
        self.traffic = dict.fromkeys(KINDS, 0)
        self.collectives = {"gather": 0, "neighbours": 0, "rows": 0}
        self._forget()

    def _forget(self) -> None:
        self._kinds: list[str] = []
        self._gathered: list[Tensor] = []  # what this evaluation heard, where it is the last synchronous one
        self._above: list[Tensor] = []
        self._below: list[Tensor] = []

    def _drop(self) -> None:
        """Forget what was heard, once nothing is on its way into it."""
        for line in (self.gathers, self.halos):
            if line is not None:
                line.drain()
        self.gathers = self.halos = None

    def _all_gather(self, own: Tensor) -> Tensor:
        into = own.new_empty((self.team.size * own.numel(),))
        all_gather(into, own.contiguous().view(-1), self.team.group)
        return into.view(self.team.size, *own.shape)

    def _gather_chunk(self, tracks: Sequence[Track], c: int) -> list[Any]:
        out, into = tracks[0].turn(c)
        self.collectives["gather"] += 1
        return [all_gather(into, out, self.team.group, later=True)]

    def _neighbour_chunk(self, tracks: Sequence[Track], c: int) -> list[Any]:
        return self._neighbours([track.turn(c) for track in tracks], c)

    def _neighbours(self, pairs: Sequence[tuple[Tensor, Tensor]], c: int) -> list[Any]:
        """Send and receive: the first pair downwards (to the rank below, from the rank above), the second upwards."""
        ranks, me, group = self.team.ranks, self.team.me, self.team.group
        above = ranks[me - 1] if me else None
        below = ranks[me + 1] if me + 1 < len(ranks) else None
        talk = []
        for way, ((out, into), to, source) in enumerate(zip(pairs, (below, above), (above, below))):
            for act, tensor, peer in ((distributed.isend, out, to), (distributed.irecv, into, source)):
                if peer is not None and tensor.numel():
                    talk.append(distributed.P2POp(act, tensor, peer, group, tag=2 * c + way))
        if not talk:
            return []
        self.collectives["neighbours"] += 1
        return list(distributed.batch_isend_irecv(talk))
