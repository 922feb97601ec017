"""`PlanScheduler`: a sampler or plan of hasten as a scheduler of `diffusers`.

This module imports diffusers; import it through `scheduler_class.plan_scheduler`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...errors import BadInput, check_choice
from ...pick import pick
from ...plan.table import Plan
from ...schedules.base import Schedule
from ...schedules.continuous import Flow
from ...schedules.discrete import Discrete
from ...schedules.serialize import schedule_from_dict
from . import arguments
from .plans import Trajectory, check_plan, coefficients, compiled_plan, plan_from_evaluation, plan_rows_from, time_grid
from .schedules import PREDICTIONS, SchedulerSpec, schedules_agree, shift_of

__all__ = ["PlanScheduler", "PlanSchedulerOutput"]

TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
COMPATIBLE = [
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler",
]  # fmt: skip


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


class PlanScheduler(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """A scheduler of `diffusers` that runs any linear sampler or plan of hasten; see `hasten.as_scheduler`.

    Args:
        num_train_timesteps: of the table, as for the schedulers of `diffusers`; so are the next five.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the table.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        shift, use_flow_sigmas, flow_shift: of a flow, which has no table.
        use_dynamic_shifting: the shift of the flow depends on the image size: pipelines compute `mu` and pass it to
            `set_timesteps`.
        time_shift_type, base_shift, max_shift, base_image_seq_len, max_image_seq_len: what `mu` is computed from.
        sampler, times: specs such as "unipc" and "angle".
        plan: a plan as JSON, in place of both; the number of steps is then its own.
        plan_schedule: the schedule as a dict, where it is neither of the above.
        clip: x0 is clipped to [-clip, clip]; None: not.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0, in place of `clip`.
        variance_type: read by some pipelines; variances that a network predicts are not used.
        original_inference_steps: of a latent consistency model, read by some pipelines.

    Raises:
        BadInput: for a sampler or plan that a pipeline cannot run.
    """

    _compatibles = COMPATIBLE

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str | None = None,
        shift: float | None = None,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        sampler: str = "unipc",
        times: str = "angle",
        plan: str | None = None,
        plan_schedule: dict[str, Any] | None = None,
        clip: float | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str = "fixed_small",
        original_inference_steps: int = 50,
    ) -> None:
        schedule = self._schedule(shift is not None or use_flow_sigmas)
        flow = isinstance(schedule, Flow)
        default = "flow_prediction" if flow else "epsilon"
        name = check_choice("prediction_type", prediction_type or default, PREDICTIONS)
        self.hasten_schedule: Schedule = schedule
        self.spec = SchedulerSpec(schedule, PREDICTIONS[name], num_train_timesteps)
        self.plan = None if plan is None else check_plan(Plan.from_json(plan))
        if self.plan is not None and not (flow and use_dynamic_shifting):  # whose shift is checked when it is known
            self.plan.check_schedule(schedule)
        self.sampler = pick("samplers", sampler)
        if self.plan is None and not self.sampler.linear:
            raise BadInput(f"{sampler} cannot run inside a pipeline, which steps at times fixed in advance")
        self.order = 1 if self.plan is not None else max(1, self._evaluations(4) - self._evaluations(3))
        self.num_inference_steps: int | None = None
        self.grid = self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
        self._timestep_values: Tensor = self.timesteps.double()  # float64 on the CPU
        self._begin_index: int | None = None
        self._trajectory: Trajectory | None = None
        self._init_noise_sigma = 1.0

    def _schedule(self, flow: bool) -> Schedule:
        """The schedule of the config: a dict, a flow, or a table in the float32 of `diffusers`."""
        if self.config.plan_schedule is not None:
            return schedule_from_dict(dict(self.config.plan_schedule))
        if flow:
            return Flow(shift_of(self.config))
        same = diffusers.DDPMScheduler(**{key: self.config[key] for key in TABLE})
        return Discrete(tuple(same.alphas_cumprod.double().tolist()), convention="log_q")

    def _evaluations(self, steps: int) -> int:
        """The number of model evaluations of so many steps."""
        return int(self.sampler.nfe(steps) or 0)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

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
        """Of a flow: the noise levels of the evaluations and of the end, (evaluations + 1,)."""
        if not self.spec.flow:
            raise AttributeError("the sigmas of a table are not those of a network here: see hasten_schedule")
        return torch.cat([self.timesteps / self.config.num_train_timesteps, self.timesteps.new_zeros(1)])

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the initial noise."""
        return self._init_noise_sigma

    @property
    def begin_index(self) -> int | None:
        """The index in `timesteps` where this sampling begins."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The index in `timesteps` of the next evaluation; None before the first."""
        return None if self._trajectory is None else (self._begin_index or 0) + self._trajectory.next

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at a later timestep, as image to image does."""
        if begin_index is not None:
            begin_index = arguments.check_index("set_begin_index", begin_index, len(self.timesteps))
        self._begin_index = begin_index
        self._trajectory = None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
        strength: float | None = None,
        **more: Any,
    ) -> None:
        """Exactly `num_inference_steps` steps; or the given `timesteps` or `sigmas`, and then the clean image.

        Args:
            num_inference_steps: 1 to 10,000; of a plan its own number.
            device: of `timesteps`.
            timesteps: decreasing, in 0 to num_train_timesteps, in place of the grid.
            sigmas: noise levels: of a flow in [0, 1] before the shift; of a table sigma / alpha, with the end. Some
                pipelines pass them by default; they override `times`.
            mu: log of a flow's shift, where that depends on the image size; else not used.
            original_inference_steps: of a latent consistency model: use its own timesteps, of so many.
            strength: of image to image with a latent consistency model, in (0, 1].
            more: arguments of other schedulers, see `arguments.check_neutral`.

        Raises:
            BadInput: for arguments that contradict each other or the plan.
        """
        arguments.check_neutral("set_timesteps", self.sampler, more)
        num_inference_steps = arguments.requested_steps(num_inference_steps, timesteps, sigmas)
        self._set_shift(mu)
        if (original_inference_steps, strength) != (None, None) and timesteps is None and sigmas is None:
            original = original_inference_steps or self.config.original_inference_steps
            total, fraction = self.config.num_train_timesteps, 1.0 if strength is None else strength
            assert num_inference_steps is not None
            timesteps = arguments.lcm_timesteps(num_inference_steps, total, original, fraction)
        own = self._own_times(timesteps, sigmas)
        if self.plan is not None:
            requested = "other timesteps" if own is not None else f"{num_inference_steps} steps"
            if own is not None or num_inference_steps != self.plan.nfe:
                raise BadInput(f"the plan of this scheduler has {self.plan.nfe} steps, requested {requested}")
            self._full_plan, steps = self.plan, self.plan.nfe
        else:
            if own is None:
                own = time_grid(self.config.times, self.hasten_schedule, num_inference_steps or 1)
            self.grid, steps = own, len(own) - 1
            self._full_plan = compiled_plan(self.config.sampler, self.hasten_schedule, tuple(own.tolist()))
        self.num_inference_steps = num_inference_steps or steps
        values = self.spec.timestep(self._full_plan.times[:-1]).to(torch.float32)
        self.timesteps, self._timestep_values = values.to(device), values.double()
        begin = self._full_plan.times[0] if self._full_plan.begin is None else self._full_plan.begin
        self._init_noise_sigma = float(self.hasten_schedule.prior_std(begin) * self._full_plan.start[0])
        self._begin_index, self._trajectory = None, None

    def _own_times(self, timesteps: Any, sigmas: Any) -> Tensor | None:
        """The times (n + 1,), float64, of timesteps or sigmas of the caller; None without them."""
        if timesteps is not None:
            values = arguments.float_tensor("timesteps", timesteps)
            maximum = self.config.num_train_timesteps
            if float(values[0]) > maximum or float(values[-1]) < 0:
                raise BadInput(f"timesteps lie in 0 to {maximum}, got {arguments.short_repr(timesteps)}")
            own = self.spec.time(values)
            return torch.cat([own, own.new_zeros(1)])
        if sigmas is None:
            return None
        own = arguments.times_of_sigmas(self.hasten_schedule, sigmas)
        warnings.warn(
            f"this pipeline gives its own sigmas: they are used in place of times={self.config.times!r}", stacklevel=3
        )
        return own

    def _set_shift(self, mu: float | None) -> None:
        """Set the schedule of a flow whose shift depends on the image size."""
        if not self.config.use_dynamic_shifting:
            if mu is not None and not self.spec.flow:
                raise BadInput(f"set_timesteps(mu={mu}) is for flows, and this scheduler has a table: remove it")
            return  # as in diffusers: a flow of a constant shift ignores mu
        if mu is None:
            mu = float(self.config.base_shift or 0.0)
            warnings.warn(
                "use_dynamic_shifting: the shift depends on the image size, and set_timesteps was called without mu: "
                f"mu={mu:g} is used, the smallest",
                stacklevel=3,
            )
        self.hasten_schedule = Flow(shift_of(self.config, mu))
        self.spec = replace(self.spec, schedule=self.hasten_schedule)
        plan = self.plan if self.plan is not None and self.plan.schedule else None
        if plan and not schedules_agree(schedule_from_dict(plan.schedule), self.hasten_schedule, plan.times):
            raise BadInput(
                f"the plan was made for another shift than {shift_of(self.config, mu):.4g} of this size of image"
            )

    def _begin(self, first: int) -> Trajectory:
        """A new trajectory from evaluation `first`: a multistep sampler has no history there."""
        if first == 0:
            plan = self._full_plan
        elif self.plan is not None:
            plan = plan_rows_from(self.plan, first)
        else:
            times = tuple(self.grid.tolist())
            plan = plan_from_evaluation(self.config.sampler, self.hasten_schedule, times, first)
        return Trajectory(plan, coefficients(plan, self.hasten_schedule, self.spec.prediction))

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself, which already has the scale of the network's input."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        **more: Any,
    ) -> Any:
        """One step of the sampler.

        A timestep that is not the next one of the sampling begins a new one there, without history.

        Args:
            model_output: (B, C, ...) or, with variances that are not used, (B, 2 C, ...).
            timestep: of this evaluation.
            sample: (B, C, ...).
            generator: one, or a list with one per sample; samplers without noise use none.
            return_dict: return a `PlanSchedulerOutput`, else the tuple (prev_sample, denoised).
            eta: refused unless it has no effect: noise is an option of the sampler.
            use_clipped_model_output: refused unless it has no effect.
            more: arguments of other schedulers, see `arguments.check_neutral`.

        Raises:
            BadInput: for a timestep that is none of this sampling, and after the last.
        """
        if self.num_inference_steps is None:
            raise BadInput("call set_timesteps before step")
        more |= {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
        arguments.check_neutral("step", self.sampler, more)
        trajectory = self._trajectory_at(timestep)
        x, raw = sample.float(), model_output.to(sample.device, torch.float32)
        if raw.shape != x.shape:
            if raw.ndim != x.ndim or raw.shape[1] != 2 * x.shape[1]:
                raise BadInput(f"step: the network gave {tuple(raw.shape)} for a sample {tuple(x.shape)}")
            raw = raw[:, : x.shape[1]]  # the rest are variances
        skip, scale = trajectory.numbers[trajectory.next]
        x0 = torch.add(x * skip, raw, alpha=scale)
        ratio = self.config.dynamic_thresholding_ratio if self.config.thresholding else None
        x0 = arguments.clip_x0(x0, self.config.clip, ratio, self.config.sample_max_value)

        def noise() -> Tensor:
            return randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)

        state = trajectory.step(x, x0, noise).to(model_output.dtype)
        x0 = x0.to(model_output.dtype)
        denoised = state if trajectory.next == trajectory.plan.nfe else x0
        return PlanSchedulerOutput(state, x0, denoised) if return_dict else (state, denoised)

    def _trajectory_at(self, timestep: Any) -> Trajectory:
        """The trajectory whose next evaluation is at this timestep."""
        trajectory, expected = self._trajectory, self._begin_index
        if trajectory is not None:
            if trajectory.next >= trajectory.plan.nfe:
                raise BadInput(
                    f"this sampling has {trajectory.plan.nfe} evaluations and all are done: call set_timesteps again"
                )
            expected = (self._begin_index or 0) + trajectory.next
        index = arguments.index_of_timestep(timestep, self.timesteps, self._timestep_values, expected)
        if trajectory is None or index != expected:
            trajectory = self._trajectory = self._begin(index)
            self._begin_index = index
        return trajectory

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise at the timesteps, (B,) or ()."""
        t = self.spec.time(torch.as_tensor(timesteps).flatten())
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


# diffusers imports no library that a folder names: it must be one that a user has imported, `import hasten`
PlanScheduler.__module__ = __name__.partition(".")[0]
