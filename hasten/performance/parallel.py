"""What several devices gain on one image: a model of patch and branch parallelism, from a network's shapes alone.

    work = work_of(net, (2, 4, 480, 480), dtype=torch.float16, text=text)   # nothing is computed, nothing allocated
    forecast(work, A100, NVLINK, Way(ranks=8, branches=True)).speedup

An operation takes `max(2 macs / flops, bytes / memory_bandwidth)`, and those of an evaluation at least `launch` each.
On a rank with a share s of the rows, operations on rows have s of the macs and bytes (keys and values of self-attention
are read whole), all others stay as they are. To that come the bytes that parting moves in memory (rows joined to their
halo, moments, keys put together), and the talk, `latency x messages + bytes / bandwidth`:

    synchronous evaluation    (1 + skew) compute + talk
    later ones                max(compute + contention x hidden talk, hidden talk) + what is waited for

The first `warmup` + 1 evaluations are synchronous; later ones read the keys of others twice, to draw them on.
Reference: Li et al. 2024, arXiv:2402.19481.
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
from .hardware import A100, NVLINK, Device, Link, ParallelLayout
from .profile import Op, Workload, work_of

__all__ = [
    "A100", "NVLINK", "Device", "Forecast", "Link", "Message", "Op", "ParallelLayout", "Workload", "forecast", "measured_device",
    "measured_link", "work_of",
]  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """alone: seconds of an evaluation on one device; compute: of a rank's part of it; sync, later: of an evaluation on
    all ranks, synchronous and not; talk_sync, talk_later: what of it is talk, were nothing hidden; sent, sent_later:
    bytes by kind, of the rank that sends most; gain: how many times faster a synchronous evaluation is, speedup: a
    sampling of `steps`."""

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
        """Of one synchronous evaluation."""
        return self.alone / self.sync


def forecast(
    work: Workload, device: Device, link: Link, way: ParallelLayout | None = None, steps: int = 50
) -> Forecast:
    """How much faster `steps` evaluations are on several devices than on one of them.

    Raises:
        BadInput: for fewer than 1 step, more ranks than rows, branches of a batch of one row.
    """
    way = ParallelLayout() if way is None else way
    check_int("steps", steps, 1)
    alone = work.seconds(device)
    part = work._of(way)
    shares = part.shares(way.group)
    share = max(shares) / sum(shares)
    talks = part._talks(way, False)
    moved = sum(talk.moved(way, share) for talk in talks)
    slower = way.efficiency if way.ranks > 1 else 1.0
    compute = part.seconds(device, share, moved, first=way.group == 1) / slower
    once = (part.seconds(device, share, moved) / slower - compute) if way.group > 1 else 0.0

    def most(later: bool) -> dict[str, int]:
        return max((work.sent(way, rank, later) for rank in range(way.group)), key=lambda sent: sum(sent.values()))

    def talk(sent: dict[str, int], spoken: dict[str, int]) -> float:
        return sum(sent.values()) / link.bandwidth + sum(spoken.values()) * link.latency

    sent, sent_later = most(False), most(True)
    spoken, spoken_later = work.messages(way), work.messages(way, True)
    talk_sync, talk_later = talk(sent, spoken), talk(sent_later, spoken_later)
    waited = ["rows", "branches", *(["moments"] if way.norm == "full" else [])]
    norms = sum(each.kind == "moments" for each in talks) if way.norm == "full" else 0
    open_ = talk(
        {kind: sent_later[kind] for kind in waited},
        {"rows": spoken_later["rows"], "branches": spoken_later["branches"], "norms": norms},
    )
    hidden = talk_later - open_
    waits = link.skew * compute if way.group > 1 else 0.0
    sync = compute + waits + talk_sync
    drawn_on = sum(talk.drawn_on(way, share) for talk in talks) / device.memory_bandwidth / slower
    later = compute + drawn_on + waits + talk_later
    if way.overlap:
        later = max(compute + drawn_on + link.contention * hidden, hidden) + open_ + (waits if norms else 0.0)
    if way.mode == "sync":
        later = sync
    first = min(way.warmup + 1, steps)
    total = first * sync + (steps - first) * later + once
    return Forecast(steps, alone, compute, sync, later, talk_sync, talk_later, sent, sent_later, steps * alone / total)


@torch.no_grad()
def measured_link(group: Any = None, device: str = "cpu", most: int = 2**25, repeats: int = 5) -> Link:
    """The link between the processes that are joined, from gathering 4 bytes and `most` of each, and from convolutions
    with and without a message after each; all must call it.

    Skew is what these lose beyond the latency, as a share of them. Contention is 1 on CPUs, where copies take the cores
    of the arithmetic, and 2/9 on GPUs, see `NVLINK`.
    Raises BadInput where fewer than two processes are joined.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1):
        raise BadInput("a link joins two processes or more, and this one is alone: start several with torchrun")
    ranks = distributed.get_world_size(group)

    def gathers(size: int) -> Callable[[], Any]:
        own = torch.ones(size, dtype=torch.uint8, device=device)
        into = [torch.empty_like(own) for _ in range(ranks)]
        return lambda: distributed.all_gather(into, own, group=group)

    small, large = (_fastest(gathers(size), device, repeats) for size in (4, most))
    work, meet = _convolution(device)[0], gathers(4)
    apart, met = [], []
    for _ in range(2 * repeats):
        meet()
        apart.append(_timed(lambda: [work() for _ in range(10)], device) / 10)
        meet()
        met.append(_timed(lambda: [(work(), meet()) for _ in range(10)], device) / 10)
    told = torch.tensor([small, large, statistics.median(apart), statistics.median(met)], dtype=torch.float64)
    told = told.to(device)
    distributed.all_reduce(told, group=group)  # all the same
    latency, gathered, alone, together = (told / ranks).tolist()
    contention = 1.0 if torch.device(device).type == "cpu" else NVLINK.contention
    skew = min(max((together - latency) / alone - 1, 0.0), 1.0)
    return Link(most * (ranks - 1) / max(gathered - latency, 1e-9), latency, contention, skew)


@torch.no_grad()
def measured_device(device: str = "cpu", repeats: int = 5) -> Device:
    """This device with as many threads as torch has: a 3x3 convolution of 128 channels on 64x64, a copy of 64 MiB,
    and an addition of one number."""
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
    begin = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _fastest(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    return min([_timed(call, device) for _ in range(repeats + 1)][1:])
