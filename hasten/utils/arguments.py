"""Checks of what `draw`, `walk` and plans are given, made before anything is sampled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import BadInput


def given_sampler(sampler: Any) -> Any:
    """A sampler by name or as an object. Raises BadInput for what is neither."""
    if isinstance(sampler, str):
        from ..pick import pick

        return pick("samplers", sampler)
    if isinstance(sampler, type):
        raise BadInput(f"sampler must be an object, such as {sampler.__name__}(), found the class {sampler.__name__}")
    if not any(callable(getattr(sampler, name, None)) for name in ("steps", "solve")):
        raise BadInput(f"sampler must be a name or a sampler such as UniPC(), found {type(sampler).__name__}")
    return sampler


def check_state(x: Any, **functions: Any) -> None:
    """Refuse a state to start from that is not a floating tensor (B, *S), and functions that cannot be called."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"x must be a floating tensor (B, *S), one row a sample, found {found}")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise BadInput(f"{name} must be a function or None, found {function!r}")


def given_grid(times: Any) -> Any:
    """A time grid by name or as an object; what is given time by time as it is. Raises BadInput for a class."""
    if isinstance(times, str):
        from ..pick import pick

        return pick("times", times)
    if isinstance(times, type):
        raise BadInput(f"times must be an object, such as {times.__name__}(), found the class {times.__name__}")
    return times


def check_noise(noise: Any, x: Any) -> None:
    """Refuse noise that is no `Noise`, nor a function where the state to start from is given as well."""
    if not (callable(noise) and (x is not None or hasattr(noise, "initial"))):
        raise BadInput(f"noise must be a Noise, such as Noise(range(4), (3, 32, 32)), found {type(noise).__name__}")
