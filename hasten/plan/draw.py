"""`draw`: samples from noise, by a plan or by a sampler, which is compiled to a `Plan` where it can be."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..pick import format_spec, resolve_grid, resolve_sampler
from ..sampling import Callback, Progress, Sampler, check_noise, check_state, schedule_of, walk
from ..schedules.base import Schedule
from ..times import as_times
from ..utils.conditions import conditions_of
from ..utils.random import Noise
from .diagnose import check_result
from .table import Plan
from .table import plan as make_plan

__all__ = ["compile_plan", "draw"]

MAX_CHECKED_NFE = 40  # evaluations up to which the standard deviation of a plan's result is checked
MAX_GAIN = 4.0  # standard deviations of the result above which a warning is given


def draw(
    denoiser: Callable[..., Tensor],
    sampler: Sampler | None,
    times: Tensor | Callable[[Schedule, Any], Tensor],
    noise: Noise,
    *,
    steps: int | None = None,
    x: Tensor | None = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Tensor:
    """Samples (B, *S): start from noise and run the sampler, compiled to a `Plan` where it can be.

    The same call gives the same samples: `noise` is taken from its beginning, whatever was drawn from it before.

    Args:
        denoiser: `denoiser(x_t, t, **cond) -> x0`, with a `schedule`.
        sampler: a sampler or its name; None where a plan is given.
        times: the float64 times, or a grid that makes them from the denoiser's schedule and `steps`.
        noise: the initial noise and all later draws.
        steps: of the grid.
        x: the initial state; by default `noise.initial()` times `schedule.prior_std(times[0])`.
        plan: run this plan, made for the denoiser's schedule; `sampler` and `times` are then not used.
        progress: called as `progress(evaluations done, evaluations in total)`.
        callback: called after each evaluation as `callback(step, t, x, x0)`; see `walk`.
        cond: the conditions, passed to the denoiser as keyword arguments: `cond={"label": labels}`. `label`, and
            conditions that the network names in its `forward`, may also be given as keywords.

    Returns:
        the samples (B, *S).

    Raises:
        BadInput: for a keyword that is neither an option nor a condition, for `steps` that differ from those of the
            times or of the plan, and for a plan that was made for another schedule.
        NonFinite: for samples that hold NaN or infinity, unless gradients are recorded.
    """
    same: dict[str, Any] = {"steps": steps, "x": x, "plan": plan, "cond": cond, **keywords}
    result = draw_unchecked(denoiser, sampler, times, noise, **same, progress=progress, callback=callback)
    return check_result(result, denoiser, noise, lambda d, xi: draw_unchecked(d, sampler, times, xi, **same))


def draw_unchecked(
    denoiser: Callable[..., Tensor],
    sampler: Any,
    times: Any,
    noise: Noise,
    *,
    steps: int | None = None,
    x: Tensor | None = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Tensor:
    """`draw` without the check for NaN and infinity in the samples."""
    schedule = schedule_of(denoiser)
    conditions = conditions_of("draw", OPTIONS, cond, keywords, denoiser)
    if plan is None and sampler is None:
        raise BadInput("draw needs a sampler or a plan")
    sampler = None if sampler is None else resolve_sampler(sampler)
    check_noise(noise, x)
    if plan is not None:
        if not callable(getattr(plan, "check_schedule", None)):
            raise BadInput(f"plan must be a Plan, found {type(plan).__name__}: see hasten.plan and Plan.from_json")
        plan.check_schedule(schedule)
        times = plan.times
    elif not isinstance(times, Tensor):
        times = resolve_grid(times)
        times = times(schedule, steps) if callable(times) else as_times(times)
    count = len(times) - 1 if plan is None else plan.nfe
    if steps is not None and isinstance(times, Tensor) and steps != count:
        what = f"the times are {count} steps" if plan is None else f"the plan has {count} network evaluations"
        raise BadInput(f"{what}, asked for {steps} steps")
    if x is None:
        first = times[0].detach() if plan is None or plan.begin is None else plan.begin
        x = schedule.begin(noise.initial(), first)
    check_state(x, progress=progress, callback=callback)
    if isinstance(noise, Noise) and (len(x), *x.shape[1:]) != (len(noise), *noise.shape):
        raise BadInput(f"x has shape {tuple(x.shape)}, the noise {(len(noise), *noise.shape)}: they must be equal")
    restarted = noise.rows(slice(None)) if isinstance(noise, Noise) else noise
    options: dict[str, Any] = {"progress": progress, "callback": callback, "cond": conditions}
    if plan is None:
        assert sampler is not None
        if not sampler.linear:
            return walk(sampler, denoiser, x, times, restarted, **options)
        plan = compile_plan(sampler, schedule, times)
    return plan.run(denoiser, x, restarted, **options)


def compile_plan(sampler: Any, schedule: Schedule, times: Tensor) -> Plan:
    """The plan of a linear sampler; the last few are cached.

    Args:
        sampler: with `linear` True.
        schedule: of the denoiser.
        times: (steps + 1,) float64.
    """
    if times.requires_grad:
        return make_plan(sampler, schedule, times)
    try:
        hash(sampler)
    except TypeError:  # a dataclass that is not frozen
        return make_plan(sampler, schedule, times)
    cached = _cached(sampler, schedule, tuple(times.tolist()))
    return make_plan(sampler, schedule, times) if cached.fitted else cached


@functools.lru_cache(maxsize=16)
def _cached(sampler: Any, schedule: Schedule, times: tuple[float, ...]) -> Plan:
    """The plan on these times, with a warning where its result would be far from unit variance."""
    with torch.inference_mode(False):
        at = torch.tensor(times, dtype=torch.float64)
        compiled = make_plan(sampler, schedule, at)
        checked = (
            schedule.ordinary
            and compiled.basis is None
            and compiled.nfe <= MAX_CHECKED_NFE
            and not compiled.fitted
            and times[-1] == 0
        )
        if checked and compiled.gain > MAX_GAIN:
            advice = "more steps, or unipc or dpm"
            if getattr(sampler, "lower_order_final", None) is False:
                lowered = dataclasses.replace(sampler, lower_order_final=True)
                if make_plan(lowered, schedule, at).gain <= MAX_GAIN:
                    advice = f"{format_spec(lowered)}, {advice}"
            warnings.warn(
                f"{format_spec(sampler)} with {len(times) - 1} steps gives values of about {compiled.gain:.0f} "
                "standard deviations on these times (data of unit variance): its order is too high for so few "
                f"steps; use {advice}",
                UserWarning,
                stacklevel=3,
            )
    return compiled


OPTIONS = tuple(inspect.signature(draw).parameters)[:-1]
