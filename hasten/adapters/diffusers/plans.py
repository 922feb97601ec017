"""The plans that the scheduler for `diffusers` runs: compiled once for a sampler, schedule and times, and kept.

Pipelines call `set_timesteps` at every image. To compile a plan costs more than all of its steps on small latents, so
the last few are kept, by value: the sampler's text, the schedule and the times.
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

__all__ = ["Run", "begun", "coefficients", "compiled", "grid", "later", "usable"]

KEPT = 16  # plans; of a thousand steps each has 16 MB
CLOSE = 1e-9  # in t: the same time


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


class Run:
    """One trajectory: the plan, which query comes next, and the history that later rows need."""

    def __init__(self, plan: Plan, numbers: list[tuple[float, float]]) -> None:
        self.plan = plan
        self.numbers = numbers  # of every query: x0 = skip x + scale output
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
        self.draws = self.draws or NoiseDraws(lambda: self.noise())
        self.states[k], self.answers[k] = x, x0
        made = combine(row, self.states, self.answers, self.draws)
        for j in row.last_states:
            del self.states[j]
        for j in row.last_outputs:
            del self.answers[j]
        self.next += 1
        return made


@lru_cache(maxsize=KEPT)
def grid(times: str, schedule: Schedule, steps: int) -> Tensor:
    """The times (steps + 1,), float64, of a time grid given as text."""
    with torch.inference_mode(False), torch.no_grad():
        return pick("times", times)(schedule, steps)


@lru_cache(maxsize=KEPT)
def compiled(sampler: str, schedule: Schedule, times: tuple[float, ...]) -> Plan:
    """The plan of a sampler given as text. Raises BadInput where a pipeline cannot run it."""
    with torch.inference_mode(False), torch.no_grad():
        own = torch.tensor(times, dtype=torch.float64)
        return usable(compile_plan(pick("samplers", sampler), schedule, own))


@lru_cache(maxsize=KEPT)
def begun(sampler: str, schedule: Schedule, times: tuple[float, ...], first: int) -> Plan:
    """The rest of `compiled(sampler, schedule, times)` from its query `first` on, for a state at that query's time.

    It asks at exactly the times that are left of the whole plan, which are those that the pipeline asks its network at:

    - the sampler compiled on the rest of the grid, without history, where that gives these times;
    - else, of a sampler that repeats its first step (PLMS), its variant that does not;
    - else the rows of the whole plan, where they need nothing from before (one-step methods, whatever their times);
    - else, where the next query is at the same time (the second of a step of Heun, the repeated one of PLMS), this one
      leaves the state as it is and the sampling begins at the next.

    Raises BadInput for a query that lies inside a step.
    """
    whole = compiled(sampler, schedule, times)
    if not 0 <= first < whole.nfe:
        raise BadInput(f"this sampling has {whole.nfe} queries and cannot begin at number {first}")
    left = whole.times[first:]
    place = next((k for k, t in enumerate(times[:-1]) if abs(t - float(left[0])) < CLOSE), None)
    for spec in (sampler, without_repeat(sampler)):
        if place is None or spec is None:
            continue
        try:
            found = compiled(spec, schedule, times[place:])
        except HastenError:  # such as a chain of noise levels that do not fit between two
            continue
        if found.times.shape == left.shape and bool((found.times - left).abs().max() < CLOSE):
            return found
    try:
        return later(whole, first)
    except BadInput:
        if first + 1 < whole.nfe and abs(float(left[1] - left[0])) < CLOSE:
            return after_one_that_waits(begun(sampler, schedule, times, first + 1))
        raise BadInput(
            f"{sampler} cannot begin at timestep {first} of {whole.nfe}: it lies inside one of its steps"
        ) from None


def without_repeat(sampler: str) -> str | None:
    """The text of a sampler that begins with a repeated step, without that; None where it has none."""
    method: Any = pick("samplers", sampler)
    return format_spec(replace(method, start="ramp")) if getattr(method, "start", None) == "heun" else None


def after_one_that_waits(plan: Plan) -> Plan:
    """The plan after one more query, at its own first time, whose answer is not used."""
    one = torch.ones(1, dtype=torch.float64)
    return Plan(
        torch.cat([plan.times[:1], plan.times]), plan.start, torch.cat([one, plan.a]), pad(plan.A, (1, 0, 1, 0)),
        pad(plan.B, (1, 0, 1, 0)), pad(plan.C, (0, 0, 1, 0)), plan.sampler, plan.schedule,
    )  # fmt: skip


def coefficients(plan: Plan, schedule: Schedule, prediction: str) -> list[tuple[float, float]]:
    """(skip, scale) of every query: x0 = skip x + scale output, for a network of this prediction.

    Raises BadInput where the output says nothing about x0.
    """
    times, known = plan.times[:-1].detach(), prediction_from(prediction)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    if known.name == "eps" and bool((alpha == 0).any()):
        raise BadInput("an eps network says nothing at pure noise: begin below it, times='angle:start=0.999'")
    _, skip, scale = (
        torch.as_tensor(c, dtype=torch.float64).expand_as(times) for c in known.coefficients(alpha, sigma)
    )
    return list(zip(skip.tolist(), scale.tolist()))
