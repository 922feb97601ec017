"""`PlanScheduler`: a sampler or plan of hasten as a scheduler of `diffusers`.

The class is made when it is first asked for, since it inherits from `diffusers`, which this module does not import.
Pipelines that are saved name it as `hasten.PlanScheduler`: diffusers opens them where hasten has been imported.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import BadInput
from ...pick import pick
from ...plan.table import Plan
from ...schedules.continuous import Flow
from ...schedules.serialize import schedule_from_dict
from . import arguments
from .plans import Trajectory, check_plan, coefficients, compiled_plan, plan_from_evaluation, plan_rows_from, time_grid
from .schedules import PREDICTIONS, SchedulerSpec, schedules_agree, shift_of

if TYPE_CHECKING:
    PlanScheduler: Any

MAX_STEPS = 10_000
COMPATIBLE = [
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "LCMScheduler",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "PlanScheduler":
        return scheduler_class()
    if name == "SchedulerMixin":  # diffusers looks here for the base that says how a part of a pipeline is loaded
        return scheduler_class().__mro__[1]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def scheduler_class() -> type:
    """The class itself. Raises BadInput where `diffusers` is not there."""
    from .library import diffusers

    library = diffusers()
    from diffusers.configuration_utils import register_to_config
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor

    @dataclass
    class PlanSchedulerOutput(BaseOutput):
        """What `step` gives: the next state, x0, and what a latent consistency pipeline decodes in the end."""

        prev_sample: Tensor
        pred_original_sample: Tensor
        denoised: Tensor

    class PlanScheduler(library.SchedulerMixin, library.ConfigMixin):  # type: ignore[name-defined, misc]
        """A scheduler of `diffusers` that runs any linear sampler or plan of hasten; see `hasten.as_scheduler`.

        Args:
            num_train_timesteps ... rescale_betas_zero_snr: the table, as for the schedulers of `diffusers`.
            prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
            shift, use_flow_sigmas, flow_shift: of a flow, which has no table.
            use_dynamic_shifting, time_shift_type, base_shift ... max_image_seq_len: of a flow whose shift depends on
                the size of the image: pipelines give it to `set_timesteps` as `mu`, made of these.
            sampler, times: as hasten spells them, such as "unipc" and "angle".
            plan: a plan as JSON, in place of both; the number of steps is then its own.
            plan_schedule: the schedule, as JSON would have it, where it is neither of the above.
            clip: x0 is held to [-clip, clip]; None: not.
            thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0, in place of `clip`.
            variance_type: for pipelines that ask; variances that a network predicts are not used.
            original_inference_steps: of a latent consistency model, for pipelines that ask.
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
            flow = shift is not None or use_flow_sigmas
            if plan_schedule is not None:
                schedule = schedule_from_dict(dict(plan_schedule))
                flow = isinstance(schedule, Flow)
            elif flow:
                schedule = Flow(shift_of(self.config))
            else:
                schedule = self._table(library)
            told = "flow_prediction" if prediction_type is None and flow else prediction_type or "epsilon"
            if told not in PREDICTIONS:
                raise BadInput(f"unknown prediction_type {told!r} (choices: {', '.join(PREDICTIONS)})")
            self.hasten_schedule = schedule
            self.reading = SchedulerSpec(schedule, PREDICTIONS[told], num_train_timesteps)
            self.plan = None if plan is None else check_plan(Plan.from_json(plan))
            if self.plan is not None and not (flow and use_dynamic_shifting):  # whose shift is checked when it is known
                self.plan.check_schedule(schedule)
            self.sampler = pick("samplers", sampler)
            if self.plan is None and not self.sampler.linear:
                raise BadInput(f"{sampler} cannot run inside a pipeline, which steps at times fixed in advance")
            self.order = 1 if self.plan is not None else max(1, self._queries(4) - self._queries(3))
            self.num_inference_steps: int | None = None
            self.grid = self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
            self._asked_at: Tensor = self.timesteps.double()  # the same on the CPU
            self._begin_index: int | None = None
            self._run: Trajectory | None = None
            self._first = 1.0

        def _table(self, library: Any) -> Any:
            """The table that the same arguments give elsewhere, in its float32."""
            from ...schedules.discrete import Discrete

            keys = (
                "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
                "rescale_betas_zero_snr",
            )  # fmt: skip
            same = library.DDPMScheduler(**{key: self.config[key] for key in keys})
            return Discrete(tuple(same.alphas_cumprod.double().tolist()), convention="log_q")

        def _queries(self, steps: int) -> int:
            return int(self.sampler.nfe(steps) or 0)

        def __len__(self) -> int:
            return int(self.config.num_train_timesteps)

        @property
        def alphas_cumprod(self) -> Tensor:
            """The table, float32."""
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
            """Of a flow: the noise levels of the queries and of the end, (queries + 1,)."""
            if not self.reading.flow:
                raise AttributeError("the sigmas of a table are not those of a network here: see hasten_schedule")
            return torch.cat([self.timesteps / self.config.num_train_timesteps, self.timesteps.new_zeros(1)])

        @property
        def init_noise_sigma(self) -> float:
            """What the starting noise is multiplied by."""
            return self._first

        @property
        def begin_index(self) -> int | None:
            """Where the timesteps of this sampling begin."""
            return self._begin_index

        @property
        def step_index(self) -> int | None:
            """The next query, counted in `timesteps`; None before the first."""
            return None if self._run is None else (self._begin_index or 0) + self._run.next

        def set_begin_index(self, begin_index: int = 0) -> None:
            """Begin at a later timestep, as image to image does."""
            if begin_index is not None:
                begin_index = arguments.check_index("set_begin_index", begin_index, len(self.timesteps))
            self._begin_index = begin_index
            self._run = None

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
                sigmas: noise levels: of a flow in [0, 1] before the shift; of a table sigma / alpha, with the end.
                    Some pipelines give them by default; they come before `times`.
                mu: log of a flow's shift, where that depends on the size of the image; else not used.
                original_inference_steps, strength: of a latent consistency model: its own timesteps of so many.
            """
            arguments.check_neutral("set_timesteps", self.sampler, more)
            given = [value for value in (timesteps, sigmas) if value is not None]
            if len(given) > 1 or (num_inference_steps is None and not given):
                raise BadInput("set_timesteps needs num_inference_steps, timesteps or sigmas, one of them")
            if num_inference_steps is not None:
                num_inference_steps = arguments.check_count("num_inference_steps", num_inference_steps)
                if num_inference_steps > MAX_STEPS:
                    raise BadInput(f"num_inference_steps is at most {MAX_STEPS}, got {num_inference_steps}")
                if given and len(given[0]) != num_inference_steps:
                    name = "timesteps" if sigmas is None else "sigmas"
                    raise BadInput(f"set_timesteps: {num_inference_steps} steps and {len(given[0])} {name}: give one")
            self._shift(mu)
            if num_inference_steps and not given and (original_inference_steps, strength) != (None, None):
                original = original_inference_steps or self.config.original_inference_steps
                total, part = self.config.num_train_timesteps, 1.0 if strength is None else strength
                timesteps = arguments.lcm_timesteps(num_inference_steps, total, original, part)
            own = None
            if timesteps is not None:
                values = arguments.float_tensor("timesteps", timesteps)
                if float(values[0]) > self.config.num_train_timesteps or float(values[-1]) < 0:
                    most = self.config.num_train_timesteps
                    raise BadInput(f"timesteps lie in 0 to {most}, got {arguments.short_repr(timesteps)}")
                own = self.reading.time(values)
                own = torch.cat([own, own.new_zeros(1)])
            elif sigmas is not None:
                own = arguments.times_of_sigmas(self.hasten_schedule, sigmas)
                warnings.warn(
                    f"this pipeline gives its own sigmas: they are used in place of times={self.config.times!r}",
                    stacklevel=2,
                )
            if self.plan is not None:
                asked = "other timesteps" if own is not None else f"{num_inference_steps} steps"
                if own is not None or num_inference_steps != self.plan.nfe:
                    raise BadInput(f"the plan of this scheduler has {self.plan.nfe} steps, asked for {asked}")
                self._whole, steps = self.plan, self.plan.nfe
            else:
                if own is None:
                    own = time_grid(self.config.times, self.hasten_schedule, num_inference_steps)
                self.grid, steps = own, len(own) - 1
                self._whole = compiled_plan(self.config.sampler, self.hasten_schedule, tuple(own.tolist()))
            self.num_inference_steps = num_inference_steps or steps
            asked_at = self.reading.timestep(self._whole.times[:-1]).to(torch.float32)
            self.timesteps, self._asked_at = asked_at.to(device), asked_at.double()
            begin = self._whole.times[0] if self._whole.begin is None else self._whole.begin
            self._first = float(self.hasten_schedule.prior_std(begin) * self._whole.start[0])
            self._begin_index, self._run = None, None

        def _shift(self, mu: float | None) -> None:
            """The schedule of a flow whose shift depends on the size of the image."""
            if not self.config.use_dynamic_shifting:
                if mu is not None and not self.reading.flow:
                    raise BadInput(f"set_timesteps(mu={mu}) is for flows, and this scheduler has a table: leave it out")
                return  # as the schedulers of diffusers: a flow of a constant shift does not use mu
            if mu is None:
                mu = float(self.config.base_shift or 0.0)
                warnings.warn(
                    "use_dynamic_shifting: the shift depends on the size of the image, and set_timesteps was not "
                    f"given mu: mu={mu:g} is used, the smallest",
                    stacklevel=3,
                )
            self.hasten_schedule = Flow(shift_of(self.config, mu))
            self.reading = replace(self.reading, schedule=self.hasten_schedule)
            plan = self.plan if self.plan is not None and self.plan.schedule else None
            if plan and not schedules_agree(schedule_from_dict(plan.schedule), self.hasten_schedule, plan.times):
                raise BadInput(
                    f"the plan was made for another shift than {shift_of(self.config, mu):.4g} of this size of image"
                )

        def _begin(self, first: int) -> Trajectory:
            """A new trajectory from query number `first`: a multistep sampler has no history there."""
            if first == 0:
                plan = self._whole
            elif self.plan is not None:
                plan = plan_rows_from(self.plan, first)
            else:
                plan = plan_from_evaluation(self.config.sampler, self.hasten_schedule, tuple(self.grid.tolist()), first)
            return Trajectory(plan, coefficients(plan, self.hasten_schedule, self.reading.prediction))

        def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
            """The sample itself: the state has the scale that the network wants."""
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
            """The next state, as `prev_sample`, and x0 as `pred_original_sample`; `denoised` is x0, at the last query
            the result.

            A timestep that is not the next one of the sampling begins a new one there, without history.

            Args:
                model_output: (B, C, ...) or, with variances that are not used, (B, 2 C, ...).
                generator: one, or a list with one for each sample; samplers without noise use none.
                eta, use_clipped_model_output: refused unless they ask for nothing; noise is an option of the sampler.
            """
            if self.num_inference_steps is None:
                raise BadInput("call set_timesteps before step")
            more |= {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
            arguments.check_neutral("step", self.sampler, more)
            run, expected = self._run, self._begin_index
            if run is not None:
                if run.next >= run.plan.nfe:
                    raise BadInput(
                        f"this sampling has {run.plan.nfe} queries and all are done: call set_timesteps again"
                    )
                expected = (self._begin_index or 0) + run.next
            place = arguments.index_of_timestep(timestep, self.timesteps, self._asked_at, expected)
            if run is None or place != expected:
                run = self._run = self._begin(place)
                self._begin_index = place
            x, raw = sample.float(), model_output.to(sample.device, torch.float32)
            if raw.shape != x.shape:
                if raw.ndim != x.ndim or raw.shape[1] != 2 * x.shape[1]:
                    raise BadInput(f"step: the network gave {tuple(raw.shape)} for a sample {tuple(x.shape)}")
                raw = raw[:, : x.shape[1]]  # the rest are variances
            skip, scale = run.numbers[run.next]
            x0 = torch.add(x * skip, raw, alpha=scale)
            ratio = self.config.dynamic_thresholding_ratio if self.config.thresholding else None
            x0 = arguments.clip_x0(x0, self.config.clip, ratio, self.config.sample_max_value)

            def noise() -> Tensor:
                return randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)

            made = run.step(x, x0, noise).to(model_output.dtype)
            x0 = x0.to(model_output.dtype)
            if not return_dict:
                return made, made if run.next == run.plan.nfe else x0
            return PlanSchedulerOutput(made, x0, made if run.next == run.plan.nfe else x0)

        def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            """alpha x + sigma noise at the timesteps, (B,) or ()."""
            t = self.reading.time(torch.as_tensor(timesteps).flatten())
            shape = (-1, *[1] * (original_samples.ndim - 1))
            alpha, sigma = (  # narrowed before they move: not every device has float64
                f(t).to(original_samples.dtype).to(original_samples.device).reshape(shape)
                for f in (self.hasten_schedule.alpha, self.hasten_schedule.sigma)
            )
            return alpha * original_samples + sigma * noise

        def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            """v = alpha noise - sigma x at the timesteps, (B,) or ()."""
            return self.add_noise(noise, -sample, timesteps)

        def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
            """The same under the name and the order that pipelines of flows use."""
            return self.add_noise(sample, noise, timestep)

    # diffusers imports no library that a folder names: it must be one that a user has imported, `import hasten`
    PlanScheduler.__module__, PlanScheduler.__qualname__ = __name__.partition(".")[0], "PlanScheduler"
    return PlanScheduler
