"""`Workload`: the operations of a model evaluation, and what ranks with patches exchange in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..accelerators._patches.exchange import RowPartition
from ..errors import BadInput
from .hardware import Device, ParallelLayout

__all__ = ["Message", "Op", "Workload"]

KINDS = ("halo", "keys", "moments", "rows", "branches")


@dataclass(frozen=True)
class Op:
    """An operation.

    Attributes:
        macs: multiply-accumulates.
        moving: bytes of memory that grow with the rows.
        still: bytes of memory that do not.
        divided: whether it is on rows, and so divided among ranks.
        text: whether it is on a text, whose result is cached during a sampling.
    """

    macs: int
    moving: int
    still: int
    divided: bool
    text: bool = False


@dataclass(frozen=True)
class Message:
    """A tensor that ranks exchange.

    Attributes:
        kind: "halo", "keys", "moments" or "rows".
        count: "halo": numbers per row; "keys", "rows": numbers of the whole image; "moments": numbers of each rank.
        size: bytes per number.
        rows: "halo": rows of the map; "moments": numbers of the map.
        above: "halo": rows that are read above.
        below: "halo": rows that are read below.
        width: "moments": bytes per number of the map.
    """

    kind: str
    count: int
    size: int
    rows: int = 0
    above: int = 0
    below: int = 0
    width: int = 0

    def sent(self, layout: ParallelLayout, units: Sequence[int], me: int) -> int:
        """Bytes that a rank sends.

        Args:
            layout: of the ranks.
            units: rows of the coarsest level that each rank has.
            me: the rank's position.
        """
        others, largest, total = len(units) - 1, max(units), sum(units)
        if self.kind == "halo":
            there = self.below * (me > 0) + self.above * (me < others)
            return self.count * self.size * (there if layout.neighbours else 2 * max(self.above, self.below) * others)
        if self.kind == "moments":
            return self.count * self.size * others
        size = 2 if self.kind == "keys" and layout.keys == "bf16" else self.size
        return self.count * largest // total * size * others

    def moved(self, layout: ParallelLayout, fraction: float) -> float:
        """Additional bytes read and written in memory, compared with one device.

        Args:
            layout: of the ranks.
            fraction: of the rows that the rank has.
        """
        if self.kind == "halo":  # rows and halo are concatenated: read and written
            return 2 * self.count * self.rows * self.size * fraction
        if self.kind == "moments":
            size = self.width
            own = self.rows * fraction
            if layout.neighbours:  # scaled and shifted; converted to float32 and back, where it is none
                return own * (4 * size if size >= 4 else 32)
            return own * 9 * size  # E[x], x^2, E[x^2], x - m, / s, * w, + b: 12 for 3
        if self.kind == "keys":  # own ones are sent, those of others received; all are concatenated
            size = 2 if layout.keys == "bf16" else self.size
            return self.count * (2 * fraction * size + (1 - fraction) * size + size + self.size)
        return 0.0

    def extrapolated(self, layout: ParallelLayout, fraction: float) -> float:
        """Additional bytes read where others' keys are extrapolated: those of one more evaluation.

        Args:
            layout: of the ranks.
            fraction: of the rows that the rank has.
        """
        size = 2 if layout.keys == "bf16" else self.size
        return (1 - fraction) * self.count * size if self.kind == "keys" and layout.forecast else 0.0


@dataclass(frozen=True)
class Workload:
    """A model evaluation of a batch.

    Attributes:
        batch: the batch size.
        ops: its operations.
        exchanges: what ranks with patches exchange; None for a network that `patch_parallel` does not support.
        units: rows of the coarsest level.
        output: bytes of the output.
        half: the same for the larger half of the batch, or None.
    """

    batch: int
    ops: tuple[Op, ...]
    exchanges: tuple[Message, ...] | None
    units: int
    output: int
    half: Workload | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of an evaluation on one device."""
        return sum(op.macs for op in self.ops)

    def macs_of(self, fraction: float, first: bool = True) -> float:
        """Multiply-accumulates of a rank.

        Args:
            fraction: of the rows that it has.
            first: the text is new.
        """
        return sum(op.macs * (fraction if op.divided else 1) for op in self.ops if first or not op.text)

    def rows_of(self, ranks: int) -> tuple[int, ...]:
        """Rows of the coarsest level that each rank has, divided as evenly as possible.

        Args:
            ranks: how many share the rows.

        Raises:
            BadInput: for more ranks than rows, and for a network whose rows cannot be divided.
        """
        if ranks > 1 and self.exchanges is None:
            raise BadInput(
                "rows are divided in hasten's UNet and in UNet2DModel and UNet2DConditionModel of diffusers, "
                "this is none of them: 2 ranks can have a branch each"
            )
        if ranks > self.units:
            raise BadInput(
                f"{self.units} rows of the coarsest level cannot be divided among {ranks} (choices: 1 to {self.units})"
            )
        return RowPartition.of(self.units, ranks, 0).units

    def sent(self, layout: ParallelLayout, rank: int = 0, later: bool = False) -> dict[str, int]:
        """Bytes that a rank sends in an evaluation, by kind.

        Args:
            layout: of the ranks.
            rank: its number.
            later: not one of the first, synchronous ones.
        """
        workload, sent = self.of_branch(layout), dict.fromkeys(KINDS, 0)
        units = workload.rows_of(layout.group)
        for message in workload.exchanged(layout, later):
            sent[message.kind] += message.sent(layout, units, rank % layout.group)
        sent["branches"] = workload.output if layout.ranks > layout.group else 0
        return sent

    def messages(self, layout: ParallelLayout, later: bool = False) -> dict[str, int]:
        """How many messages a rank sends: "gather" (keys, moments), "neighbours" (halos), "rows", "branches".

        Args:
            layout: of the ranks.
            later: not one of the first, synchronous ones.
        """
        late = later and layout.mode == "async"
        kinds = [message.kind for message in self.of_branch(layout).exchanged(layout, later)]
        halos, keys, norms = (kinds.count(kind) for kind in ("halo", "keys", "moments"))
        if late:
            awaited = norms if layout.norm == "full" else 0
            gathers, halos = -(-(keys + norms - awaited) // layout.chunk) + awaited, -(-halos // layout.chunk)
        else:
            gathers = keys + norms
        rows = kinds.count("rows")
        return {"gather": gathers, "neighbours": halos, "rows": rows, "branches": int(layout.ranks > layout.group)}

    def seconds(self, device: Device, fraction: float = 1.0, moved: float = 0.0, first: bool = True) -> float:
        """Seconds of an evaluation on a rank, without communication.

        Args:
            device: the rank's.
            fraction: of the rows that it has.
            moved: additional bytes read and written in memory.
            first: the text is new.
        """
        ops = [op for op in self.ops if first or not op.text]
        seconds = moved / device.memory_bandwidth
        for op in ops:
            part = fraction if op.divided else 1.0
            read = op.still + op.moving * part
            seconds += max(2 * op.macs * part / device.flops, read / device.memory_bandwidth)
        return max(seconds, len(ops) * device.launch)

    def of_branch(self, layout: ParallelLayout) -> Workload:
        """The workload of the ranks that share an image: of half the batch where each has a branch of guidance.

        Args:
            layout: of the ranks.

        Raises:
            BadInput: for branches of a batch of one row.
        """
        if layout.ranks == layout.group:
            return self
        if self.half is None:
            raise BadInput("a batch of one row has no two branches: profile the batch that guidance evaluates")
        return self.half

    def exchanged(self, layout: ParallelLayout, later: bool) -> list[Message]:
        """What the ranks exchange in an evaluation.

        Args:
            layout: of the ranks.
            later: not one of the first, synchronous ones.
        """
        if layout.group == 1 or self.exchanges is None:
            return []
        separate = later and layout.mode == "async" and layout.norm == "separate"
        return [message for message in self.exchanges if not (separate and message.kind == "moments")]
