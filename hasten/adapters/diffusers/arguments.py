"""Arguments of schedulers of `diffusers` beside steps and samples: used, or refused by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from ...schedules.base import Schedule
from ...schedules.continuous import Flow

__all__ = [
    "StepAlphas",
    "check_count",
    "check_index",
    "check_neutral",
    "clip_x0",
    "float_tensor",
    "index_of_timestep",
    "lcm_timesteps",
    "requested_steps",
    "times_of_sigmas",
]

MAX_STEPS = 10_000
# values of arguments that have no effect, which pipelines pass by default
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "eta": (0,),
    "use_clipped_model_output": (False,),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (math.inf,),
    "s_noise": (1,),
    "strength": (1,),
}
INSTEAD = {
    "eta": "the noise is the sampler's: hasten.as_scheduler('ddim:eta=1', ...)",
    "s_churn": "the noise is the sampler's: hasten.as_scheduler('heun:churn=10', ...)",
    "per_token_timesteps": "all tokens of a sample have one time",
    "variance_noise": "it draws its noise from generator=",
}


def check_neutral(method: str, sampler: Any, arguments: dict[str, Any]) -> None:
    """Refuse arguments of other schedulers that would have an effect; None and the usual defaults have none.

    Args:
        method: of the scheduler, for the message.
        sampler: of the scheduler; its own `eta` is allowed.
        arguments: by name.

    Raises:
        BadInput: naming the first such argument.
    """
    for name, value in arguments.items():
        number = isinstance(value, (bool, int, float))
        if value is None or number and value in NEUTRAL.get(name, ()):
            continue
        if name == "eta" and number and value == getattr(sampler, "eta", None):
            continue
        instead = INSTEAD.get(name, "use the pipeline with its own scheduler, or remove it")
        raise BadInput(f"{method}({name}={short_repr(value)}) is not supported by hasten's scheduler: {instead}")


def short_repr(value: Any) -> str:
    """`repr` of at most 40 characters."""
    text = repr(value) if not isinstance(value, Tensor) else f"a tensor {tuple(value.shape)}"
    return text if len(text) < 40 else f"{text[:36]} ..."


def check_count(name: str, value: Any) -> int:
    """The value as an int of at least 1.

    Raises:
        BadInput: for anything else.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or count < 1:
        raise BadInput(f"{name} must be a whole number of at least 1, got {value!r}")
    return count


def requested_steps(steps: Any, timesteps: Any, sigmas: Any) -> int | None:
    """The number of steps, None where timesteps or sigmas give it.

    Raises:
        BadInput: for none or several of the three, and for a bad number.
    """
    grids = [value for value in (timesteps, sigmas) if value is not None]
    if len(grids) > 1 or (steps is None and not grids):
        raise BadInput("set_timesteps needs num_inference_steps, timesteps or sigmas, one of them")
    if steps is None:
        return None
    steps = check_count("num_inference_steps", steps)
    if steps > MAX_STEPS:
        raise BadInput(f"num_inference_steps is at most {MAX_STEPS}, got {steps}")
    if grids and len(grids[0]) != steps:
        name = "timesteps" if sigmas is None else "sigmas"
        raise BadInput(f"set_timesteps: {steps} steps and {len(grids[0])} {name}: pass one")
    return steps


def check_index(name: str, value: Any, count: int) -> int:
    """The value as an int of 0 to count - 1.

    Raises:
        BadInput: for anything else.
    """
    try:
        k = operator.index(value)
    except TypeError:
        k = -1
    if isinstance(value, bool) or not 0 <= k < count:
        raise BadInput(f"{name} takes an index among {count} timesteps, 0 to {count - 1}, got {value!r}")
    return k


def float_tensor(name: str, values: Any) -> Tensor:
    """Numbers as a tensor (n,), float64.

    Raises:
        BadInput: for anything else.
    """
    if not isinstance(values, (Tensor, Iterable)):
        raise BadInput(f"{name} must be several numbers, got {values!r}")
    try:
        numbers = values.detach().cpu() if isinstance(values, Tensor) else torch.tensor([float(v) for v in values])
        numbers = numbers.double().flatten()
    except (TypeError, ValueError) as error:
        raise BadInput(f"{name} must be several numbers, got {short_repr(values)}") from error
    if not len(numbers) or not bool(torch.isfinite(numbers).all()) or bool((numbers[1:] >= numbers[:-1]).any()):
        raise BadInput(f"{name} must be one or more finite decreasing numbers, got {short_repr(values)}")
    return numbers


