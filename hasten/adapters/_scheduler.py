"""`PlanScheduler`: a sampler or plan of hasten as a scheduler of `diffusers`.

The class is made when it is first asked for, since it inherits from `diffusers`, which this module does not import.
Pipelines that are saved name it as `hasten.adapters._scheduler.PlanScheduler`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadInput
from ..pick import pick
from ..plan import Plan
from ..plan import plan as compile_plan
from ..predictions import prediction_from
from ..program import Draws, combine
from ..schedules import Flow, schedule_from_dict
from ..times import Explicit
from ._schedules import PREDICTIONS, Reading

if TYPE_CHECKING:
    PlanScheduler: Any

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


class Run:
    """One trajectory: the plan, which query comes next, and the history that later rows need."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.program = plan._numbers
        self.next = 0
        self.states: dict[int, Tensor] = {}
        self.answers: dict[int, Tensor] = {}
        self.draws: Any = None
        self.noise: Any = None

    def step(self, x: Tensor, x0: Tensor, noise: Any) -> Tensor:
        """x_{k+1} from x_k and the answer at it."""
        row, k = self.program.rows[self.next], self.next
        self.noise = noise  # of this very call: pipelines hand over their generators at each
        self.draws = self.draws or Draws(lambda: self.noise())
        self.states[k], self.answers[k] = x, x0
        made = combine(row, self.states, self.answers, self.draws)
        for j in row.last_states:
            del self.states[j]
        for j in row.last_answers:
            del self.answers[j]
        self.next += 1
        return made


