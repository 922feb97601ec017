"""What a network takes as its time, where its pipeline scales the scheduler's timesteps: t / 1000, 1 - t / 1000, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from .timeline import as_floats, single_timestep

__all__ = ["TimeScale", "find_time_scale", "scheduler_timestep"]

ROUNDING = 0.004  # of bfloat16, in which some pipelines pass the time


@dataclass(frozen=True)
class TimeScale:
    """The network's time is `factor t + offset` of its scheduler's timestep t."""

    factor: float = 1.0
    offset: float = 0.0

    def argument(self, timestep: Any) -> Any:
        """The network's time.

        Args:
            timestep: of the scheduler, a number or a tensor.
        """
        return timestep * self.factor + self.offset

    def timestep(self, argument: float) -> float:
        """The scheduler's timestep."""
        return (argument - self.offset) / self.factor


def find_time_scale(argument: float, scheduler: Any, net: Any) -> TimeScale:
    """The scale of a network's time, from an evaluation.

    Args:
        argument: the time that the network was called with.
        scheduler: of its pipeline, with timesteps.
        net: the network.

    Raises:
        BadInput: where the time is that of no timestep, in no known scale.
    """
    steps = float(scheduler.config.get("num_train_timesteps", 1000))
    own = getattr(net, "config", {}).get("timestep_scale")
    scales = [TimeScale(), TimeScale(1 / steps), TimeScale(-1 / steps, 1.0)]
    scales += [TimeScale(float(own))] if own else []
    table = as_floats(scheduler.timesteps)
    begin = getattr(scheduler, "begin_index", None) or 0
    for timesteps, rounding in ((table[begin : begin + 1], ROUNDING), (table, 1e-6), (table, ROUNDING)):
        for scale in scales:
            if nearest_timestep(scale.timestep(argument), timesteps, rounding) is not None:
                return scale
    raise BadInput(
        f"{type(net).__name__} was called at time {argument:g}, and its scheduler has no such timestep, nor t / "
        f"{steps:g} or 1 - t / {steps:g}: features cannot be reused"
    )


def nearest_timestep(value: float, timesteps: Sequence[float], rounding: float = ROUNDING) -> int | None:
    """The index of a timestep up to relative rounding, else None."""
    best = min(range(len(timesteps)), key=lambda k: abs(timesteps[k] - value), default=None)
    if best is None or abs(timesteps[best] - value) > max(1e-4, rounding * abs(value)):
        return None
    return best


def scheduler_timestep(argument: Any, scheduler: Any, net: Any, side_inputs: Any, expected: int | None = None) -> Any:
    """The scheduler's own timestep for a time that a network was called with: an entry of its table.

    Args:
        argument: the network's time, a number, () or (B,).
        scheduler: of its pipeline.
        net: the network.
        side_inputs: of the split network; its `scale` is set where it is not known.
        expected: the index in the table, where the sampling goes on.

    Raises:
        BadInput: see `find_time_scale`.
    """
    value, table = single_timestep(argument), scheduler.timesteps
    if side_inputs.table is not table:
        side_inputs.table, side_inputs.timesteps = table, as_floats(table)
    values = side_inputs.timesteps
    if side_inputs.scale is None or expected is None:
        side_inputs.scale = find_time_scale(value, scheduler, net)
    timestep = side_inputs.scale.timestep(value)
    here = expected is not None and nearest_timestep(timestep, values[expected : expected + 1]) is not None
    index = expected if here else nearest_timestep(timestep, values)
    return timestep if index is None else table[index]
