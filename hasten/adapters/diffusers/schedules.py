"""What a scheduler of `diffusers` says about its network: schedule, prediction and clock; and the times it visits."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...denoiser import Denoiser
from ...errors import BadInput, nearest
from ...schedules.base import Schedule
from ...schedules.continuous import Flow
from ...schedules.discrete import Discrete
from .arguments import check_count

__all__ = [
    "FlowDenoiser", "SchedulerSpec", "schedules_agree", "mu_of", "read_scheduler", "set_steps", "shift_of", "times_like", "to_float64",
]  # fmt: skip

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}


@dataclass(frozen=True)
class SchedulerSpec:
    """What `t` means, what the network predicts, and how many training steps its clock counts.

    A table's network is told the fractional index N t - 1 of its entry; that of a flow N sigma(t).
    """

    schedule: Schedule
    prediction: str
    steps: int

    @property
    def flow(self) -> bool:
        return isinstance(self.schedule, Flow)

    def time(self, timesteps: Tensor | float) -> Tensor:
        """t in [0, 1], float64, of the network's own times."""
        own = to_float64(timesteps)
        if not self.flow:
            return ((own + 1) / self.steps).clamp(0, 1)
        sigma = (own / self.steps).clamp(0, 1)
        return self.schedule.time(torch.log1p(-sigma) - torch.log(sigma))

    def timestep(self, t: Tensor | float) -> Tensor:
        """The network's own time, float64, of t in [0, 1]."""
        if isinstance(self.schedule, Flow):
            return self.steps * self.schedule.sigma(t)
        return self.schedule.index(t)  # type: ignore[attr-defined]

    def denoiser(self, net: torch.nn.Module) -> Denoiser:
        """The network as a denoiser."""
        if self.flow:
            return FlowDenoiser(net, self.schedule, self.prediction, clock=f"t{self.steps}")
        return Denoiser(net, self.schedule, self.prediction, clock="index")


class FlowDenoiser(Denoiser):
    """A denoiser on the straight path whose network is told sigma, not t: with a shift the two differ."""

    def time_input(self, t: Tensor | float) -> Tensor:
        """sigma(t) times the number of training steps, float64, of the shape of `t`."""
        return self.schedule.sigma(t) * float(self.clock[1:])

    def replace(self, **changes: Any) -> Denoiser:
        """The same with some of its constructor's arguments changed; what is not named is shared."""
        new = super().replace(**changes)
        new.__class__ = FlowDenoiser  # the same fields
        return new


def to_float64(values: Any) -> Tensor:
    """Numbers of any device on the CPU in float64: copied first, widened then, for not every device has float64."""
    return torch.as_tensor(values).detach().cpu().double()


def shift_of(config: Any, mu: float | None = None) -> float:
    """The shift s of a flow, sigma = s u / (1 + (s - 1) u), from its scheduler's configuration.

    mu: of `use_dynamic_shifting`, where pipelines make it from the size of the image; None: the smallest.
    """
    if config.get("use_dynamic_shifting"):
        mu = float(config.get("base_shift") or 0.0) if mu is None else float(mu)
        shift = mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)
        if not 0 < shift < math.inf:
            raise BadInput(f"mu={mu:g} gives a shift of {shift:g}: it must be positive")
        return shift
    return float((config.get("flow_shift") if config.get("use_flow_sigmas") else config.get("shift")) or 1.0)


