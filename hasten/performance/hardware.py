"""Devices, the links between them, and parallel layouts, as numbers that predict the cost of patch parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import BadInput, check_choice, check_int
from ..utils.deprecation import renamed

__all__ = ["A100", "NVLINK", "Device", "Link", "ParallelLayout"]

__getattr__ = renamed(__name__, {"Way": "ParallelLayout"})


def _check_positive(what: str, *values: float) -> None:
    """Refuse values that are not above 0."""
    if any(not value > 0 for value in values):
        raise BadInput(f"{what} must be above 0, found {', '.join(f'{value:g}' for value in values)}")


def _check_fraction(what: str, value: float) -> None:
    """Refuse a value outside [0, 1]."""
    if not 0 <= value <= 1:
        raise BadInput(f"{what} must be between 0 and 1, found {value:g}")


@dataclass(frozen=True)
class Device:
    """What one device sustains.

    Args:
        flops: per second, two for a multiply-accumulate.
        memory_bandwidth: bytes per second.
        launch: seconds to start an operation, 0 to 1.

    Raises:
        BadInput: for values outside these ranges.
    """

    flops: float
    memory_bandwidth: float
    launch: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("a device's flops and memory_bandwidth", self.flops, self.memory_bandwidth)
        _check_fraction("a device's launch, in seconds,", self.launch)


@dataclass(frozen=True)
class Link:
    """What one device sends to all others together.

    Args:
        bandwidth: bytes per second each way.
        latency: seconds of a message, 0 to 1.
        contention: what a second of hidden communication takes from computing, 0 (a copy engine does it) to 1 (the same
            cores do).
        skew: how long devices wait for the slowest where they synchronise in every layer, as a fraction of computing,
            0 to 1.

    Raises:
        BadInput: for values outside these ranges.
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
    """How a model evaluation is divided over ranks: 2 n of them with `branches`, else n, each with a patch of the rows.

    Args:
        ranks: how many.
        branches: each half of the ranks has one half of the batch (`cfg_parallel`).
        warmup: as of `patch_parallel`, and so norm, mode, keys, forecast and chunk.
        norm: as of `patch_parallel`.
        mode: as of `patch_parallel`.
        keys: as of `patch_parallel`.
        forecast: as of `patch_parallel`.
        chunk: as of `patch_parallel`.
        neighbours: halos are sent to the neighbours alone, and norms are two passes; else all ranks gather all halos,
            and norms are written out, as in the code of the paper.
        overlap: later evaluations continue during communication; else each message is awaited.
        efficiency: of a device with part of the work, relative to the same device with all of it, above 0 to 1.

    Raises:
        BadInput: for values that are not supported.
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
        for name, value, minimum in (("ranks", self.ranks, 1), ("warmup", self.warmup, 0), ("chunk", self.chunk, 1)):
            check_int(name, value, minimum)
        check_choice("norm", self.norm, ("corrected", "stale", "full", "separate"))
        check_choice("mode", self.mode, ("async", "sync"))
        check_choice("keys", self.keys, ("same", "bf16"))
        check_int("forecast", self.forecast, 0, 1)
        if not 0 < self.efficiency <= 1:
            raise BadInput(f"efficiency is above 0 and at most 1, found {self.efficiency}")
        if self.branches and self.ranks > 1 and self.ranks % 2:
            raise BadInput(f"two branches take an even number of ranks, found {self.ranks}")

    @property
    def group(self) -> int:
        """How many ranks share the rows of an image."""
        return self.ranks // 2 if self.branches and self.ranks > 1 else self.ranks
