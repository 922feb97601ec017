"""Plans over both branches of guidance: the same numbers as guidance itself, and as the rules that save evaluations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.errors import BadInput
from hasten.exact import m2
from hasten.guides import CFG, DynamicThreshold, Interval
from hasten.plan import Plan, guided_plan, plan
from hasten.plan.branches import paired_rows
from hasten.samplers import DDPM, DEIS, PLMS, Heun, UniPC
from hasten.sampling import Count, Noise
from hasten.schedules import EDM, VPCosine, VPLinear
from hasten.times import UniformLambda

F64 = torch.float64
LABEL = torch.tensor([0, 1, 2, 1])


def model(schedule: Any) -> Any:
    return m2(schedule, labels=[0, 0, 1, 1, 2, 2])


def noise() -> Noise:
    return Noise(range(4), (2,), F64)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(offset=0.0), EDM()], ids=["linear", "cosine", "EDM"])
@pytest.mark.parametrize(
    "sampler", [UniPC(3), DEIS(3), PLMS(4, "ramp"), Heun(), DDPM()], ids=lambda s: type(s).__name__
)
def test_the_full_budget_is_guidance_itself(sampler: Any, schedule: Any) -> None:
    """Both branches in every step with a constant scale: classifier-free guidance to 1e-12, in one batch a step."""
    table = plan(sampler, schedule, UniformLambda()(schedule, 5))
    counted = Count(model(schedule))
    guided = CFG(3.0).wrap(counted)
    x = noise().initial() * float(schedule.prior_std(table.times[0]))
    both = guided_plan(table, 3.0)
    assert both.nfe == 2 * table.nfe and len(paired_rows(both)) == table.nfe
    result = both(guided, x, noise(), label=LABEL)
    assert (counted.calls, counted.rows) == (table.nfe, 8 * table.nfe)
    expected = table(CFG(3.0).wrap(model(schedule)), x, noise(), label=LABEL)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12 * max(1.0, float(x.abs().max())))


def test_only_some_steps_are_an_interval() -> None:
    schedule = VPLinear()
    table = plan(UniPC(2), schedule, UniformLambda()(schedule, 8))
    q = schedule.q(table.times[:-1])
    guided = CFG(3.0).wrap(model(schedule))
    some = guided_plan(table, 3.0, (3, 4, 5), reuse=False)
    between = Interval(float(q[5]) * 0.999, float(q[3]) * 1.001).wrap(guided)
    x = noise().initial()
    torch.testing.assert_close(some(guided, x, label=LABEL), table(between, x, label=LABEL), rtol=1e-12, atol=1e-12)
    assert some.nfe == 11


def test_the_last_difference_is_used_again_with_the_scale_of_the_step() -> None:
    """Against a loop that keeps the last difference; before the first one the model is the conditional one."""
    schedule, scales, asked = VPLinear(), [2.0, 3.0, 1.5, 4.0, 0.5, 2.5], (1, 4)
    table = plan(UniPC(2), schedule, UniformLambda()(schedule, 6))
    exact, last, k = model(schedule), torch.zeros(()), 0

    def by_hand(x: Any, t: Any, **cond: Any) -> Any:
        nonlocal last, k
        of_cond = exact(x, t, label=LABEL)
        last = of_cond - exact(x, t) if k in asked else last
        k += 1
        return of_cond + (scales[k - 1] - 1) * last

    x = noise().initial()
    reused = guided_plan(table, 2.0, asked, scales=scales)
    assert reused.branches == ("cond", "uncond", "cond", "cond", "cond", "uncond", "cond", "cond")
    result = reused(CFG(2.0).wrap(exact), x, label=LABEL)
    torch.testing.assert_close(result, table(by_hand, x), rtol=1e-12, atol=1e-12)


def test_a_pair_that_has_moved_apart_is_evaluated_apart() -> None:
    """The second branch is asked at its own state, not at that of the first, once their times or states differ."""
    schedule = VPLinear()
    table = guided_plan(plan(UniPC(2), schedule, UniformLambda()(schedule, 2)), 2.0)
    counted, x = Count(model(schedule)), noise().initial()
    B = table.B.clone()
    B[0, 0] = 0.1
    moved = Plan(table.times, table.start, table.a, table.A, B, table.C, branches=table.branches, guidance_scale=2.0)
    result = moved(CFG(2.0).wrap(counted), x, label=LABEL)
    assert counted.calls == 3  # one pair is left
    exact = model(schedule)
    first = exact(x, table.times[0])
    state = x + 0.1 * first
    second = exact(state, table.times[1], label=LABEL)
    state = table.a[1] * state + B[1, 0] * first + B[1, 1] * second
    pair = exact(state, table.times[2]), exact(state, table.times[3], label=LABEL)
    state = sum(b * y for b, y in zip(B[3], (first, second, *pair), strict=True)) + table.a[3] * state
    torch.testing.assert_close(result, state, rtol=1e-12, atol=1e-12)


def test_json_keeps_the_branches_and_older_versions_refuse_it() -> None:
    table = guided_plan(plan(UniPC(2), VPLinear(), UniformLambda()(VPLinear(), 3)), 2.5, (0, 2))
    back = Plan.from_json(table.to_json())
    assert (back.branches, back.guidance_scale) == (table.branches, 2.5) and '"schema": 2' in table.to_json()
    assert "x0uncond_0" in table.table() and "guidance_scale 2.5" in table.table()


def test_it_is_refused_where_its_guidance_would_be_another() -> None:
    schedule = VPLinear()
    table = guided_plan(plan(UniPC(2), schedule, UniformLambda()(schedule, 3)), 2.0)
    exact, x = model(schedule), noise().initial()
    for denoiser, words in (
        (exact, "sample with that scale"),
        (CFG(3.0).wrap(exact), "made for guidance_scale 2"),
        (Interval(0.1, 1.0).wrap(CFG(2.0).wrap(exact)), "made for guidance_scale 2 alone"),
        (DynamicThreshold().wrap(CFG(2.0).wrap(exact)), "without further guides"),
        (Count(CFG(2.0).wrap(exact)), "without further guides"),
    ):
        with pytest.raises(BadInput, match=words):
            table(denoiser, x, label=LABEL)
    for options, words in (
        ({"uncond": (3,)}, "steps of 0 to 2"),
        ({"scales": [1.0]}, "needs as many scales"),
    ):
        with pytest.raises(BadInput, match=words):
            guided_plan(plan(UniPC(2), schedule, UniformLambda()(schedule, 3)), 2.0, **options)
    with pytest.raises(BadInput, match="branches already"):
        guided_plan(table, 2.0)
