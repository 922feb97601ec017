"""What pipelines of `diffusers` give their schedulers beside steps and samples: taken, or refused by name."""

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
    "StepAlphas", "check_neutral", "check_count", "clip_x0", "lcm_timesteps", "float_tensor", "check_index", "index_of_timestep",
    "times_of_sigmas",
]  # fmt: skip

# values with which an argument asks for nothing: pipelines pass these by default
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "eta": (0,), "use_clipped_model_output": (False,), "s_churn": (0,), "s_tmin": (0,), "s_tmax": (math.inf,),
    "s_noise": (1,), "strength": (1,),
}  # fmt: skip
INSTEAD = {
    "eta": "the noise is the sampler's: hasten.as_scheduler('ddim:eta=1', ...)",
    "s_churn": "the noise is the sampler's: hasten.as_scheduler('heun:churn=10', ...)",
    "per_token_timesteps": "it steps all of a sample at one time",
    "variance_noise": "it draws its noise from generator=",
}  # fmt: skip


def check_neutral(method: str, sampler: Any, given: dict[str, Any]) -> None:
    """Refuse arguments of other schedulers that ask for something. None and the usual defaults do not.

    Raises BadInput that names the first such argument.
    """
    for name, value in given.items():
        number = isinstance(value, (bool, int, float))
        if value is None or number and value in NEUTRAL.get(name, ()):
            continue
        if name == "eta" and number and value == getattr(sampler, "eta", None):
            continue
        instead = INSTEAD.get(name, "use the pipeline with its own scheduler, or leave it out")
        raise BadInput(f"{method}({name}={short_repr(value)}) is not known to hasten's scheduler: {instead}")


def short_repr(value: Any) -> str:
    text = repr(value) if not isinstance(value, Tensor) else f"a tensor {tuple(value.shape)}"
    return text if len(text) < 40 else f"{text[:36]} ..."


def check_count(name: str, value: Any) -> int:
    """A whole number of at least 1; numpy's are taken."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or count < 1:
        raise BadInput(f"{name} must be a whole number of at least 1, got {value!r}")
    return count


def check_index(name: str, value: Any, count: int) -> int:
    """A place among `count`, from 0."""
    try:
        k = operator.index(value)
    except TypeError:
        k = -1
    if isinstance(value, bool) or not 0 <= k < count:
        raise BadInput(f"{name} takes a place among {count} timesteps, 0 to {count - 1}, got {value!r}")
    return k


def float_tensor(name: str, values: Any) -> Tensor:
    """Several numbers, (n,) float64."""
    if not isinstance(values, (Tensor, Iterable)):
        raise BadInput(f"{name} must be several numbers, got {values!r}")
    try:
        found = values.detach().cpu() if isinstance(values, Tensor) else torch.tensor([float(v) for v in values])
        found = found.double().flatten()
    except (TypeError, ValueError) as error:
        raise BadInput(f"{name} must be several numbers, got {short_repr(values)}") from error
    if not len(found) or not bool(torch.isfinite(found).all()) or bool((found[1:] >= found[:-1]).any()):
        raise BadInput(f"{name} must be one or more finite numbers that fall, got {short_repr(values)}")
    return found


def times_of_sigmas(schedule: Schedule, sigmas: Any) -> Tensor:
    """Times (n + 1,), float64, of noise levels as `diffusers` has them.

    Of a flow: sigma in [0, 1] before the shift, with or without the last 0. Of a table: sigma / alpha, with the level
    where the sampling ends.
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
    """Timesteps of latent consistency sampling: `steps` of the `original` ones that the network was distilled on.

    Luo et al. 2023, arXiv:2310.04378. Raises BadInput where there are not as many.
    """
    original = check_count("original_inference_steps", original)
    if original > total:
        raise BadInput(f"original_inference_steps is at most {total}, the steps of training, got {original}")
    if not 0 < strength <= 1:
        raise BadInput(f"strength must lie in (0, 1], got {strength}")
    known = [k * (total // original) - 1 for k in range(1, int(original * strength) + 1)][::-1]
    if steps > len(known):
        raise BadInput(f"a sampling of {len(known)} original steps has no {steps} steps: ask for {len(known)} or fewer")
    return [known[k * len(known) // steps] for k in range(steps)]


def clip_x0(x0: Tensor, clip: float | None, ratio: float | None, most: float) -> Tensor:
    """x0 (B, *S) in [-clip, clip], or by dynamic thresholding: in [-s, s] divided by s, where s is a quantile of |x0|
    of each sample, at least 1 and at most `most`. Saharia et al. 2022, arXiv:2205.11487."""
    if ratio is not None:
        s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, max(most, 1.0))
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s
    return x0 if clip is None else x0.clamp(-clip, clip)


class StepAlphas:
    """`alphas` of a table: one for each training step, as a tensor; and between fractional times, by slicing.

    `prod(alphas[s:t])` is what the image's variance is multiplied by from time s to time t (Text2Video-Zero).
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
        """One for each training step, float32."""
        return torch.cat([self.table[:1], self.table[1:] / self.table[:-1]])


def index_of_timestep(timestep: Any, timesteps: Tensor, values: Tensor, expected: int | None = None) -> int:
    """Which of `timesteps` this is: by where it lies in memory, for some are there twice; else by its value.

    Among several that are equal: `expected`, else the first of all, else the last (as in diffusers).

    Args:
        values: the timesteps again, float64 on the CPU.

    Raises BadInput for a timestep that is not among them.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() > 1:  # one for each sample
            if bool((timestep != timestep.flatten()[0]).any()):
                raise BadInput("hasten's scheduler steps all samples at one timestep, found several")
        elif same_memory(timestep, timesteps):
            return int(timestep.storage_offset() - timesteps.storage_offset())
        timestep = timestep.flatten()[0]
    at = float(timestep)
    distance = (values - at).abs()
    least = float(distance.min())
    if not least <= max(0.51, 0.004 * abs(at)):  # whole numbers and bfloat16 are rounded as much
        texts = [f"{value:g}" for value in values.tolist()]
        shown = ", ".join(texts if len(texts) < 7 else [*texts[:3], "...", *texts[-2:]])
        raise BadInput(f"step was asked for timestep {at:g}, which is none of this sampling: {shown}")
    found = (distance == least).nonzero().flatten().tolist()
    if expected is not None and expected in found:
        return expected
    return 0 if 0 in found else int(found[-1])


def same_memory(part: Tensor, whole: Tensor) -> bool:
    """Whether a tensor of one number is a view of an entry of another."""
    try:
        return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # tensors without a storage of their own
        return False
