"""DPM-Solver: third order, and singlestep groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hasten.plan import plan
from hasten.samplers import DPMSolver
from hasten.schedules import Schedule, VPLinear
from hasten.times import UniformLambda
from tests.samplers.problems import F64, between, drive


def test_third_order_matters_only_in_third_order_steps() -> None:
    times = between(VPLinear(), 20.0, 0.05, 6)
    true, compat = (plan(DPMSolver(3, third=k), VPLinear(), times) for k in ("true", "compat"))
    difference = (true.B - compat.B).abs().amax(1)
    assert (difference[[0, 1, 4, 5]] == 0).all() and (difference[[2, 3]] > 1e-4).all()


def run_groups_of_three(schedule: Schedule, lam0: float, h: float, z: Tensor, answers: list[Tensor]) -> Tensor:
    """The state after the first group of a 5-step grid, whose groups are 3 and 2."""
    times = schedule.time(lam0 + h * torch.tensor([0.0, 1 / 3, 2 / 3, 1.0, 1.2, 1.4], dtype=F64))
    coroutine = DPMSolver(3, multistep=False).steps(schedule, z, times, lambda: z)
    next(coroutine)
    return [coroutine.send(answer) for answer in answers][-1].x


def test_singlestep_is_the_papers_formula() -> None:
    """2S with its node at 1/2 and 3S with nodes at 1/3 and 2/3 in lam, as DPM-Solver++ writes them."""
    schedule, lam0, h = VPLinear(), -0.6, 0.8
    z, answers = torch.tensor(0.7, dtype=F64), [torch.tensor(v, dtype=F64) for v in (0.3, -0.2, 0.5)]

    def run(sampler: Any, fractions: list[float]) -> Tensor:
        replies = iter(answers)
        times = schedule.time(lam0 + h * torch.tensor([0.0, *fractions, 1.0], dtype=F64))
        return drive(sampler, schedule, lambda z, t: next(replies), z, times)[0]

    def base(r: float) -> tuple[Tensor, Tensor]:  # alpha, and the first-order step, at lam0 + r h
        (a, s), s0 = (
            (f(schedule.time(lam0 + r * h)) for f in (schedule.alpha, schedule.sigma)),
            schedule.sigma(schedule.time(lam0)),
        )
        return a, s / s0 * z - a * math.expm1(-r * h) * answers[0]

    (alpha, first), (m0, m1, m2) = base(1.0), answers
    two = first - alpha * math.expm1(-h) * (m1 - m0)
    torch.testing.assert_close(run(DPMSolver(2, multistep=False), [0.5]), two, rtol=1e-12, atol=0)
    three = first + alpha * (math.expm1(-h) / h + 1) * (m2 - m0) * 3 / 2
    replies = run_groups_of_three(schedule, lam0, h, z, answers)
    torch.testing.assert_close(replies, three, rtol=1e-12, atol=0)


def test_singlestep_evaluates_inside_its_groups() -> None:
    """Every node of the grid is evaluated once, and none in a group but the first enters the next group's table row."""
    schedule = VPLinear()
    times = UniformLambda()(schedule, 8)
    table = plan(DPMSolver(3, multistep=False), schedule, times)  # groups 3, 3, 1, 1
    torch.testing.assert_close(table.times[:8], times[:8], rtol=0, atol=0)
    assert (table.B[5, :3] == 0).all() and (table.B[2, :3].abs() > 0).sum() >= 2