def mu_of(scheduler: Any, tokens: int) -> float | None:
    """`mu` as pipelines make it for images of so many tokens; None where the shift does not depend on them.

    mu is linear in the number of tokens, `base_shift` at `base_image_seq_len`, `max_shift` at `max_image_seq_len`.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    low, high, small, large = (float(config.get(name) or value) for name, value in names.items())
    return small + (tokens - low) * (large - small) / (high - low)


def set_steps(scheduler: Any, steps: int, mu: float | None = None) -> None:
    """`scheduler.set_timesteps(steps)`, with the smallest `mu` where it needs one and none is given."""
    steps, more = check_count("steps", steps), {}
    if scheduler.config.get("use_dynamic_shifting"):
        more["mu"] = float(scheduler.config.get("base_shift") or 0.0) if mu is None else mu
    try:
        scheduler.set_timesteps(steps, **more)
    except BadInput:
        raise
    except Exception as error:  # of many kinds: too many steps (LCM), other arguments (Helios)
        said = " ".join(str(error).split())[:200]
        name = type(scheduler).__name__
        raise BadInput(f"{name}.set_timesteps({steps}) fails: {type(error).__name__}: {said}") from error


def schedules_agree(one: Schedule, two: Schedule, times: Tensor) -> bool:
    """Whether two schedules agree at these times."""
    return all(
        bool(torch.allclose(getattr(one, f)(times), getattr(two, f)(times), atol=1e-4)) for f in ("alpha", "sigma")
    )


def read_scheduler(scheduler: Any, prediction: str | None = None, mu: float | None = None) -> SchedulerSpec:
    """What a scheduler says. prediction: in place of what it says, one of "eps", "v", "x0", "flow". mu: see `shift_of`.

    Raises BadInput where its network is none of those that hasten can ask.
    """
    if isinstance(own := getattr(scheduler, "reading", None), SchedulerSpec):
        return replace(own, prediction=prediction or own.prediction)  # it is one of ours
    config, kind = dict(scheduler.config), type(scheduler).__name__
    steps = int(config.get("num_train_timesteps", 1000))
    if config.get("timestep_type") == "continuous":
        raise BadInput(f"{kind} with timestep_type 'continuous' tells its network log sigma / 4: not supported")
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        if config.get("invert_sigmas"):
            raise BadInput(f"{kind} with invert_sigmas tells its network 1 - sigma: not supported")
        return SchedulerSpec(Flow(shift_of(config, mu)), prediction or "flow", steps)
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        raise BadInput(f"{kind} has neither alphas_cumprod nor a flow: hasten cannot tell what its times mean")
    schedule = Discrete(tuple(to_float64(table).tolist()), convention="log_q")
    told = config.get("prediction_type", "epsilon")
    if prediction is None and told not in PREDICTIONS:
        raise BadInput(f"unknown prediction_type {told!r} of {kind}: {nearest(str(told), PREDICTIONS)}")
    return SchedulerSpec(schedule, prediction or PREDICTIONS[told], steps)


def times_like(scheduler: Any, steps: int, mu: float | None = None) -> Tensor:
    """The times, float64 and decreasing, that the scheduler visits in `steps` steps, with the one where it ends.

    Sampling on them is what the scheduler does, but for the rounding of its float32 tables. A last step that stays
    where it is (from the table's first entry to itself) is left out, and so are times visited twice.

    mu: of a flow with `use_dynamic_shifting`, what the pipeline gives for its size of image.
    Raises BadInput where that is needed and not given.
    """
    if mu is None and scheduler.config.get("use_dynamic_shifting"):
        raise BadInput(
            f"the times of {type(scheduler).__name__} with use_dynamic_shifting depend on the size of the image: "
            f"times_like(scheduler, steps, mu=...), {float(scheduler.config.get('base_shift') or 0.0):g} for the "
            "smallest"
        )
    other, read = copy.deepcopy(scheduler), read_scheduler(scheduler, mu=mu)
    set_steps(other, steps, mu)
    if hasattr(other, "grid"):
        return other.grid  # one of ours
    sigmas = getattr(other, "sigmas", None)
    if read.flow and sigmas is not None:
        visited = read.time(to_float64(sigmas[:-1]) * read.steps)  # unrounded: timesteps may be whole numbers
    else:
        visited = read.time(other.timesteps)
    end = read.time(0).item()  # the table's first entry
    clean = float(sigmas[-1]) == 0 if sigmas is not None else float(getattr(other, "final_alpha_cumprod", 1.0)) == 1
    times = torch.unique(torch.cat([visited, torch.tensor([0.0 if clean or read.flow else end]).double()]))
    return times.flip(0)