def times_of_sigmas(schedule: Schedule, sigmas: Any) -> Tensor:
    """Times of noise levels of `diffusers`.

    Args:
        schedule: of the network.
        sigmas: of a flow: sigma in [0, 1] before the shift, with or without the last 0; of a table: sigma / alpha, with
            the level where the sampling ends.

    Returns:
        (n + 1,), float64.

    Raises:
        BadInput: for other values.
    """
    levels = float_tensor("sigmas", sigmas)
    if bool((levels < 0).any()):
        raise BadInput(f"sigmas must not be negative, got {short_repr(sigmas)}")
    if isinstance(schedule, Flow):
        if float(levels[0]) > 1:
            raise BadInput(f"sigmas of a flow lie in [0, 1], got {short_repr(sigmas)}")
        return levels if float(levels[-1]) == 0 else torch.cat([levels, levels.new_zeros(1)])
    if len(levels) < 2:
        raise BadInput(f"sigmas must name the level where the sampling ends too, got {short_repr(sigmas)}")
    return torch.where(levels > 0, schedule.time(-torch.log(levels.clamp(min=1e-300))), 0.0)


def lcm_timesteps(steps: int, total: int, original: int, strength: float) -> list[int]:
    """Timesteps of latent consistency sampling: some of those that the network was distilled on.

    Args:
        steps: number of timesteps.
        total: training steps.
        original: timesteps of the distillation.
        strength: fraction of them that image to image uses, in (0, 1].

    Raises:
        BadInput: where there are fewer.

    References:
        Luo et al. 2023, arXiv:2310.04378.
    """
    original = check_count("original_inference_steps", original)
    if original > total:
        raise BadInput(f"original_inference_steps is at most {total}, the steps of training, got {original}")
    if not 0 < strength <= 1:
        raise BadInput(f"strength must lie in (0, 1], got {strength}")
    known = [k * (total // original) - 1 for k in range(1, int(original * strength) + 1)][::-1]
    if steps > len(known):
        raise BadInput(f"a sampling of {len(known)} original steps has no {steps} steps: use {len(known)} or fewer")
    return [known[k * len(known) // steps] for k in range(steps)]


def clip_x0(x0: Tensor, clip: float | None, ratio: float | None, maximum: float) -> Tensor:
    """Clip x0, or threshold it dynamically: to [-s, s], divided by s, a quantile of |x0| of each sample.

    Args:
        x0: (B, *S).
        clip: the bound; None: x0 is unchanged.
        ratio: of the quantile; None: no dynamic thresholding.
        maximum: of s, which is at least 1.

    References:
        Saharia et al. 2022, arXiv:2205.11487.
    """
    if ratio is not None:
        s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, max(maximum, 1.0))
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s
    return x0 if clip is None else x0.clamp(-clip, clip)


class StepAlphas:
    """`alphas` of a table: one per training step, as a tensor; and between fractional times, by slicing.

    `prod(alphas[s:t])` is the factor of the image's variance from time s to time t (Text2Video-Zero).

    Args:
        table: alphas_cumprod.
        schedule: the same, at fractional times.
    """

    def __init__(self, table: Tensor, schedule: Any) -> None:
        self.table, self.schedule = table, schedule

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, slice) and key.start is not None and key.stop is not None and key.step is None:
            size = len(self.table)
            s, t = ((torch.as_tensor(float(end), dtype=torch.float64) + 1) / size for end in (key.start, key.stop))
            return ((self.schedule.alpha(t) / self.schedule.alpha(s)) ** 2).float().reshape(1)
        return self.alphas[key]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def alphas(self) -> Tensor:
        """One per training step, float32."""
        return torch.cat([self.table[:1], self.table[1:] / self.table[:-1]])


def index_of_timestep(timestep: Any, timesteps: Tensor, values: Tensor, expected: int | None = None) -> int:
    """The index of a timestep: from its memory location, since some values occur twice; else from its value.

    Among equal values: `expected`, else index 0, else the last (as in diffusers).

    Args:
        timestep: a number, () or (B,).
        timesteps: (n,).
        values: the timesteps, float64 on the CPU.
        expected: the next index.

    Raises:
        BadInput: for a timestep that is not among them.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() > 1:  # one per sample
            if bool((timestep != timestep.flatten()[0]).any()):
                raise BadInput("hasten's scheduler steps all samples at one timestep, found several")
        elif same_memory(timestep, timesteps):
            return int(timestep.storage_offset() - timesteps.storage_offset())
        timestep = timestep.flatten()[0]
    at = float(timestep)
    distance = (values - at).abs()
    minimum = float(distance.min())
    if not minimum <= max(0.51, 0.004 * abs(at)):  # the rounding of integers and bfloat16
        texts = [f"{value:g}" for value in values.tolist()]
        shown = ", ".join(texts if len(texts) < 7 else [*texts[:3], "...", *texts[-2:]])
        raise BadInput(f"step: the timestep {at:g} is none of this sampling: {shown}")
    indices = (distance == minimum).nonzero().flatten().tolist()
    if expected is not None and expected in indices:
        return expected
    return 0 if 0 in indices else int(indices[-1])


def same_memory(entry: Tensor, table: Tensor) -> bool:
    """Whether a tensor of one number is a view of an entry of another."""
    try:
        return entry.untyped_storage().data_ptr() == table.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # tensors without a storage of their own
        return False
