"""`PlanScheduler`: a sampler or plan of hasten as a scheduler of `diffusers`.

This module imports diffusers; import it through `scheduler_class.plan_scheduler`.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ...errors import BadInput, check_choice
from ...pick import pick
from ...plan.table import Plan
from ...schedules.base import Schedule
from ...schedules.continuous import Flow
from ...schedules.discrete import Discrete
from ...schedules.serialize import schedule_from_dict
from . import arguments, given_times
from .plans import Trajectory, check_plan, coefficients, compiled_plan, plan_from_evaluation, plan_rows_from, time_grid
from .scheduler_attributes import PlanSchedulerOutput, SchedulerAttributes
from .schedules import PREDICTIONS, SchedulerSpec, schedules_agree, shift_of, times_like

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


class PlanScheduler(SchedulerAttributes, diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """A scheduler of `diffusers` that runs any linear sampler or plan of hasten; see `hasten.as_scheduler`.

    Args:
        num_train_timesteps: of the table, as for the schedulers of `diffusers`; so are the next five.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the table.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        shift, use_flow_sigmas, flow_shift: of a flow, which has no table.
        use_dynamic_shifting: the shift of the flow depends on the image size: pipelines compute `mu` and pass it to
            `set_timesteps`.
        time_shift_type, base_shift, max_shift, base_image_seq_len, max_image_seq_len: what `mu` is computed from.
        invert_sigmas: of a flow: the time input is 1 - sigma, and the network predicts data - noise.
        sampler, times: specs such as "unipc" and "angle"; times "like" are those of the scheduler that is replaced.
        plan: a plan as JSON, in place of both; the number of steps is then its own.
        plan_schedule: the schedule as a dict, where it is neither of the above.
        clip: x0 is clipped to [-clip, clip]; None: not.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0, in place of `clip`.
        variance_type: read by some pipelines; variances that a network predicts are not used.
        original_inference_steps: of a latent consistency model, read by some pipelines.
        stochastic_sampling: of the scheduler that is replaced, read by some pipelines; the noise is the sampler's.
        original: the config of the scheduler that is replaced, which says what sigmas of a pipeline mean.
        override_sigmas: of sigmas of a pipeline use only the number.

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
        invert_sigmas: bool = False,
        stochastic_sampling: bool = False,
        original: dict[str, Any] | None = None,
        override_sigmas: bool = False,
    ) -> None:
        schedule = self._schedule(shift is not None or use_flow_sigmas)
        flow = isinstance(schedule, Flow)
        default = "flow_prediction" if flow else "epsilon"
        name = check_choice("prediction_type", prediction_type or default, PREDICTIONS)
        self.hasten_schedule: Schedule = schedule
        self.spec = SchedulerSpec(schedule, PREDICTIONS[name], num_train_timesteps, flow and invert_sigmas)
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
        self._full_plan: Plan | None = None
        self._timestep_map: given_times.TimestepMap | None = None
        self._original = given_times.make_original(original)
        if times == "like" and plan is None and self._original is None:
            raise BadInput("times='like' takes those of a scheduler of diffusers: pass as_scheduler(..., like=pipe)")

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **more: Any) -> Any:
        """As for every scheduler of `diffusers`; the config of another one is kept as that of the replaced one."""
        if "sampler" not in (config or {}):
            more.setdefault("original", given_times.original_config(config))
        return super().from_config(config, return_unused_kwargs, **more)

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
            timesteps: decreasing, in 0 to num_train_timesteps, in place of the grid. Beside `sigmas` they are what the
                network gets as its time.
            sigmas: noise levels: of a flow in [0, 1] before the shift; of a table sigma / alpha, with the end. They
                override `times`, with a warning, unless `override_sigmas`, or they are the usual default of pipelines,
                such as linspace(1, 1 / n, n): then they say the number of steps only.
            mu: log of a flow's shift, where that depends on the image size; else not used.
            original_inference_steps: of a latent consistency model: use its own timesteps, of so many.
            strength: of image to image with a latent consistency model, in (0, 1].
            more: arguments of other schedulers, see `arguments.check_neutral`.

        Raises:
            BadInput: for arguments that contradict each other or the plan.
        """
        arguments.check_neutral("set_timesteps", self.sampler, more)
        steps = arguments.requested_steps(num_inference_steps, timesteps, sigmas)
        mu = self._set_shift(mu)
        if (original_inference_steps, strength) != (None, None) and timesteps is None and sigmas is None:
            original = original_inference_steps or self.config.original_inference_steps
            total, fraction = self.config.num_train_timesteps, 1.0 if strength is None else strength
            assert steps is not None
            timesteps = arguments.lcm_timesteps(steps, total, original, fraction)
        own = self._own_times(timesteps, sigmas, mu)
        if own is None and sigmas is not None:
            steps = given_times.steps_of(self.spec, sigmas)
        self._full_plan, self.grid = self._plan_of(steps, own, mu)
        if self.config.stochastic_sampling and not self._full_plan.stochastic:
            warnings.warn(
                "stochastic_sampling: the replaced scheduler adds noise at each step, this sampler does not: that is "
                "the sampler 'consistency'",
                stacklevel=2,
            )
        self.num_inference_steps = num_inference_steps or len(self.grid) - 1
        at = self._full_plan.times[:-1]
        values = self.spec.timestep(at) if self._timestep_map is None else self._timestep_map.timestep(at)
        values = values.to(torch.float32)
        self.timesteps, self._timestep_values = values.to(device), values.double()
        begin = self._full_plan.times[0] if self._full_plan.begin is None else self._full_plan.begin
        self._init_noise_sigma = float(self.hasten_schedule.prior_std(begin) * self._full_plan.start[0])
        self._begin_index, self._trajectory = None, None

    def _plan_of(self, steps: int | None, own: Tensor | None, mu: float | None) -> tuple[Plan, Tensor]:
        """The plan for a number of steps, or for given times (n + 1,), and its grid."""
        if self.plan is not None:
            grid = torch.unique(self.plan.times).flip(0)
            same = own is not None and own.shape == grid.shape and bool(torch.allclose(own, grid, rtol=0, atol=1e-4))
            if not same and (own is not None or steps != self.plan.nfe):
                requested = "other timesteps" if own is not None else f"{steps} steps"
                hint = "" if own is None else "; as_scheduler(..., override_sigmas=True) keeps the plan's times"
                raise BadInput(f"the plan of this scheduler has {self.plan.nfe} steps, requested {requested}{hint}")
            return self.plan, self.plan.times
        if own is None and self.config.times == "like":
            own = times_like(self._original, steps or 1, mu)
        if own is None:
            own = time_grid(self.config.times, self.hasten_schedule, steps or 1)
        return compiled_plan(self.config.sampler, self.hasten_schedule, tuple(own.tolist())), own

    def _own_times(self, timesteps: Any, sigmas: Any, mu: float | None) -> Tensor | None:
        """The times (n + 1,), float64, of timesteps or sigmas of the caller; None where they are those of the config.

        Sets `_timestep_map` where the caller gives both.
        """
        self._timestep_map = None
        values = None if timesteps is None else given_times.check_timesteps(timesteps, self.config.num_train_timesteps)
        if sigmas is None:
            own = None if values is None else self.spec.time(values)
            return own if own is None or float(own[-1]) == 0 else torch.cat([own, own.new_zeros(1)])
        own = given_times.times_of_sigmas(self.spec, sigmas, self._original, mu)
        if values is not None:
            self._timestep_map = given_times.TimestepMap(own, values)
        if self.plan is None and self.config.times == "like":
            return own
        if self.config.override_sigmas or given_times.is_default_sigmas(self.spec, sigmas):
            return None
        if self.plan is None:
            warnings.warn(
                f"this pipeline gives its own sigmas: they are used in place of times={self.config.times!r}; "
                "as_scheduler(..., override_sigmas=True) keeps these",
                stacklevel=3,
            )
        return own

    def _set_shift(self, mu: float | None) -> float | None:
        """Set the schedule of a flow whose shift depends on the image size; the mu that is used, None of another."""
        if not self.config.use_dynamic_shifting:
            if mu is not None and not self.spec.flow:
                raise BadInput(f"set_timesteps(mu={mu}) is for flows, and this scheduler has a table: remove it")
            return None  # as in diffusers: a flow of a constant shift ignores mu
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
        return mu

    def _begin(self, first: int) -> Trajectory:
        """A new trajectory from evaluation `first`: a multistep sampler has no history there."""
        assert self._full_plan is not None
        if first == 0:
            plan = self._full_plan
        elif self.plan is not None:
            plan = plan_rows_from(self.plan, first)
        else:
            times = tuple(self.grid.tolist())
            plan = plan_from_evaluation(self.config.sampler, self.hasten_schedule, times, first)
        numbers = coefficients(plan, self.hasten_schedule, self.spec.prediction)
        sign = -1.0 if self.spec.inverted else 1.0  # such a network predicts data - noise
        return Trajectory(plan, [(skip, sign * scale) for skip, scale in numbers])

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
        per_token_timesteps: Tensor | None = None,
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
            per_token_timesteps: (B, N) of a sample (B, N, C): tokens at 0 stay as they are. As in diffusers, the
                output then has the other sign.
            more: arguments of other schedulers, see `arguments.check_neutral`.

        Raises:
            BadInput: for a timestep that is none of this sampling, and after the last.
        """
        if self.num_inference_steps is None:
            raise BadInput("call set_timesteps before step")
        trajectory = self._trajectory_at(
            timestep, more | {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
        )
        x, raw = sample.float(), model_output.to(sample.device, torch.float32)
        if raw.shape != x.shape:
            if raw.ndim != x.ndim or raw.shape[1] != 2 * x.shape[1]:
                raise BadInput(f"step: the network gave {tuple(raw.shape)} for a sample {tuple(x.shape)}")
            raw = raw[:, : x.shape[1]]  # the rest are variances
        mask = None
        if per_token_timesteps is not None:
            current = float(self._timestep_values[(self._begin_index or 0) + trajectory.next])
            mask, raw = arguments.per_token_mask(per_token_timesteps, current, x), -raw
        skip, scale = trajectory.numbers[trajectory.next]
        x0 = torch.add(x * skip, raw, alpha=scale)
        ratio = self.config.dynamic_thresholding_ratio if self.config.thresholding else None
        x0 = arguments.clip_x0(x0, self.config.clip, ratio, self.config.sample_max_value)

        def noise() -> Tensor:
            return randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)

        state = trajectory.step(x, x0, noise)
        state = (state if mask is None else torch.where(mask, state, x)).to(model_output.dtype)
        x0 = x0.to(model_output.dtype)
        denoised = state if trajectory.next == trajectory.plan.nfe else x0
        return PlanSchedulerOutput(state, x0, denoised) if return_dict else (state, denoised)

    def _trajectory_at(self, timestep: Any, more: dict[str, Any]) -> Trajectory:
        """The trajectory whose next evaluation is at this timestep; other arguments of the step are checked before."""
        following = more.pop("prev_timestep", None)  # of unCLIP: the timestep that follows, which is known here
        arguments.check_neutral("step", self.sampler, more)
        trajectory, expected = self._trajectory, self._begin_index
        if trajectory is not None:
            if trajectory.next >= trajectory.plan.nfe:
                raise BadInput(
                    f"this sampling has {trajectory.plan.nfe} evaluations and all are done: call set_timesteps again"
                )
            expected = (self._begin_index or 0) + trajectory.next
        index = arguments.index_of_timestep(timestep, self.timesteps, self._timestep_values, expected)
        if following is not None and not arguments.is_next(following, self._timestep_values, index):
            arguments.check_neutral("step", self.sampler, {"prev_timestep": following})
        if trajectory is None or index != expected:
            trajectory = self._trajectory = self._begin(index)
            self._begin_index = index
        return trajectory


# diffusers imports no library that a folder names: it must be one that a user has imported, `import hasten`
PlanScheduler.__module__ = __name__.partition(".")[0]