@cache
def scheduler_class() -> type:
    """The class itself. Raises BadInput where `diffusers` is not there."""
    from ._optional import diffusers

    library = diffusers()
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor

    class PlanScheduler(library.SchedulerMixin, library.ConfigMixin):  # type: ignore[name-defined, misc]
        """A scheduler of `diffusers` that runs any linear sampler or plan of hasten; see `hasten.as_scheduler`.

        Args:
            num_train_timesteps ... rescale_betas_zero_snr: the table, as for the schedulers of `diffusers`.
            prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
            shift, use_flow_sigmas, flow_shift: of a flow, which has no table.
            sampler, times: as hasten spells them, such as "unipc" and "angle".
            plan: a plan as JSON, in place of both; the number of steps is then its own.
            plan_schedule: the schedule, as JSON would have it, where it is neither of the above.
            clip: x0 is held to [-clip, clip]; None: not.
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
        ) -> None:
            flow = shift is not None or use_flow_sigmas
            if plan_schedule is not None:
                schedule = schedule_from_dict(dict(plan_schedule))
                flow = isinstance(schedule, Flow)
            elif flow:
                schedule = Flow(float(flow_shift if use_flow_sigmas else shift or 1.0))
            else:
                schedule = self._table(library)
            told = "flow_prediction" if prediction_type is None and flow else prediction_type or "epsilon"
            if told not in PREDICTIONS:
                raise BadInput(f"unknown prediction_type {told!r} (choices: {', '.join(PREDICTIONS)})")
            self.hasten_schedule = schedule
            self.reading = Reading(schedule, PREDICTIONS[told], num_train_timesteps)
            self.plan = None if plan is None else usable(Plan.from_json(plan))
            if self.plan is not None:
                self.plan.check_schedule(schedule)
            self.sampler = pick("samplers", sampler)
            if self.plan is None and not self.sampler.linear:
                raise BadInput(f"{sampler} cannot run inside a pipeline, which steps at times fixed in advance")
            self.order = 1 if self.plan is not None else max(1, self._queries(4) - self._queries(3))
            self.num_inference_steps: int | None = None
            self.grid = self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1, dtype=torch.float32)
            self._begin_index: int | None = None
            self._run: Run | None = None
            self._first = 1.0

        def _table(self, library: Any) -> Any:
            """The table that the same arguments give elsewhere, in its float32."""
            from ..discrete import Discrete

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
            self._begin_index = begin_index
            self._run = None

        def set_timesteps(
            self,
            num_inference_steps: int | None = None,
            device: Any = None,
            timesteps: Any = None,
        ) -> None:
            """Exactly `num_inference_steps` steps, or the given `timesteps` and then the clean image."""
            if (num_inference_steps is None) == (timesteps is None):
                raise BadInput("set_timesteps needs num_inference_steps or timesteps, one of them")
            if self.plan is not None:
                if timesteps is not None or num_inference_steps != self.plan.nfe:
                    asked = "other timesteps" if timesteps is not None else f"{num_inference_steps} steps"
                    raise BadInput(f"the plan of this scheduler has {self.plan.nfe} steps, asked for {asked}")
                self._whole = self.plan
            else:
                if timesteps is not None:
                    own = self.reading.time(torch.as_tensor(timesteps, dtype=torch.float64))
                    law: Any = Explicit((*own.tolist(), 0.0))
                else:
                    law = pick("times", self.config.times)
                self.grid = law(self.hasten_schedule, num_inference_steps or len(own))
                self._whole = usable(compile_plan(self.sampler, self.hasten_schedule, self.grid))
            self.num_inference_steps = num_inference_steps or len(timesteps)
            asked_at = self.reading.timestep(self._whole.times[:-1])
            self.timesteps = asked_at.to(torch.float32).to(device)
            begin = self._whole.times[0] if self._whole.begin is None else self._whole.begin
            self._first = float(self.hasten_schedule.prior_std(begin) * self._whole.start[0])
            self._begin_index, self._run = None, None

        def _begin(self, timestep: Any) -> Run:
            """A new trajectory, from `begin_index` or, without one, from the timestep that is this one."""
            if self.num_inference_steps is None:
                raise BadInput("call set_timesteps before step")
            if self._begin_index is None:
                at = float(timestep)
                self._begin_index = int((self.timesteps.double() - at).abs().argmin())
            first = self._begin_index
            if first == 0:
                return Run(self._whole)
            if self.plan is not None:
                return Run(later(self.plan, first))
            if first % self.order:
                raise BadInput(f"a sampling begins at a whole step: {first} is inside one of {self.order} queries")
            # a multistep sampler has no history here: it is compiled anew for the steps that are left
            return Run(usable(compile_plan(self.sampler, self.hasten_schedule, self.grid[first // self.order :])))

        def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
            """The sample itself: the state has the scale that the network wants."""
            return sample

        def step(
            self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
        ) -> Any:
            """The next state. generator: one, or a list with one for each sample; samplers without noise use none."""
            if self._run is None:
                self._run = self._begin(timestep)
            run, x = self._run, sample.float()
            if run.next >= run.plan.nfe:
                raise BadInput(f"this sampling has {run.plan.nfe} queries and all are done: call set_timesteps again")
            t, prediction = run.plan.times[run.next], prediction_from(self.reading.prediction)
            alpha, sigma = self.hasten_schedule.alpha(t), self.hasten_schedule.sigma(t)
            if prediction.name == "eps" and float(alpha) == 0:
                raise BadInput("an eps network says nothing at pure noise: begin below it, times='angle:start=0.999'")
            _, skip, scale = (float(c) for c in prediction.coefficients(alpha, sigma))
            x0 = torch.add(x * skip, model_output.to(x), alpha=scale)
            x0 = x0 if self.config.clip is None else x0.clamp(-self.config.clip, self.config.clip)

            def noise() -> Tensor:
                return randn_tensor(tuple(x.shape), generator=generator, device=x.device, dtype=x.dtype)

            made = run.step(x, x0, noise).to(model_output.dtype)
            return SchedulerOutput(prev_sample=made) if return_dict else (made,)

        def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            """alpha x + sigma noise at the timesteps, (B,) or ()."""
            t = self.reading.time(torch.as_tensor(timesteps).flatten())
            shape = (-1, *[1] * (original_samples.ndim - 1))
            alpha, sigma = (
                f(t).to(original_samples.device, original_samples.dtype).reshape(shape)
                for f in (self.hasten_schedule.alpha, self.hasten_schedule.sigma)
            )
            return alpha * original_samples + sigma * noise

        def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
            """The same under the name and the order that pipelines of flows use."""
            return self.add_noise(sample, noise, timestep)

    PlanScheduler.__module__, PlanScheduler.__qualname__ = __name__, "PlanScheduler"
    return PlanScheduler


def usable(plan: Plan) -> Plan:
    """A plan that a pipeline can run: no noise before its first query, no basis."""
    if plan.basis is not None:
        raise BadInput(f"{plan.sampler or 'this plan'} works in a basis of its own: a pipeline cannot run it")
    if bool(plan.start[1:].any()):
        raise BadInput(f"{plan.sampler or 'this plan'} adds noise before its first query: a pipeline cannot")
    return plan


def later(plan: Plan, first: int) -> Plan:
    """The rows of a plan from `first` on. Raises BadInput where they need what was answered before."""
    if first >= plan.nfe or bool(plan.A[first:, :first].any()) or bool(plan.B[first:, :first].any()):
        raise BadInput(
            f"this plan cannot begin at its query {first} of {plan.nfe}: its rows need earlier answers; "
            "give as_scheduler the sampler in place of the plan"
        )
    draws = plan.C[first:]
    keep = (draws != 0).any(0)
    start = torch.cat([torch.ones(1, dtype=torch.float64), torch.zeros(int(keep.sum()), dtype=torch.float64)])
    rows = slice(first, None)
    return Plan(
        plan.times[rows], start, plan.a[rows], plan.A[rows, first:], plan.B[rows, first:], draws[:, keep],
        plan.sampler, plan.schedule,
    )  # fmt: skip
