"""What several devices gain on one image: a model of patch and branch parallelism, from a network's shapes alone.

    work = work_of(net, (2, 4, 480, 480), dtype=torch.float16, text=text)   # nothing is computed, nothing allocated
    forecast(work, A100, NVLINK, ParallelLayout(ranks=8, branches=True)).speedup

An operation takes `max(2 macs / flops, bytes / memory_bandwidth)`, and those of an evaluation at least `launch` each.
On a rank with a fraction s of the rows, operations on rows have s of the macs and bytes (keys and values of
self-attention are read in full), all others stay as they are. Added to that are the bytes that the division moves in
memory (rows concatenated with their halo, moments, concatenated keys), and communication,
`latency x messages + bytes / bandwidth`:

    synchronous evaluation    (1 + skew) compute + communication
    later ones                max(compute + contention x hidden communication, hidden communication) + what is awaited

The first `warmup` + 1 evaluations are synchronous; later ones read the keys of others twice, to extrapolate them.

References:
    Li et al. 2024, arXiv:2402.19481.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from ..errors import BadInput, check_int
from ..utils.deprecation import renamed
from ..utils.devices import synchronize
from .hardware import A100, NVLINK, Device, Link, ParallelLayout
from .profile import Message, Op, Workload, work_of

__all__ = [
    "A100",
    "NVLINK",
    "Device",
    "Forecast",
    "Link",
    "Message",
    "Op",
    "ParallelLayout",
    "Workload",
    "forecast",
    "measured_device",
    "measured_link",
    "work_of",
]

__getattr__ = renamed(__name__, {"Way": "ParallelLayout", "Work": "Workload", "Talk": "Message"})


@dataclass(frozen=True)
class Forecast:
    """Predicted times and bytes of a sampling on several devices.

    Attributes:
        steps: the number of model evaluations.
        alone: seconds of an evaluation on one device.
        compute: seconds of a rank's part of it.
        sync: seconds of a synchronous evaluation on all ranks.
        later: seconds of a later one.
        talk_sync: seconds of communication in a synchronous evaluation.
        talk_later: seconds of communication in a later one, were nothing hidden.
        sent: bytes in a synchronous evaluation by kind, of the rank that sends most.
        sent_later: bytes in a later one.
        speedup: of the sampling.
    """

    steps: int
    alone: float
    compute: float
    sync: float
    later: float
    talk_sync: float
    talk_later: float
    sent: dict[str, int]
    sent_later: dict[str, int]
    speedup: float

    @property
    def gain(self) -> float:
        """The speedup of one synchronous evaluation."""
        return self.alone / self.sync


def forecast(
    work: Workload, device: Device, link: Link, layout: ParallelLayout | None = None, steps: int = 50
) -> Forecast:
    """The predicted speedup of a sampling on several devices over one of them.

    Args:
        work: of one model evaluation.
        device: each of them.
        link: between them.
        layout: of the ranks; by default two with patches.
        steps: the number of model evaluations.

    Raises:
        BadInput: for fewer than 1 step, more ranks than rows, branches of a batch of one row.
    """
    layout = ParallelLayout() if layout is None else layout
    check_int("steps", steps, 1)
    alone = work.seconds(device)
    part = work.of_branch(layout)
    units = part.rows_of(layout.group)
    fraction = max(units) / sum(units)
    exchanges = part.exchanged(layout, False)
    moved = sum(message.moved(layout, fraction) for message in exchanges)
    efficiency = layout.efficiency if layout.ranks > 1 else 1.0
    compute = part.seconds(device, fraction, moved, first=layout.group == 1) / efficiency
    once = (part.seconds(device, fraction, moved) / efficiency - compute) if layout.group > 1 else 0.0

    def largest(later: bool) -> dict[str, int]:
        return max(
            (work.sent(layout, rank, later) for rank in range(layout.group)), key=lambda sent: sum(sent.values())
        )

    def communication(sent: dict[str, int], messages: dict[str, int]) -> float:
        return sum(sent.values()) / link.bandwidth + sum(messages.values()) * link.latency

    sent, sent_later = largest(False), largest(True)
    messages, messages_later = work.messages(layout), work.messages(layout, True)
    talk_sync, talk_later = communication(sent, messages), communication(sent_later, messages_later)
    kinds = ["rows", "branches", *(["moments"] if layout.norm == "full" else [])]
    norms = sum(message.kind == "moments" for message in exchanges) if layout.norm == "full" else 0
    awaited = communication(
        {kind: sent_later[kind] for kind in kinds},
        {"rows": messages_later["rows"], "branches": messages_later["branches"], "norms": norms},
    )
    hidden = talk_later - awaited
    skew = link.skew * compute if layout.group > 1 else 0.0
    sync = compute + skew + talk_sync
    extrapolated = sum(message.extrapolated(layout, fraction) for message in exchanges)
    extrapolation = extrapolated / device.memory_bandwidth / efficiency
    later = compute + extrapolation + skew + talk_later
    if layout.overlap:
        later = max(compute + extrapolation + link.contention * hidden, hidden) + awaited + (skew if norms else 0.0)
    if layout.mode == "sync":
        later = sync
    first = min(layout.warmup + 1, steps)
    total = first * sync + (steps - first) * later + once
    return Forecast(steps, alone, compute, sync, later, talk_sync, talk_later, sent, sent_later, steps * alone / total)


@torch.no_grad()
def measured_link(group: Any = None, device: str = "cpu", most: int = 2**25, repeats: int = 5) -> Link:
    """The link between the processes, from gathering 4 bytes and `most` of each, and from convolutions with and without
    a message after each. All processes must call it.

    Skew is what these lose beyond the latency, as a fraction of them. Contention is 1 on CPUs, where copies take the
    cores of the arithmetic, and 2/9 on GPUs, see `NVLINK`.

    Args:
        group: of `torch.distributed`; by default all processes.
        device: of each process.
        most: bytes.
        repeats: of each measurement.

    Raises:
        BadInput: for fewer than two processes.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1):
        raise BadInput("a link joins two processes or more, and this one is alone: start several with torchrun")
    ranks = distributed.get_world_size(group)

    def gather(size: int) -> Callable[[], Any]:
        own = torch.ones(size, dtype=torch.uint8, device=device)
        into = [torch.empty_like(own) for _ in range(ranks)]
        return lambda: distributed.all_gather(into, own, group=group)

    small, large = (_fastest(gather(size), device, repeats) for size in (4, most))
    convolution, message = _convolution(device)[0], gather(4)
    without, with_message = [], []
    for _ in range(2 * repeats):
        message()
        without.append(_timed(lambda: [convolution() for _ in range(10)], device) / 10)
        message()
        with_message.append(_timed(lambda: [(convolution(), message()) for _ in range(10)], device) / 10)
    seconds = torch.tensor(
        [small, large, statistics.median(without), statistics.median(with_message)], dtype=torch.float64
    ).to(device)
    distributed.all_reduce(seconds, group=group)  # the mean, the same on all
    latency, gathered, alone, together = (seconds / ranks).tolist()
    contention = 1.0 if torch.device(device).type == "cpu" else NVLINK.contention
    skew = min(max((together - latency) / alone - 1, 0.0), 1.0)
    return Link(most * (ranks - 1) / max(gathered - latency, 1e-9), latency, contention, skew)


@torch.no_grad()
def measured_device(device: str = "cpu", repeats: int = 5) -> Device:
    """This device with as many threads as torch has: a 3x3 convolution of 128 channels on 64x64, a copy of 64 MiB,
    and an addition of one number.

    Args:
        device: "cpu" or "cuda".
        repeats: of each measurement.
    """
    work, flops = _convolution(device)
    source = torch.ones(2**24, device=device)
    into, one = torch.empty_like(source), torch.ones(1, device=device)
    spent, copied = (_fastest(call, device, repeats) for call in (work, lambda: into.copy_(source)))
    launch = _fastest(lambda: [one.add(1) for _ in range(200)], device, repeats) / 200
    return Device(flops / spent, 2 * 2**26 / copied, launch)


def _convolution(device: str) -> tuple[Callable[[], Any], int]:
    """A 3x3 convolution of 128 channels on 64x64, and its flops."""
    x, conv = torch.randn(1, 128, 64, 64, device=device), nn.Conv2d(128, 128, 3, padding=1).to(device)
    return lambda: conv(x), 2 * 128 * 128 * 9 * 64 * 64


def _timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of a call, until the device has finished."""
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def _fastest(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    return min([_timed(call, device) for _ in range(repeats + 1)][1:])
