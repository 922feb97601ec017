"""Methods that are given by name or as objects: made, checked, and written back as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import BadInput
from ..pick import format_spec, pick
from ..plan.table import Plan
from ..schedules.base import Schedule
from ..times import Explicit, as_times, check_times

__all__ = ["checked", "grid_of", "spelled"]

METHODS = {"samplers": ("steps", "solve"), "guides": ("wrap",), "starts": ("begin",), "accelerators": ("apply",)}


def several(folder: str, methods: Any) -> list[Any]:
    """Guides or accelerators as a list: none, one, or several, by name or as objects. Raises BadInput for others."""
    if methods is None:
        return []
    one = isinstance(methods, (str, type)) or not isinstance(methods, Iterable)
    return [each if isinstance(each, str) else checked(folder, each) for each in ([methods] if one else methods)]


def checked(folder: str, method: Any) -> Any:
    """The method itself. Raises BadInput for a class in place of an object, and for what is no method of the folder."""
    kind = folder.removesuffix("s")
    if isinstance(method, type):
        raise BadInput(f"{kind} must be an object, such as {method.__name__}(), found the class {method.__name__}")
    if folder in METHODS and not any(callable(getattr(method, name, None)) for name in METHODS[folder]):
        raise BadInput(
            f"{kind} must be a name or a method of hasten.{folder}, found {type(method).__name__} {method!r}"
        )
    return method


def grid_of(schedule: Schedule, times: Any, steps: int | None, default: int, begin: float | None = None) -> Tensor:
    """The float64 times (steps + 1,) of a grid by name, of a grid, or of a tensor of times.

    Args:
        steps: of the grid; None: `default`, or as many as times that are given one by one have.
        begin: the first time, where something else decides it.
    """
    if isinstance(times, (Tensor, list, tuple)) or hasattr(times, "__array__"):
        found = check_times(as_times(times).detach().cpu())
        if steps not in (None, len(found) - 1):
            raise BadInput(f"the times are {len(found) - 1} steps, asked for {steps}")
        if begin is not None and abs(float(found[0]) - begin) > 1e-9:
            raise BadInput(f"the times begin at t = {float(found[0]):g}, the start at {begin:g}")
        return found
    law = pick("times", times) if isinstance(times, str) else times
    if isinstance(law, type) or not callable(law):
        what = f"{law.__name__}()" if isinstance(law, type) else "Karras()"
        raise BadInput(f"times must be a grid such as {what}, its name or a tensor of times, found {times!r}")
    if begin is not None:
        if not hasattr(law, "start"):
            raise BadInput(f"{spelled(times)} cannot begin at t = {begin:g}, where the start does")
        low = law.low if law.low is None or law.low < begin else None
        law = replace(law, start=begin, low=low)
    if steps is None and not isinstance(law, Explicit):
        steps = default
    return law(schedule, steps)


def spelled(method: Any) -> Any:
    """A sampler or grid as text; a tensor of times as a tuple."""
    if isinstance(method, str):
        return method
    if isinstance(method, (Tensor, np.ndarray, list, tuple)):
        return tuple(as_times(method).tolist())
    return format_spec(method)


@dataclass
class Way:
    """How images are made, all found and bound to a model: see `Model.way`.

    denoiser: accelerated and guided. inner: accelerated alone.
    """

    denoiser: nn.Module
    inner: nn.Module
    plan: Plan | None
    sampler: Any
    times: Tensor
    start: Any = None

    @property
    def nfe(self) -> float | None:
        """Queries of the denoiser an image, without those of the start; None where only the run tells."""
        return self.sampler.nfe(len(self.times) - 1) if self.plan is None else self.plan.nfe
