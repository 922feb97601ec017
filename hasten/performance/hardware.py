"""Devices and the links between them, as numbers for predicting what patch parallelism costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import BadInput, check_int


def _check_positive(what: str, *values: float) -> None:
    if any(not value > 0 for value in values):
        raise BadInput(f"{what} must be above 0, found {', '.join(f'{value:g}' for value in values)}")


def _check_fraction(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise BadInput(f"{what} must be between 0 and 1, found {value:g}")


@dataclass(frozen=True)
class Device:
    """What one device sustains: flops (two a multiply-accumulate, a second), memory_bandwidth (bytes/s), launch (s)."""

    flops: float
    memory_bandwidth: float
    launch: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("a device's flops and memory_bandwidth", self.flops, self.memory_bandwidth)
        _check_fraction("a device's launch, in seconds,", self.launch)


@dataclass(frozen=True)
class Link:
    """What one device sends to the others together.

    bandwidth: bytes/s each way; latency: seconds of a message; contention: what a second of hidden talk takes from
    computing, 0 (a copy engine does it) to 1 (the same cores do); skew: how long devices wait for the slowest where
    they meet in every layer, as a share of computing, 0 to 1.
    """

    bandwidth: float
    latency: float = 0.0
    contention: float = 0.0
    skew: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("a link's bandwidth", self.bandwidth)
        _check_fraction("a link's latency, in seconds,", self.latency)
        _check_fraction("a link's contention", self.contention)
        _check_fraction("a link's skew", self.skew)


# Data sheets: 312 TFLOP/s (fp16, fp32 sums), 1.555 TB/s, NVLink 300 GB/s each way; of which large work sustains about
# half, four fifths and three quarters. A collective kernel on all 24 channels holds 24 of 108 multiprocessors.
A100 = Device(0.5 * 312e12, 0.8 * 1.555e12, 5e-6)

NVLINK = Link(0.75 * 300e9, 20e-6, 24 / 108)


@dataclass(frozen=True)
class ParallelLayout:
    """How the work is parted; ranks = 2 n with `branches`, else n, of which each has a part of the rows.

    branches: the two halves of the batch on half of the ranks each (`cfg_parallel`).
    warmup, norm, mode, keys, forecast, chunk: as of `patch_parallel`.
    neighbours: halos go to the neighbours alone, and norms are two passes; else all ranks gather all halos, and norms
        are written out, as in the code of the paper.
    overlap: later evaluations go on while they talk; else each message is waited for.
    efficiency: of a device with part of the work, against the same device with all of it, 0 to 1.
    """

    ranks: int = 2
    branches: bool = False
    warmup: int = 4
    norm: Literal["corrected", "stale", "full", "separate"] = "corrected"
    mode: Literal["async", "sync"] = "async"
    keys: Literal["same", "bf16"] = "same"
    forecast: int = 1
    chunk: int = 60
    neighbours: bool = True
    overlap: bool = True
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        for name, value, least in (("ranks", self.ranks, 1), ("warmup", self.warmup, 0), ("chunk", self.chunk, 1)):
            check_int(name, value, least)
        for name, found, choices in (
            ("norm", self.norm, ("corrected", "stale", "full", "separate")),
            ("mode", self.mode, ("async", "sync")), ("keys", self.keys, ("same", "bf16")),
            ("forecast", self.forecast, (0, 1)),
        ):  # fmt: skip
            if found not in choices:
                raise BadInput(f"{name} is one of {', '.join(map(str, choices))}, found {found!r}")
        if not 0 < self.efficiency <= 1:
            raise BadInput(f"efficiency is above 0 and at most 1, found {self.efficiency}")
        if self.branches and self.ranks > 1 and self.ranks % 2:
            raise BadInput(f"two branches take an even number of ranks, found {self.ranks}")

    @property
    def group(self) -> int:
        """How many ranks share the rows of an image."""
        return self.ranks // 2 if self.branches and self.ranks > 1 else self.ranks
