"""Schedule, prediction and time input of a network, from its scheduler of `diffusers`; and the scheduler's times."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...denoiser import Denoiser
from ...errors import BadInput, check_choice
from ...schedules.base import Schedule
from ...schedules.continuous import Flow
from ...schedules.discrete import Discrete
from .arguments import check_count

__all__ = [
    "FlowDenoiser",
    "SchedulerSpec",
    "call_set_timesteps",
    "mu_of",
    "read_scheduler",
    "schedules_agree",
    "set_steps",
    "shift_of",
    "times_like",
    "to_float64",
    "visited_times",
]

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


@dataclass(frozen=True)
class SchedulerSpec:
    """What a scheduler of `diffusers` says about its network.

    The time input of a network with a table is the fractional index N t - 1 of its entry; that of a flow N sigma(t), or
    N (1 - sigma(t)) where the flow is inverted: such a network (Mochi) predicts data - noise.

    Attributes:
        schedule: alpha and sigma at t.
        prediction: "eps", "v", "x0" or "flow".
        steps: N, the number of training steps.
        inverted: of a flow: noise levels count from 0, pure noise, to 1.
    """

    schedule: Schedule
    prediction: str
    steps: int
    inverted: bool = False

    @property
    def flow(self) -> bool:
        """Whether the schedule is a flow, which has no table."""
        return isinstance(self.schedule, Flow)

    def time(self, timesteps: Tensor | float) -> Tensor:
        """t in [0, 1], float64, for timesteps of the network."""
        own = to_float64(timesteps)
        if not self.flow:
            return ((own + 1) / self.steps).clamp(0, 1)
        return self.time_of_level(own / self.steps)

    def time_of_level(self, levels: Tensor) -> Tensor:
        """t in [0, 1], float64, for noise levels as `diffusers` has them: sigma of a flow, sigma / alpha of a table."""
        if not self.flow:
            return torch.where(levels > 0, self.schedule.time(-torch.log(levels.clamp(min=1e-300))), 0.0)
        sigma = (1 - levels if self.inverted else levels).clamp(0, 1)
        return self.schedule.time(torch.log1p(-sigma) - torch.log(sigma))

    def level(self, t: Tensor) -> Tensor:
        """The noise level of a flow, float64, for t in [0, 1]: sigma, or 1 - sigma where it is inverted."""
        sigma = self.schedule.sigma(t)
        return 1 - sigma if self.inverted else sigma

    def timestep(self, t: Tensor | float) -> Tensor:
        """The timestep of the network, float64, for t in [0, 1]."""
        if isinstance(self.schedule, Flow):
            return self.steps * self.level(torch.as_tensor(t, dtype=torch.float64))
        assert isinstance(self.schedule, Discrete)
        return self.schedule.index(t)

    def denoiser(self, net: torch.nn.Module) -> Denoiser:
        """A denoiser with this network.

        Raises:
            BadInput: for an inverted flow.
        """
        if self.inverted:
            raise BadInput("a flow with invert_sigmas has the time input 1 - sigma: use hasten.as_scheduler on it")
        if self.flow:
            return FlowDenoiser(net, self.schedule, self.prediction, clock=f"t{self.steps}")
        return Denoiser(net, self.schedule, self.prediction, clock="index")


class FlowDenoiser(Denoiser):
    """A denoiser of a flow whose time input is sigma, not t: with a shift the two differ."""

    def time_input(self, t: Tensor | float) -> Tensor:
        """sigma(t) times the number of training steps, float64, of the shape of `t`."""
        return self.schedule.sigma(t) * float(self.clock[1:])

    def replace(self, **changes: Any) -> Denoiser:
        """A copy with some of its constructor's arguments changed; the others are shared."""
        new = super().replace(**changes)
        new.__class__ = FlowDenoiser  # the same fields
        return new


def to_float64(values: Any) -> Tensor:
    """Values on the CPU in float64; moved before the cast, since not every device has float64."""
    return torch.as_tensor(values).detach().cpu().double()


