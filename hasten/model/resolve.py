"""From a `SamplingConfig` to what runs: methods looked up, bound to a model and compiled, once a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..accelerators import SamplingContext, accelerate, with_defaults
from ..adapters.model_like import ModelLike
from ..errors import BadInput, HastenError, check_number, nearest
from ..guides.cfg import CFG, with_step_count
from ..performance.autotune import parse_runtime
from ..performance.runtime import Runtime
from ..pick import pick
from ..plan.config import SamplingConfig, check_method, spec
from ..plan.draw import compile_plan
from ..plan.table import Plan
from ..sampling import bind_method, wrap_denoiser
from ..schedules.base import Schedule
from ..starts.early_stop import EarlyStop
from ..times import Explicit, as_times, check_times
from .weak import with_weak_model

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RECOMMENDED", "Resolved", "resolve"]

RECOMMENDED = "recommended"
NOISE = "noise"  # the start of a config that replaces the one that the model recommends
CACHED = 4  # accelerated denoisers of a model


@dataclass(frozen=True)
class Resolved:
    """How samples are made, all looked up and bound to a model; see `Model.resolve`.

    Args:
        config: complete, with what the model recommends filled in.
        denoiser: accelerated and guided. inner: accelerated alone. base: the model's own.
        plan: the compiled steps; None where the sampler has none. sampler, times: what runs without a plan.
        start: the initialisation; None: noise.
        runtime: precision, memory layout and threads of the network.
    """

    config: SamplingConfig
    denoiser: nn.Module
    inner: nn.Module
    base: nn.Module
    plan: Plan | None
    sampler: Any
    times: Tensor
    start: Any = None
    runtime: Runtime = dataclasses.field(default_factory=Runtime)

    @property
    def nfe(self) -> float | None:
        """Queries of the denoiser per sample, without those of the start; None where only the run tells."""
        return self.sampler.nfe(len(self.times) - 1) if self.plan is None else self.plan.nfe

    def settings(self) -> dict[str, Any]:
        """What a record must say of the sampling: the fields of `config` that are set, methods as texts."""
        config = self.config
        if config.plan is not None:
            values: dict[str, Any] = {"plan": config.plan if isinstance(config.plan, (str, Path)) else RECOMMENDED}
        else:
            values = {name: method_text(getattr(config, name)) for name in ("sampler", "times")}
        values |= {"steps": config.steps, "guidance_scale": config.guidance_scale}
        values |= {"guides": tuple(map(method_text, config.guides))} if config.guides else {}
        values |= {"start": method_text(config.start)} if config.start is not None else {}
        values |= {"accelerators": tuple(map(method_text, config.accelerators))} if config.accelerators else {}
        return {**values, "precision": config.precision}


def resolve(
    model: ModelLike,
    config: SamplingConfig,
    precision: str,
    accelerated: Callable[[Sequence[Any], Plan | None, SamplingConfig], nn.Module],
    generator: Callable[[str], Any] | None = None,
) -> Resolved:
    """What a config amounts to for a model, checked and bound to it.

    Args:
        precision: as `parse_runtime` reads it; not "auto".
        accelerated: gives the model's denoiser with some accelerators, see `accelerate_model`.
        generator: opens the model of a name, for a start that begins from its images.

    Raises:
        BadInput: for a method that is not there or that the model cannot run.
    """
    start = start_of(model, config)
    if generator is not None and isinstance(start, EarlyStop) and isinstance(start.generator, (str, Path)):
        start = replace(start, generator=generator(str(start.generator)))
    plan, sampler, times = steps_of(model, config, None if start is None else start.time)
    methods = [pick("accelerators", one) if isinstance(one, str) else one for one in config.accelerators]
    inner: nn.Module = model.denoiser
    if methods:
        inner = accelerated(methods, plan, config)
        if plan is not None and plan.branches is not None and any(hasattr(type(m), "reset") for m in inner.modules()):
            raise BadInput(
                "this plan evaluates the branches of guidance one by one, which accelerators that keep state from one "
                f"evaluation to the next would mix: leave out {', '.join(map(method_text, methods))}, or the plan"
            )
    complete = completed(model, config, plan, times, precision)
    for one in methods:
        if plan is not None:
            plan = with_defaults(one).plan(plan, model.denoiser)
    denoiser = with_step_count(guided(model, inner, config.guidance_scale, config.guides), len(times) - 1)
    denoiser = wrap_denoiser(sampler, denoiser)
    runtime = parse_runtime(precision, next(iter(model.denoiser.parameters()), torch.zeros(())).device.type)
    return Resolved(complete, denoiser, inner, model.denoiser, plan, sampler, times, start, runtime)


def start_of(model: ModelLike, config: SamplingConfig) -> Any:
    """The initialisation, bound to the model; None for noise.

    Raises:
        BadInput: for one that the model cannot run.
    """
    start = getattr(model, "start", None) if config.start is None else config.start
    if start is None or start == NOISE:
        return None
    if not model.denoiser.schedule.ordinary:
        process = type(model.denoiser.schedule).__name__
        raise BadInput(f"{model.name} is a model of the process {process}, which takes no start: leave it out")
    return bound(model, "starts", start)


def completed(
    model: ModelLike, config: SamplingConfig, plan: Plan | None, times: Tensor, precision: str
) -> SamplingConfig:
    """The config with what the model recommends in the place of what is None."""
    scale = float(model.guidance_scale if config.guidance_scale is None else config.guidance_scale)
    common: dict[str, Any] = {"guidance_scale": scale, "precision": precision}
    if config.start is None and getattr(model, "start", None) is not None:
        common["start"] = model.start
    if plan is not None and (config.plan is not None or plan is model.plan):
        name = RECOMMENDED if config.plan is None else config.plan
        return config.replace(plan=name, sampler=None, times=None, steps=plan.nfe, **common)
    sampler = model.sampler if config.sampler is None else config.sampler
    grid = model.times if config.times is None else config.times
    return config.replace(sampler=sampler, times=grid, steps=len(times) - 1, **common)


def accelerate_model(
    model: Any, methods: Sequence[Any], plan: Plan | None, config: SamplingConfig, cache: dict[Any, nn.Module]
) -> nn.Module:
    """The denoiser with these accelerators, for a sampling by `plan` with this config.

    The last few stay in `cache`: calibration or compilation may take long.
    """
    times = None if plan is None else tuple(plan.times[:-1].tolist())
    plain = config.replace(accelerators=(), guides=(), start=None, precision=None)
    prompts = tuple(getattr(model, "calibration_prompts", ()))
    sources = getattr(model, "calibration_sources", None)
    known = None if sources is None else (id(sources), tuple(sources.shape))
    key = (model.denoiser, tuple(map(repr, methods)), times, repr(plain), prompts, known, model.device)
    result = cache.pop(key, None)
    if result is None:
        if len(cache) >= CACHED:
            cache.pop(next(iter(cache)))
        result = accelerate(
            model.denoiser, methods, SamplingContext(times, lambda n, seed: model.calls(n, seed, plain))
        )
    cache[key] = result  # the last is the one that was used last
    return result


def guided(model: ModelLike, denoiser: nn.Module, guidance_scale: float | None, guides: Sequence[Any]) -> nn.Module:
    """A model's denoiser under classifier-free guidance (None: the recommended scale) and then other guides."""
    scale = check_number("guidance_scale", model.guidance_scale if guidance_scale is None else guidance_scale)
    distilled = model.denoiser.guidance_range is not None
    if model.conditioning is not None and not distilled:
        scale = max(scale, 1)  # as in pipelines, where 1 or less is none and turbo models are published with 0
    unguided = model.classes is None and model.conditioning is None
    if scale != 1 and unguided and not distilled:
        raise BadInput(f"{model.name} has no classes to guide towards: guidance_scale must be 1, got {scale:g}")
    denoiser = CFG(scale=float(scale)).wrap(denoiser)
    for guide in guides:
        denoiser = with_weak_model(bound(model, "guides", guide), model).wrap(denoiser)
    return denoiser


