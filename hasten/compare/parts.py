"""The seconds of a sampling by part: text encoder, network, image decoder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..model.model import Model

PARTS = {"text": ("conditioning", "cond"), "decoder": ("decoder", "decode")}


class TimedPart:
    """A part of a model whose method's seconds are added up; everything else is the part's own.

    Args:
        part: A text encoder or a decoder.
        method: The method to time.
        seconds: Receives the sum under `name`.
        name: Of the part.
        device: Of the model, for which a GPU's work is awaited.
    """

    def __init__(self, part: Any, method: str, seconds: dict[str, float], name: str, device: torch.device) -> None:
        self._part, self._device = part, device
        original = getattr(part, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            self._wait()
            start = time.perf_counter()
            result = original(*arguments, **options)
            self._wait()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        setattr(self, method, timed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@contextlib.contextmanager
def time_parts(model: Model, seconds: dict[str, float]) -> Iterator[None]:
    """Add the seconds of the parts of a model's samplings within the block.

    Args:
        model: The model; its parts are replaced within the block.
        seconds: Receives `text` and `decoder`, where the model has these parts, and `total`, the time of the block.
    """
    before = {attribute: getattr(model, attribute) for attribute, _ in PARTS.values()}
    for name, (attribute, method) in PARTS.items():
        if before[attribute] is not None:
            setattr(model, attribute, TimedPart(before[attribute], method, seconds, name, model.device))
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
