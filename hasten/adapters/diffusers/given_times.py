"""The times that a pipeline or a user gives to `set_timesteps`: as sigmas, as timesteps, or as both.

Sigmas mean what they mean to the scheduler that is replaced: that scheduler itself turns them into noise levels, with
its shift, `shift_terminal`, Karras, exponential or beta sigmas and `final_sigmas_type`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BadInput
from . import arguments
from .library import diffusers
from .schedules import SchedulerSpec, call_set_timesteps, visited_times

__all__ = [
    "TimestepMap",
    "check_timesteps",
    "is_default_sigmas",
    "make_original",
    "original_config",
    "steps_of",
    "times_of_sigmas",
]

NEAR = 1e-5  # between the sigmas of a pipeline and its default


def original_config(scheduler: Any) -> dict[str, Any] | None:
    """The config, with the name of the class, of a scheduler of `diffusers` or of its config; None of others.

    The config of a scheduler that was not loaded from a file does not name its class: that of a flow with
    `use_dynamic_shifting` is FlowMatchEulerDiscreteScheduler's.
    """
    if hasattr(scheduler, "to_json_string"):
        return dict(json.loads(scheduler.to_json_string()))
    if not isinstance(scheduler, Mapping):
        return None
    config = {key: value for key, value in scheduler.items() if key != "_use_default_values"}
    if "shift" in config and "use_dynamic_shifting" in config:
        config.setdefault("_class_name", "FlowMatchEulerDiscreteScheduler")
    if not config.get("_class_name"):
        return None
    return dict(json.loads(json.dumps(config, default=lambda value: np.asarray(value).tolist())))


def make_original(config: Mapping[str, Any] | None) -> Any:
    """The scheduler of `original_config`; None where its class is not one of `diffusers`."""
    kind = getattr(diffusers(), str((config or {}).get("_class_name")), None)
    if config is None or not hasattr(kind, "set_timesteps"):
        return None
    keys = set(inspect.signature(kind.__init__).parameters)
    return kind(**{key: value for key, value in config.items() if key in keys})


def check_timesteps(timesteps: Any, total: int) -> Tensor:
    """Timesteps of a caller, (n,), float64.

    Raises:
        BadInput: unless they decrease within 0 to `total`.
    """
    values = arguments.float_tensor("timesteps", timesteps)
    if float(values[0]) > total or float(values[-1]) < 0:
        raise BadInput(f"timesteps lie in 0 to {total}, got {arguments.short_repr(timesteps)}")
    return values


def falling_sigmas(sigmas: Any) -> Tensor:
    """Sigmas of a caller, (n,), float64, without those that do not lie below the ones before, which have no step.

    Those of Stable Audio 3 from a given sound may rise once after the first, at which its latents are.

    Raises:
        BadInput: where fewer than half are left.
    """
    values = arguments.float_tensor("sigmas", sigmas, ordered=False)
    lowest = torch.cummin(values, 0).values
    kept = torch.cat([torch.ones(1, dtype=torch.bool), values[1:] < lowest[:-1]])
    if 2 * int(kept.sum()) < len(values):
        raise BadInput(f"sigmas must decrease, got {arguments.short_repr(sigmas)}")
    return values[kept]


def is_default_sigmas(spec: SchedulerSpec, sigmas: Any) -> bool:
    """Whether sigmas are what pipelines of flows pass for a number of steps: they say that number and nothing else.

    These are linspace(1, 1 / n, n), and the like that begin at 1 - 1 / N, or are rounded to whole multiples of 1 / N.
    """
    values = falling_sigmas(sigmas).numpy()
    n, total = len(values), spec.steps
    defaults = [
        np.linspace(1.0, 1 / n, n),
        np.linspace(1.0 - 1 / total, 0.0, n + 1)[:-1],
        np.linspace(total, 1.0, n).astype(np.int64) / total,
    ]
    return spec.flow and any(bool(np.abs(values - default).max() < NEAR) for default in defaults)


def steps_of(spec: SchedulerSpec, sigmas: Any) -> int:
    """The number of evaluations of sigmas: of a table they name the end too, of a flow they may."""
    levels = falling_sigmas(sigmas)
    return len(levels) - int(not spec.flow or float(levels[-1]) == 0)


def times_of_sigmas(spec: SchedulerSpec, sigmas: Any, original: Any = None, mu: float | None = None) -> Tensor:
    """Times of the noise levels of `diffusers`.

    Args:
        spec: of the network, with the shift of this size of image.
        sigmas: of a flow: in [0, 1], before the shift, with or without the last 0; of a table: sigma / alpha, with the
            level where the sampling ends.
        original: the scheduler that is replaced; None: of a flow, only the shift is applied.
        mu: of the shift, where it depends on the image size.

    Returns:
        (n + 1,), float64.

    Raises:
        BadInput: for other values.
    """
    levels = falling_sigmas(sigmas)
    if bool((levels < 0).any()):
        raise BadInput(f"sigmas must not be negative, got {arguments.short_repr(sigmas)}")
    if spec.flow and float(levels[0]) > 1 + NEAR:
        raise BadInput(f"sigmas of a flow lie in [0, 1], got {arguments.short_repr(sigmas)}")
    if not spec.flow and len(levels) < 2:
        raise BadInput(f"sigmas must name the level where the sampling ends too, got {arguments.short_repr(sigmas)}")
    if original is not None and "sigmas" in inspect.signature(original.set_timesteps).parameters:
        inner = levels[: steps_of(spec, levels)] if spec.flow else levels  # a flow's end is appended there
        more = {"mu": mu} if original.config.get("use_dynamic_shifting") else {}
        call_set_timesteps(original, sigmas=inner.numpy(), **more)  # a list fails in UniPC
        return visited_times(original, spec, exact=True)
    if spec.flow:
        levels = levels.clamp(max=1)
        return levels if float(levels[-1]) == 0 else torch.cat([levels, levels.new_zeros(1)])
    return spec.time_of_level(levels)


class TimestepMap:
    """The network's time input as a function of t, where a pipeline gives timesteps beside sigmas (CogView4).

    Linear between the given pairs, and down to 0 at the clean image.

    Args:
        times: (n + 1,), of the sigmas, decreasing; the last is the end.
        timesteps: (n,), decreasing.
    """

    def __init__(self, times: Tensor, timesteps: Tensor) -> None:
        if len(timesteps) != len(times) - 1:
            raise BadInput(f"set_timesteps: {len(timesteps)} timesteps and {len(times) - 1} sigmas: pass as many")
        self.times = np.append(times[:-1].flip(0).numpy(), 1.0 + 1e-9)
        self.timesteps = np.append(timesteps.flip(0).numpy(), float(timesteps[0]))
        if self.times[0] > 0:
            self.times, self.timesteps = np.append(0.0, self.times), np.append(0.0, self.timesteps)

    def timestep(self, t: Tensor) -> Tensor:
        """Timesteps, float64, of times."""
        return torch.from_numpy(np.interp(t.numpy(), self.times, self.timesteps))

    def time(self, timesteps: Tensor) -> Tensor:
        """The inverse of `timestep`."""
        last = len(self.times) - 1  # the point that repeats the first timestep is left out
        return torch.from_numpy(np.interp(timesteps.numpy(), self.timesteps[:last], self.times[:last]))