def steps_of(model: ModelLike, config: SamplingConfig, begin: float | None = None) -> tuple[Plan | None, Any, Tensor]:
    """What to run: a plan or None, the sampler, the times. begin: the first time, where the start decides it."""
    steps, plan = config.steps, config.plan
    free = config.sampler is None and config.times is None
    if plan is None and model.plan is not None and free and begin is None:
        plan = RECOMMENDED if steps in (None, model.plan.nfe) else None
    if plan is not None:
        if not free:
            raise BadInput("a plan holds its sampler and times: leave sampler and times out, or the plan")
        table = named_plan(model, plan)
        if steps not in (None, table.nfe):
            raise BadInput(f"the plan has {table.nfe} network evaluations, asked for {steps} steps")
        if begin is not None and abs(float(table.times[0]) - begin) > 1e-9:
            raise BadInput(f"the plan begins at t = {float(table.times[0]):g}, the start at {begin:g}")
        return table, bound(model, "samplers", model.sampler, quiet=True), table.times
    sampler = bound(model, "samplers", model.sampler if config.sampler is None else config.sampler)
    schedule = model.denoiser.schedule
    times = grid_of(schedule, model.times if config.times is None else config.times, steps, model.steps, begin)
    return (compile_plan(sampler, schedule, times) if sampler.linear else None), sampler, times


