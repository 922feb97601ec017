"""Arguments of schedulers of `diffusers` beside steps and samples: used, or refused by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from .timeline import index_in_table

__all__ = [
    "StepAlphas",
    "check_count",
    "check_index",
    "check_neutral",
    "clip_x0",
    "float_tensor",
    "index_of_timestep",
    "is_next",
    "lcm_timesteps",
    "per_token_mask",
    "requested_steps",
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
        BadInput: for none of the three, numbers that differ, and a bad number.
    """
    grids = {"timesteps": timesteps, "sigmas": sigmas}
    grids = {name: value for name, value in grids.items() if value is not None}
    if steps is None and not grids:
        raise BadInput("set_timesteps needs num_inference_steps, timesteps or sigmas, at least one of them")
    if steps is None:
        return None
    steps = check_count("num_inference_steps", steps)
    if steps > MAX_STEPS:
        raise BadInput(f"num_inference_steps is at most {MAX_STEPS}, got {steps}")
    for name, value in grids.items():
        found = len(value) if hasattr(value, "__len__") else steps
        if found - steps not in ((0, 1) if name == "sigmas" else (0,)):  # sigmas may name the end
            raise BadInput(f"set_timesteps: {steps} steps and {found} {name}: pass one")
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


def float_tensor(name: str, values: Any, ordered: bool = True) -> Tensor:
    """Numbers as a tensor (n,), float64.

    Args:
        name: for the message.
        values: of the caller.
        ordered: they must decrease.

    Raises:
        BadInput: for anything else.
    """
    if not isinstance(values, (Tensor, Iterable)):
        raise BadInput(f"{name} must be several numbers, got {values!r}")
    try:
        numbers = (
            values.detach().cpu()
            if isinstance(values, Tensor)
            else torch.tensor([float(v) for v in values], dtype=torch.float64)
        )
        numbers = numbers.double().flatten()
    except (TypeError, ValueError) as error:
        raise BadInput(f"{name} must be several numbers, got {short_repr(values)}") from error
    rises = ordered and bool((numbers[1:] >= numbers[:-1]).any())
    if not len(numbers) or not bool(torch.isfinite(numbers).all()) or rises:
        raise BadInput(f"{name} must be one or more finite decreasing numbers, got {short_repr(values)}")
    return numbers


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


def per_token_mask(timesteps: Tensor, current: float, x: Tensor) -> Tensor:
    """Where the tokens of a sample are at the current timestep; the others are clean and stay as they are.

    Args:
        timesteps: (B, N), one per token.
        current: the timestep of this evaluation.
        x: (B, N, C).

    Returns:
        (B, N, 1), bool.

    Raises:
        BadInput: for tokens at other timesteps than this and 0, and another shape.
    """
    if x.ndim != 3 or timesteps.shape != x.shape[:2]:
        shapes = f"{tuple(timesteps.shape)} for a sample {tuple(x.shape)}"
        raise BadInput(f"step(per_token_timesteps=) takes (B, N) for a sample (B, N, C), got {shapes}")
    now = (timesteps - current).abs() <= max(0.51, 0.004 * abs(current))
    if bool((~now & (timesteps > 0)).any()):
        raise BadInput(
            f"step(per_token_timesteps=): tokens are at {current:g} or at 0 here, found some between: condition with "
            "strength 1, or use the pipeline with its own scheduler"
        )
    return (now & (timesteps > 0))[..., None].to(x.device)


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
        if (index := index_in_table(timestep, timesteps)) is not None:  # without waiting for the device
            return index
        if timestep.numel() > 1 and bool((timestep != timestep.flatten()[0]).any()):  # one per sample
            raise BadInput("hasten's scheduler steps all samples at one timestep, found several")
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


def is_next(timestep: Any, values: Tensor, index: int) -> bool:
    """Whether a timestep is the one after `index` among `values`, up to rounding."""
    return index + 1 < len(values) and abs(float(timestep) - float(values[index + 1])) <= 0.51
