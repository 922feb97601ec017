"""The cost of a call: multiply-accumulates, parameters, bytes, seconds, memory."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BadInput
from ..utils.devices import synchronize
from .device import COUNTED, allocated_bytes, peak_allocated_bytes, reset_peak

__all__ = [
    "Cost",
    "Peak",
    "Ratio",
    "interleave",
    "macs",
    "parameters",
    "peak_memory",
    "process_peak",
    "ratio",
    "resident_bytes",
    "size_in_bytes",
    "wall_time",
]


@dataclass(frozen=True)
class Cost:
    """The cost of sampling `images` images once.

    Args:
        nfe: model evaluations per image (a guided evaluation of two branches counts 2).
        macs: multiply-accumulates per image.
        parameters: of the network.
        bytes: of the network.
        seconds: wall time of each repeat, in order.
        images: how many were sampled.
        memory: peak bytes above those allocated before (see `peak_memory`); None: not measured.
    """

    nfe: float
    macs: float
    parameters: int
    bytes: int
    seconds: tuple[float, ...]
    images: int
    memory: int | None = None

    @property
    def seconds_per_image(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.seconds) / self.images

    @property
    def images_per_second(self) -> float:
        """1 / `seconds_per_image`."""
        return 1 / self.seconds_per_image


def macs(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of `call(*args, **kwargs)`: half of what torch's flop counter finds in matrix products,
    convolutions and attention.

    Element-wise operations and normalisation are not counted, as is usual. Attention runs as plain matrix products for
    the count, because fused kernels of some devices are unknown to the counter. Quantised and compiled kernels are not
    counted: count before they are applied.

    Args:
        call: the function to count.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        call(*args, **kwargs)
    return counter.get_total_flops() // 2


def parameters(module: nn.Module) -> int:
    """The number of weights; a weight that two layers share counts once."""
    return sum(p.numel() for p in module.parameters())


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of weights and persistent buffers, in their dtypes."""
    stored = module.state_dict(keep_vars=True).values()
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in stored if isinstance(t, torch.Tensor)}.values())


def _synchronize() -> None:
    """Wait for the GPU, if one is used."""
    for kind in COUNTED:
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available() and backend.is_initialized():
            synchronize(kind)
    if torch.backends.mps.is_available():
        synchronize("mps")


def wall_time(call: Callable[[], Any], repeats: int = 5, warmup: int = 1) -> list[float]:
    """Wall seconds of each of several calls, each until the device has finished.

    Args:
        call: the function to time.
        repeats: 1 or more.
        warmup: calls before that are not counted, 0 or more.

    Raises:
        BadInput: for numbers outside these ranges.
    """
    return interleave({"": call}, repeats, warmup)[""]


def interleave(calls: Mapping[str, Callable[[], Any]], repeats: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Wall seconds of several functions, called in turns: A B C, C B A, A B C, ..., so that other load affects all.

    Report `ratio(times[A], times[B])`.

    Args:
        calls: the functions to time.
        repeats: turns, 1 or more.
        warmup: turns before that are not counted, 0 or more.

    Returns:
        The seconds of each function; entry i of each list comes from turn i.

    Raises:
        BadInput: for no functions, and numbers outside these ranges.
    """
    if not calls or repeats < 1 or warmup < 0:
        raise BadInput(f"cannot time {len(calls)} calls, {repeats} repeats, {warmup} warm-ups: need at least 1, 1, 0")
    for call in itertools.chain.from_iterable(itertools.repeat(tuple(calls.values()), warmup)):
        call()
    out: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            _synchronize()
            start = time.perf_counter()
            calls[name]()
            _synchronize()
            out[name].append(time.perf_counter() - start)
    return out


@dataclass(frozen=True)
class Ratio:
    """A speedup: median, minimum and maximum over the turns."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def ratio(slow: list[float], fast: list[float]) -> Ratio:
    """The speedup `slow[i] / fast[i]` over the turns of one `interleave`; above 1 where `fast` is faster.

    Args:
        slow: seconds.
        fast: seconds.

    Raises:
        BadInput: for lists of different lengths, or none.
    """
    if len(slow) != len(fast) or not slow:
        raise BadInput(f"{len(slow)} and {len(fast)} times are not of the same interleaved run")
    ratios = [a / b for a, b in zip(slow, fast)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def resident_bytes() -> int | None:
    """Resident memory of this process, from /proc/self/statm; None where that does not exist (not Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError, AttributeError):
        return None


@dataclass
class Peak:
    """The result of `peak_memory`, complete when its block ends.

    Attributes:
        before: bytes at the start.
        peak: bytes at the peak.
        method: how they were measured.
    """

    before: int = 0
    peak: int = 0
    method: str = ""

    @property
    def above(self) -> int:
        """The difference, in bytes."""
        return max(self.peak - self.before, 0)


@contextlib.contextmanager
def peak_memory(device: str | torch.device = "cpu", every: float = 0.002) -> Iterator[Peak]:
    """Peak memory inside the block: `with peak_memory() as m: run()`, then `m.above` bytes.

    On CUDA and XPU the allocator's own peak. Elsewhere a thread reads MPS's allocator, or on a CPU the resident size,
    since the kernel's peak cannot be reset between variants: shorter bursts are missed, and memory that the allocator
    has cached from earlier calls is not counted again, so run the largest variant in a new process where the exact
    figure matters. Without /proc it is the peak of the process (`ru_maxrss`); `method` says which.

    Args:
        device: whose memory is measured.
        every: seconds between two readings on a CPU.
    """
    result = Peak()
    synchronize(device)
    if reset_peak(device):
        result.before = allocated_bytes(device) or 0
        result.method = f"{torch.device(device).type} allocator"
        try:
            yield result
        finally:
            synchronize(device)
            result.peak = peak_allocated_bytes(device)
        return

    def read() -> int | None:
        found = allocated_bytes(device)
        return resident_bytes() if found is None else found

    before = read()
    if before is None:
        result.method, result.before = "ru_maxrss", process_peak()
        try:
            yield result
        finally:
            result.peak = process_peak()
        return
    sampled = (
        "resident size" if allocated_bytes(device) is None else f"size of the {torch.device(device).type} allocator"
    )
    result.method, result.before, result.peak = f"sampled {sampled}", before, before
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every):
            result.peak = max(result.peak, read() or 0)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()
        synchronize(device)
        result.peak = max(result.peak, read() or 0)


def process_peak() -> int:
    """The peak resident memory of this process in bytes (`ru_maxrss`); 0 where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(device: torch.device) -> int:
    """Maximum bytes in use: of a GPU whose allocator knows it, or of this process."""
    return peak_allocated_bytes(device) if device.type in COUNTED else process_peak()