def named_plan(model: ModelLike, plan: str | Path | Plan) -> Plan:
    """One of a model's plans by name, the recommended one, or the plan in a .json file.

    Raises:
        BadInput: for a plan that is not there, and for one of another schedule than the model's.
    """
    table = _found_plan(model, plan)
    table.check_schedule(model.denoiser.schedule)
    return table


def _found_plan(model: ModelLike, plan: str | Path | Plan) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):  # in a SamplingConfig that was read from a record
        return Plan.from_json(json.dumps(dict(plan)))
    known = {**model.plans, **({} if model.plan is None else {RECOMMENDED: model.plan})}
    if isinstance(plan, str) and plan in known:
        return known[plan]
    if str(plan).endswith(".json"):
        try:
            return Plan.from_json(Path(plan).read_text())
        except OSError as e:
            raise BadInput(f"cannot read {plan}: {e.strerror or e}") from e
    hint = nearest(str(plan), known) if known else "it has none"
    raise BadInput(f"{model.name} has no plan {str(plan)!r}: {hint}, or a plan's .json file")


def bound(model: ModelLike, folder: str, method: Any, quiet: bool = False) -> Any:
    """A method with what it needs of a model. quiet: as it is, where the model lacks that."""
    method = pick(folder, method) if isinstance(method, str) else check_method(folder, method)
    try:
        return bind_method(method, model.statistics, model.parts)
    except HastenError:
        if quiet:
            return method
        raise


def grid_of(schedule: Schedule, times: Any, steps: int | None, default: int, begin: float | None = None) -> Tensor:
    """The float64 times (steps + 1,) of a grid by name, of a grid, or of a list of times.

    Args:
        steps: of the grid; None: `default`, or as many as times that are given one by one have.
        begin: the first time, where something else decides it.
    """
    if isinstance(times, (Tensor, list, tuple)) or hasattr(times, "__array__"):
        values = check_times(as_times(times).detach().cpu())
        if steps not in (None, len(values) - 1):
            raise BadInput(f"the times are {len(values) - 1} steps, asked for {steps}")
        if begin is not None and abs(float(values[0]) - begin) > 1e-9:
            raise BadInput(f"the times begin at t = {float(values[0]):g}, the start at {begin:g}")
        return values
    grid = pick("times", times) if isinstance(times, str) else times
    if isinstance(grid, type) or not callable(grid):
        what = f"{grid.__name__}()" if isinstance(grid, type) else "Karras()"
        raise BadInput(f"times must be a grid such as {what}, its name or a tensor of times, found {times!r}")
    if begin is not None:
        if not hasattr(grid, "start"):
            raise BadInput(f"{spec(times)} cannot begin at t = {begin:g}, where the start does")
        low = grid.low if grid.low is None or grid.low < begin else None
        grid = replace(grid, start=begin, low=low)
    if steps is None and not isinstance(grid, Explicit):
        steps = default
    result: Tensor = grid(schedule, steps)
    return result


def method_text(method: Any) -> Any:
    """A method as text, or times as a tuple."""
    value = spec(method)
    return tuple(value) if isinstance(value, list) else value
