"""Plans of the scheduler for `diffusers`: compiled once per sampler, schedule and times, and cached.

Pipelines call `set_timesteps` for every image. Compiling a plan costs more than all of its steps on small latents, so
the last few are cached by value: the sampler's spec, the schedule and the times.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...errors import BadInput, HastenError
from ...pick import format_spec, pick
from ...plan.program import NoiseDraws, combine
from ...plan.table import Plan
from ...plan.table import plan as compile_plan
from ...predictions import prediction_from
from ...schedules.base import Schedule

__all__ = [
    "Trajectory",
    "plan_from_evaluation",
    "coefficients",
    "compiled_plan",
    "time_grid",
    "plan_rows_from",
    "check_plan",
]

CACHE_SIZE = 16  # plans; of a thousand steps each has 16 MB
CLOSE = 1e-9  # in t: the same time


def check_plan(plan: Plan) -> Plan:
    """The plan, which a pipeline must be able to run: without noise before its first evaluation, a basis and branches.

    Raises:
        BadInput: for another plan.
    """
    if plan.basis is not None:
        raise BadInput(f"{plan.sampler or 'this plan'} works in a basis of its own: a pipeline cannot run it")
    if plan.branches is not None:
        raise BadInput(
            f"{plan.sampler or 'this plan'} evaluates the branches of guidance one by one, a pipeline both of them in "
            "every step: sample with hasten.load(FOLDER).sample(plan=...) or hasten sample FOLDER"
        )
    if bool(plan.start[1:].any()):
        raise BadInput(f"{plan.sampler or 'this plan'} adds noise before its first evaluation: a pipeline cannot")
    return plan


def plan_rows_from(plan: Plan, first: int) -> Plan:
    """The rows of a plan from `first` on.

    Raises:
        BadInput: where they depend on earlier evaluations.
    """
    if first >= plan.nfe or bool(plan.A[first:, :first].any()) or bool(plan.B[first:, :first].any()):
        raise BadInput(
            f"this plan cannot begin at evaluation {first} of {plan.nfe}: its rows depend on earlier ones; "
            "pass the sampler to as_scheduler in place of the plan"
        )
    draws = plan.C[first:]
    used = (draws != 0).any(0)
    start = torch.cat([torch.ones(1, dtype=torch.float64), torch.zeros(int(used.sum()), dtype=torch.float64)])
    rows = slice(first, None)
    A, B = plan.A[rows, first:], plan.B[rows, first:]
    return Plan(plan.times[rows], start, plan.a[rows], A, B, draws[:, used], plan.sampler, plan.schedule)


class Trajectory:
    """The state of one sampling: the plan, the index of the next evaluation, and the history that later rows need.

    Args:
        plan: to run.
        numbers: (skip, scale) of every evaluation: x0 = skip x + scale output.
    """

    def __init__(self, plan: Plan, numbers: list[tuple[float, float]]) -> None:
        self.plan = plan
        self.numbers = numbers
        self.program = plan._numbers
        self.next = 0
        self.states: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.draws: Any = None
        self.noise: Any = None

    def step(self, x: Tensor, x0: Tensor, noise: Any) -> Tensor:
        """x_{k+1} from x_k and x0 at it.

        Args:
            x: x_k.
            x0: the denoised x_k.
            noise: a function that returns standard normal noise.
        """
        row, k = self.program.rows[self.next], self.next
        self.noise = noise  # of this call: pipelines pass their generators to each
        self.draws = self.draws or NoiseDraws(lambda: self.noise())
        self.states[k], self.outputs[k] = x, x0
        state = combine(row, self.states, self.outputs, self.draws)
        for j in row.last_states:
            del self.states[j]
        for j in row.last_outputs:
            del self.outputs[j]
        self.next += 1
        return state


@lru_cache(maxsize=CACHE_SIZE)
def time_grid(times: str, schedule: Schedule, steps: int) -> Tensor:
    """The times (steps + 1,), float64, of a spec of a time grid."""
    with torch.inference_mode(False), torch.no_grad():
        return pick("times", times)(schedule, steps)


@lru_cache(maxsize=CACHE_SIZE)
def compiled_plan(sampler: str, schedule: Schedule, times: tuple[float, ...]) -> Plan:
    """The plan of a spec of a sampler.

    Raises:
        BadInput: where a pipeline cannot run it.
    """
    with torch.inference_mode(False), torch.no_grad():
        own = torch.tensor(times, dtype=torch.float64)
        return check_plan(compile_plan(pick("samplers", sampler), schedule, own))


@lru_cache(maxsize=CACHE_SIZE)
def plan_from_evaluation(sampler: str, schedule: Schedule, times: tuple[float, ...], first: int) -> Plan:
    """The rest of `compiled_plan(sampler, schedule, times)`, for a state at the time of its evaluation `first`.

    Its evaluations are at exactly the remaining times of the full plan, which are those of the pipeline's network:

    - the sampler compiled on the rest of the grid, without history, where that has these times;
    - else, of a sampler that repeats its first step (PLMS), its variant that does not;
    - else the rows of the full plan, where they do not depend on earlier ones (one-step methods, whatever their times);
    - else, where the next evaluation is at the same time (the second of a step of Heun, the repeated one of PLMS), this
      one leaves the state unchanged and the sampling begins at the next.

    Args:
        sampler: its spec.
        schedule: of the network.
        times: of the full plan's grid.
        first: index of the first evaluation.

    Raises:
        BadInput: for an evaluation inside a step.
    """
    full = compiled_plan(sampler, schedule, times)
    if not 0 <= first < full.nfe:
        raise BadInput(f"this sampling has {full.nfe} evaluations and cannot begin at number {first}")
    remaining = full.times[first:]
    index = next((k for k, t in enumerate(times[:-1]) if abs(t - float(remaining[0])) < CLOSE), None)
    for spec in (sampler, without_repeat(sampler)):
        if index is None or spec is None:
            continue
        try:
            rest = compiled_plan(spec, schedule, times[index:])
        except HastenError:  # such as a chain of noise levels that do not fit between two
            continue
        if rest.times.shape == remaining.shape and bool((rest.times - remaining).abs().max() < CLOSE):
            return rest
    try:
        return plan_rows_from(full, first)
    except BadInput:
        if first + 1 < full.nfe and abs(float(remaining[1] - remaining[0])) < CLOSE:
            return with_unused_evaluation(plan_from_evaluation(sampler, schedule, times, first + 1))
        raise BadInput(
            f"{sampler} cannot begin at timestep {first} of {full.nfe}: it lies inside one of its steps"
        ) from None


def without_repeat(sampler: str) -> str | None:
    """The spec of a sampler that begins with a repeated step, without that; None for other samplers."""
    method: Any = pick("samplers", sampler)
    return format_spec(replace(method, start="ramp")) if getattr(method, "start", None) == "heun" else None


def with_unused_evaluation(plan: Plan) -> Plan:
    """The plan preceded by an evaluation at its first time, whose output is not used."""
    one = torch.ones(1, dtype=torch.float64)
    times, a = torch.cat([plan.times[:1], plan.times]), torch.cat([one, plan.a])
    A, B, C = pad(plan.A, (1, 0, 1, 0)), pad(plan.B, (1, 0, 1, 0)), pad(plan.C, (0, 0, 1, 0))
    return Plan(times, plan.start, a, A, B, C, plan.sampler, plan.schedule)


def coefficients(plan: Plan, schedule: Schedule, prediction: str) -> list[tuple[float, float]]:
    """(skip, scale) of every evaluation, x0 = skip x + scale output, for a network of this prediction.

    Raises:
        BadInput: where x0 does not depend on the output.
    """
    times, known = plan.times[:-1].detach(), prediction_from(prediction)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    if known.name == "eps" and bool((alpha == 0).any()):
        raise BadInput("eps at pure noise does not determine x0: begin below it, times='angle:start=0.999'")
    _, skip, scale = (
        torch.as_tensor(c, dtype=torch.float64).expand_as(times) for c in known.coefficients(alpha, sigma)
    )
    return list(zip(skip.tolist(), scale.tolist()))
