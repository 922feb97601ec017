"""The seconds and the peak memory of a sampling by part: text encoder, network, image decoder."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..model.model import Model
from ..performance.cost import process_peak, resident_bytes
from ..performance.device import allocated_bytes, peak_allocated_bytes, reset_peak
from ..utils.devices import synchronize

PARTS = {"text": ("conditioning", "cond"), "decoder": ("decoder", "decode")}
NETWORK = "network"  # the part that is none of these
EVERY = 0.002  # seconds between two readings of the memory of a CPU


class PartMemory:
    """The peak memory of each part while it runs: of a GPU as its allocator counts it, elsewhere the resident size.

    Args:
        device: of the model.
        peaks: receives the peak bytes by part.
    """

    def __init__(self, device: torch.device, peaks: dict[str, int]) -> None:
        self.device, self.peaks, self.part = device, peaks, NETWORK
        self._counted = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PartMemory:
        self._counted = reset_peak(self.device)
        if not self._counted:
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.begin(NETWORK)
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self, part: str) -> None:
        """Count what follows as another part's."""
        self._read()
        reset_peak(self.device)
        self.part = part

    def _read(self) -> None:
        if self._counted:
            value = peak_allocated_bytes(self.device)
        else:
            value = allocated_bytes(self.device) or resident_bytes() or process_peak()
        self.peaks[self.part] = max(self.peaks.get(self.part, 0), value)

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            self._read()


class TimedPart:
    """A part of a model whose method's seconds are added up; everything else is the part's own.

    Args:
        part: A text encoder or a decoder.
        method: The method to time.
        seconds: Receives the sum under `name`.
        name: Of the part.
        device: Of the model, for which a GPU's work is awaited.
        memory: Receives the peak memory; None: not measured.
    """

    def __init__(
        self,
        part: Any,
        method: str,
        seconds: dict[str, float],
        name: str,
        device: torch.device,
        memory: PartMemory | None = None,
    ) -> None:
        self._part, self._device = part, device
        original = getattr(part, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._wait()
            if memory is not None:
                memory.begin(name)
            start = time.perf_counter()
            result = original(*arguments, **options)
            self._wait()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            if memory is not None:
                memory.begin(NETWORK)
            return result

        setattr(self, method, timed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def _wait(self) -> None:
        synchronize(self._device)


@contextlib.contextmanager
def time_parts(model: Model, seconds: dict[str, float], memory: dict[str, int] | None = None) -> Iterator[None]:
    """Add the seconds of the parts of a model's samplings within the block.

    Args:
        model: The model; its parts are replaced within the block.
        seconds: Receives `text` and `decoder`, where the model has these parts, and `total`, the time of the block.
        memory: Receives the peak bytes of these and of `network`; None: not measured, which costs no time.
    """
    before = {attribute: getattr(model, attribute) for attribute, _ in PARTS.values()}
    with contextlib.ExitStack() as stack:
        watch = None if memory is None else stack.enter_context(PartMemory(model.device, memory))
        for name, (attribute, method) in PARTS.items():
            if before[attribute] is not None:
                part = TimedPart(before[attribute], method, seconds, name, model.device, watch)
                setattr(model, attribute, part)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds["total"] = seconds.get("total", 0.0) + time.perf_counter() - start
            for attribute, part in before.items():
                setattr(model, attribute, part)


def seconds_by_part(parts: Mapping[str, float] | None, seconds: float) -> dict[str, float] | None:
    """The seconds of an image by part, which add up to all of them.

    Args:
        parts: Of `time_parts`.
        seconds: Of an image.

    Returns:
        `text`, `network` and `decoder`; None for a model that is a network alone, or was not timed by part.
    """
    if not parts or not parts.get("total") or not set(parts) & set(PARTS):
        return None
    shares = {name: parts.get(name, 0.0) / parts["total"] for name in PARTS}
    network = max(1.0 - sum(shares.values()), 0.0)
    return {"text": shares["text"] * seconds, "network": network * seconds, "decoder": shares["decoder"] * seconds}