def shift_of(config: Any, mu: float | None = None) -> float:
    """The shift s of a flow, sigma = s u / (1 + (s - 1) u).

    Args:
        config: of its scheduler.
        mu: with `use_dynamic_shifting`, where pipelines compute it from the image size. Default: the smallest.

    Raises:
        BadInput: where `mu` gives a shift that is not positive.
    """
    if config.get("use_dynamic_shifting"):
        mu = float(config.get("base_shift") or 0.0) if mu is None else float(mu)
        shift = mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
        if not 0 < shift < math.inf:
            raise BadInput(f"mu={mu:g} gives a shift of {shift:g}: it must be positive")
        return shift
    return float((config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")) or 1.0)


def mu_of(scheduler: Any, tokens: int) -> float | None:
    """`mu` as pipelines compute it, linear in the number of tokens.

    It is `base_shift` at `base_image_seq_len`, `max_shift` at `max_image_seq_len`.

    Args:
        scheduler: of `diffusers`.
        tokens: of the image.

    Returns:
        mu, None where the shift does not depend on it.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    low, high, small, large = (float(config.get(name) or value) for name, value in names.items())
    return small + (tokens - low) * (large - small) / (high - low)


def set_steps(scheduler: Any, steps: int, mu: float | None = None) -> None:
    """`scheduler.set_timesteps(steps)`, by default with the smallest `mu` where it needs one.

    Raises:
        BadInput: where it fails.
    """
    steps, more = check_count("steps", steps), {}
    if scheduler.config.get("use_dynamic_shifting"):
        more["mu"] = float(scheduler.config.get("base_shift") or 0.0) if mu is None else mu
    call_set_timesteps(scheduler, steps, **more)


def call_set_timesteps(scheduler: Any, *arguments: Any, **keywords: Any) -> None:
    """`scheduler.set_timesteps(...)`.

    Raises:
        BadInput: where it fails.
    """
    try:
        scheduler.set_timesteps(*arguments, **keywords)
    except BadInput:
        raise
    except Exception as error:  # of many kinds: too many steps (LCM), other arguments (Helios)
        message = " ".join(str(error).split())[:200]
        shown = ", ".join([*map(str, arguments), *keywords])
        name = type(scheduler).__name__
        raise BadInput(f"{name}.set_timesteps({shown}) fails: {type(error).__name__}: {message}") from error


def schedules_agree(one: Schedule, two: Schedule, times: Tensor) -> bool:
    """Whether two schedules agree at these times."""
    return all(
        bool(torch.allclose(getattr(one, f)(times), getattr(two, f)(times), atol=1e-4)) for f in ("alpha", "sigma")
    )


def read_scheduler(scheduler: Any, prediction: str | None = None, mu: float | None = None) -> SchedulerSpec:
    """The schedule, prediction and training steps of a scheduler's network.

    Args:
        scheduler: of `diffusers`.
        prediction: overrides the scheduler's: "eps", "v", "x0" or "flow".
        mu: see `shift_of`.

    Raises:
        BadInput: where its times or predictions are not supported.
    """
    if isinstance(own := getattr(scheduler, "spec", None), SchedulerSpec):
        return replace(own, prediction=prediction or own.prediction)  # a PlanScheduler
    config, kind = dict(scheduler.config), type(scheduler).__name__
    steps = int(config.get("num_train_timesteps", 1000))
    if config.get("timestep_type") == "continuous":
        raise BadInput(f"{kind} with timestep_type 'continuous' has the time input log sigma / 4: not supported")
    if kind.startswith("Helios"):
        raise BadInput(f"{kind} samples in stages, between which it noises: not supported")
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        if prediction is None and not kind.startswith("FlowMatch") and config.get("prediction_type"):
            name = check_choice(f"prediction_type of {kind}", config["prediction_type"], PREDICTIONS)
            prediction = PREDICTIONS[name]
        inverted = bool(config.get("invert_sigmas"))
        return SchedulerSpec(Flow(shift_of(config, mu)), prediction or "flow", steps, inverted)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise BadInput(f"{kind} has neither alphas_cumprod nor a flow: hasten does not know what its times mean")
    schedule = Discrete(tuple(to_float64(table).tolist()), convention="log_q")
    if prediction is None:
        name = check_choice(f"prediction_type of {kind}", config.get("prediction_type", "epsilon"), PREDICTIONS)
        prediction = PREDICTIONS[name]
    return SchedulerSpec(schedule, prediction, steps)


def times_like(scheduler: Any, steps: int, mu: float | None = None) -> Tensor:
    """The times of a scheduler of `diffusers`.

    Sampling on them takes the scheduler's steps, up to the rounding of its float32 tables. A last step from the table's
    first entry to itself is omitted, and so are repeated times.

    Args:
        scheduler: of `diffusers`.
        steps: number of steps.
        mu: of a flow with `use_dynamic_shifting`, as the pipeline computes it from the image size.

    Returns:
        Decreasing times (steps + 1,), float64, from the first to the end.

    Raises:
        BadInput: where `mu` is needed and missing.
    """
    if mu is None and scheduler.config.get("use_dynamic_shifting"):
        raise BadInput(
            f"the times of {type(scheduler).__name__} with use_dynamic_shifting depend on the image size: "
            f"times_like(scheduler, steps, mu=...), {float(scheduler.config.get('base_shift') or 0.0):g} for the "
            "smallest"
        )
    other, spec = copy.deepcopy(scheduler), read_scheduler(scheduler, mu=mu)
    set_steps(other, steps, mu)
    if hasattr(other, "grid"):
        return other.grid  # a PlanScheduler
    return visited_times(other, spec)


def visited_times(scheduler: Any, spec: SchedulerSpec, exact: bool = False) -> Tensor:
    """The times of a scheduler of `diffusers` after its `set_timesteps`.

    Args:
        scheduler: of `diffusers`.
        spec: of its network, with the shift of this size of image.
        exact: read its noise levels, not its timesteps, which some schedulers round to whole numbers. Of flows and of
            Karras, exponential and beta sigmas they are read in any case.

    Returns:
        Decreasing times (steps + 1,), float64, from the first to the end.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    exact |= spec.flow or any(scheduler.config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    if sigmas is None or not exact:
        visited = spec.time(scheduler.timesteps)
        end = spec.time(0)  # the table's first entry
        clean = float(getattr(scheduler, "final_alpha_cumprod", 1.0)) == 1 if sigmas is None else float(sigmas[-1]) == 0
        end = torch.zeros_like(end) if clean or spec.flow else end
    else:
        visited = spec.time_of_level(to_float64(sigmas))
        visited, end = visited[:-1], visited[-1]
    return torch.unique(torch.cat([visited, end.reshape(1)])).flip(0)
