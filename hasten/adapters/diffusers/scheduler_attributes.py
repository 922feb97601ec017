"""What pipelines read of a scheduler of `diffusers` beside its steps: tables, noise levels, and noising."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ...errors import BadInput
from ...plan.table import Plan
from ...schedules.base import Schedule
from . import arguments
from .given_times import TimestepMap
from .schedules import SchedulerSpec, to_float64

__all__ = ["MissingAttribute", "PlanSchedulerOutput", "SchedulerAttributes"]

# Attributes of other schedulers that some pipelines read, and what they are.
OF_OTHERS = {
    "alphas_cumprod": "a table, and this scheduler is a flow",
    "sigmas": "of a table here, whose noise levels are in hasten_schedule",
    "model_outputs": "the history of a multistep scheduler",
    "last_sample": "the history of a multistep scheduler",
    "_step_index": "the counter of another scheduler",
    "_get_variance": "the variances of DDPM",
    "_get_conditioning_c_in": "the input scaling of EDM",
    "step_correct": "a corrector step",
    "step_pred": "a predictor step",
    "set_sigmas": "the noise levels of a score SDE",
    "add_noise_to_input": "the churn of Karras VE",
    "undo_step": "the resampling of RePaint",
    "schedule": "the noise levels of Karras VE",
}


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """The output of `PlanScheduler.step`.

    Attributes:
        prev_sample: the next state.
        pred_original_sample: x0.
        denoised: x0, at the last evaluation the result, which latent consistency pipelines decode.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor
    denoised: Tensor


class MissingAttribute(BadInput, AttributeError):
    """An attribute of another scheduler: `hasattr` is False, and the message names the reason."""


class SchedulerAttributes:
    """Attributes and methods that a `PlanScheduler` shares with the schedulers that it replaces."""

    config: Any
    hasten_schedule: Schedule
    spec: SchedulerSpec
    timesteps: Tensor
    _full_plan: Plan | None
    _timestep_map: TimestepMap | None

    def __getattr__(self, name: str) -> Any:
        if name in OF_OTHERS:
            raise MissingAttribute(
                f"hasten's scheduler has no {name} ({OF_OTHERS[name]}), which this pipeline reads: use the pipeline "
                "with its own scheduler"
            )
        return super().__getattr__(name)  # type: ignore[misc]  # that of diffusers' ConfigMixin

    @property
    def alphas_cumprod(self) -> Tensor:
        """The table (num_train_timesteps,), float32."""
        table = getattr(self.hasten_schedule, "alphas_cumprod", None)
        if table is None:
            raise AttributeError("a flow has no alphas_cumprod")
        return torch.tensor(table, dtype=torch.float32)

    @property
    def alphas(self) -> Any:
        """alphas_cumprod of a training step over that of the one before; fractional times may be sliced."""
        return arguments.StepAlphas(self.alphas_cumprod, self.hasten_schedule)

    @property
    def betas(self) -> Tensor:
        """1 - alphas, (num_train_timesteps,)."""
        return 1 - self.alphas.alphas

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """alphas_cumprod where the sampling ends: of the clean image."""
        return torch.ones(())

    @property
    def sigmas(self) -> Tensor:
        """Of a flow: the noise levels of the evaluations and of the end, (evaluations + 1,), float32."""
        if not self.spec.flow:
            raise AttributeError("the sigmas of a table are not those of a network here: see hasten_schedule")
        if self._full_plan is None:
            times = torch.cat([self.spec.time(self.timesteps), torch.zeros(1, dtype=torch.float64)])
        else:
            times = self._full_plan.times
        return self.spec.level(times).to(torch.float32).to(self.timesteps.device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise at the timesteps, (B,) or ()."""
        own = to_float64(timesteps).flatten()
        t = self.spec.time(own) if self._timestep_map is None else self._timestep_map.time(own)
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (  # cast before they move: not every device has float64
            f(t).to(original_samples.dtype).to(original_samples.device).reshape(shape)
            for f in (self.hasten_schedule.alpha, self.hasten_schedule.sigma)
        )
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha noise - sigma x at the timesteps, (B,) or ()."""
        return self.add_noise(noise, -sample, timesteps)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and with the order of arguments of flow pipelines."""
        return self.add_noise(sample, noise, timestep)
