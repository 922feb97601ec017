"""The plans that a fit starts from: samplers on time grids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from ..pick import format_spec
from ..plan.table import Plan, plan
from ..samplers.deis import DEIS
from ..samplers.dpm import DPMSolver
from ..samplers.plms import PLMS
from ..samplers.unipc import UniPC
from ..schedules.base import Schedule
from ..times import CosineAngle, Karras, Quadratic, TimeGrid, UniformLambda, UniformTime
from ._rows import coordinate, time_at
from ._task import TuningTask

__all__ = ["resized", "sampler_starts", "skipping_grids"]

FIRST = (2.0, 4.0, 8.0, 16.0, 32.0)  # noise levels q of the first model evaluation with skip-ahead
LAST = (0.08, 0.03, 0.2)  # and of the last
SAMPLERS: tuple[Any, ...] = (UniPC(2), UniPC(3), DPMSolver(3), DEIS(3), PLMS(4, "ramp"))


def sampler_starts(task: TuningTask, low: float, *, teleport: bool, every: bool) -> Iterator[tuple[str, Plan]]:
    """The sampler on the task's grid, on grids with other first and last times, and other samplers on every grid.

    Args:
        task: with a linear sampler.
        low: the smallest positive time.
        teleport: also grids that skip the first, noisiest times.
        every: also the other samplers and grids.

    Yields:
        The name and the plan of each.
    """
    schedule, steps, top = task.schedule, task.steps, float(task.times[0])
    own = format_spec(task.sampler)
    yield own, plan(task.sampler, schedule, task.times)
    if float(task.times[-1]) > 0 or steps < 2:
        return
    if teleport:
        for name, grid in skipping_grids(schedule, top, low).items():
            yield f"{own} on {name}", plan(task.sampler, schedule, grid(schedule, steps))
    if not every:
        return
    for sampler in dict.fromkeys((task.sampler, *SAMPLERS)):
        for name, grid in full_grids(schedule, top).items():
            try:
                table = plan(sampler, schedule, grid(schedule, steps))
            except BadInput:  # no finite coefficients on these times
                continue
            if table.nfe == plan_nfe(task):
                yield f"{format_spec(sampler)} on {name}", table


def plan_nfe(task: TuningTask) -> int:
    """Model evaluations of the sampler on the task's grid."""
    return int(task.sampler.nfe(task.steps))


def skipping_grids(schedule: Schedule, top: float, low: float) -> dict[str, TimeGrid]:
    """Grids equal in lam that begin at a later time than `top`, by name."""
    grids: dict[str, TimeGrid] = {}
    for first, last in [(f, LAST[0]) for f in FIRST] + [(f, q) for f in FIRST[1:3] for q in LAST[1:]]:
        start, end = (float(schedule.time(-math.log(q))) for q in (first, last))
        if start < top:
            grids[f"lambda from q {first:g} to {last:g}"] = UniformLambda(start=start, low=max(end, low))
    return grids


def full_grids(schedule: Schedule, top: float) -> dict[str, TimeGrid]:
    """The time grids of `hasten.times` from `top` to 0, by name."""
    low = float(schedule.time(-math.log(0.03)))
    return {
        "lambda": UniformLambda(start=top),
        "lambda to q .03": UniformLambda(start=top, low=low),
        "uniform": UniformTime(start=top),
        "quadratic": Quadratic(start=top),
        "karras": Karras(start=top),
        "angle": CosineAngle(start=top),
        "angle .5": CosineAngle(start=top, scale=0.5),
    }


def resized(schedule: Schedule, times: Tensor, steps: int) -> Tensor:
    """A grid of another number of steps with the same ends, as dense as the given one: linear in `coordinate`."""
    inner = coordinate(schedule, times[:-1].double()).numpy()
    ends = float(times[-1]) == 0
    count = steps if ends else steps + 1
    if not ends:
        inner = np.append(inner, float(coordinate(schedule, times[-1].double())))
    at = np.interp(np.linspace(0, len(inner) - 1, count), np.arange(len(inner)), inner)
    new = time_at(schedule, torch.from_numpy(at).clamp(min=1e-12))
    new[0] = times[0]
    return torch.cat([new, times[-1:]]) if ends else torch.cat([new[:-1], times[-1:]])
