"""Guides that combine the two branches in another way: apg and cfg_zero."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import BadInput
from hasten.exact import m64
from hasten.guides import APG, CFG, CFGZero, DeltaReuse, Interval
from hasten.pick import format_spec, pick
from hasten.plan import guided_plan, plan
from hasten.plan.draw import draw
from hasten.samplers import DDIM, UniPC
from hasten.sampling import Count, Noise
from hasten.schedules import Flow, VPLinear
from hasten.times import UniformLambda, UniformTime

F64 = torch.float64
LABELS = [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
LABEL = torch.tensor([0, 1, 2, 1])


def setting(schedule=None):  # type: ignore[no-untyped-def]
    model = m64(schedule or VPLinear(), labels=LABELS)
    return model, CFG(3.0).wrap(model), torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=F64)


def test_apg_with_eta_1_is_plain_guidance_and_with_0_moves_at_right_angles() -> None:
    model, guided, z = setting()
    cond, uncond = model(z, 0.4, label=LABEL), model(z, 0.4)
    torch.testing.assert_close(APG(eta=1.0).wrap(guided)(z, 0.4, label=LABEL), guided(z, 0.4, label=LABEL))
    moved = APG().wrap(guided)(z, 0.4, label=LABEL) - cond
    assert bool(((moved * cond).sum(1).abs() < 1e-9).all()) and bool((moved.norm(dim=1) > 1e-3).all())
    half = APG(eta=0.5).wrap(guided)(z, 0.4, label=LABEL) - cond
    torch.testing.assert_close(half, 0.5 * (moved + 2 * (cond - uncond)))


def test_apg_limits_the_difference_and_remembers_the_last() -> None:
    model, guided, z = setting()
    difference = model(z, 0.4, label=LABEL) - model(z, 0.4)
    norm = 0.5 * float(difference.norm(dim=1).min())
    limited = APG(eta=1.0, norm=norm).wrap(guided)(z, 0.4, label=LABEL) - model(z, 0.4, label=LABEL)
    torch.testing.assert_close(limited.norm(dim=1), torch.full((4,), 2 * norm, dtype=F64))
    with_memory = APG(eta=1.0, momentum=-0.5).wrap(guided)
    with_memory(z, 0.4, label=LABEL)
    second = with_memory(z, 0.3, label=LABEL) - model(z, 0.3, label=LABEL)
    torch.testing.assert_close(second, 2 * (model(z, 0.3, label=LABEL) - model(z, 0.3) - 0.5 * difference))
    with pytest.raises(BadInput, match="whole batch"):
        with_memory(z[:2], 0.3, label=LABEL[:2])
    times, noise = UniformLambda()(guided.schedule, 4), Noise(range(4), (64,), F64)
    first, again = (draw(with_memory, UniPC(), times, noise, label=LABEL) for _ in range(2))
    assert torch.equal(first, again)  # every trajectory begins without a memory


def test_cfg_zero_does_not_see_the_length_of_the_unconditional_velocity() -> None:
    """The formula of the paper on rectified flow, and the same velocity where that of the branch is doubled."""
    model, guided, z = setting(Flow())
    t = 0.6
    v_cond, v_uncond = ((z - x0) / t for x0 in (model(z, t, label=LABEL), model(z, t)))
    s = (v_cond * v_uncond).sum(1, keepdim=True) / v_uncond.square().sum(1, keepdim=True)
    velocity = s * v_uncond + 3 * (v_cond - s * v_uncond)
    steered = CFGZero().wrap(guided)
    torch.testing.assert_close(steered(z, t, label=LABEL), z - t * velocity)
    doubled = steered._mixed(z - t * v_cond, z - t * 2 * v_uncond, z, t)
    torch.testing.assert_close(doubled, z - t * velocity)
    assert torch.equal(steered(z, 0.0, label=LABEL), model(z, 0.0, label=LABEL))


def test_cfg_zero_stands_still_in_its_first_evaluations() -> None:
    _, guided, z = setting(Flow())
    times = UniformTime()(guided.schedule, 4)
    states = []
    steered = CFGZero(zero_steps=2).wrap(guided)
    for _ in range(2):
        draw(steered, DDIM(), times, Noise(range(4), (64,), F64), x=z, label=LABEL,
             callback=lambda k, t, x, x0: states.append(x))  # fmt: skip
    for first in (0, 4):
        torch.testing.assert_close(states[first + 1], z)
        torch.testing.assert_close(states[first + 2], z)
        assert not torch.allclose(states[first + 3], z)


def test_delta_reuse_is_the_plan_that_reuses_the_last_difference() -> None:
    """Every second evaluation, everywhere or in an interval: the guided plan with those steps, and as few evaluations."""
    model, guided, z = setting()
    table = plan(UniPC(2), model.schedule, UniformLambda()(model.schedule, 6))
    q = model.schedule.q(table.times[:-1])
    inside = {"low": float(q[4]) * 0.999, "high": float(q[1]) * 1.001}
    for guide, asked in ((DeltaReuse(), (0, 2, 4)), (DeltaReuse(2, **inside), (1, 3)), (DeltaReuse(1), range(6))):
        counted = Count(model)
        result = table(guide.wrap(CFG(3.0).wrap(counted)), z, label=LABEL)
        assert counted.rows == 4 * (6 + len(asked))
        torch.testing.assert_close(result, guided_plan(table, 3.0, asked)(guided, z, label=LABEL))
    with pytest.raises(BadInput, match="interval of its own"):
        DeltaReuse().wrap(Interval(0.1, 1.0).wrap(guided))


def test_they_stay_when_the_guidance_is_narrowed_and_refuse_what_they_are_not() -> None:
    model, guided, z = setting()
    narrowed = Interval(0.1, 1e9).wrap(APG(momentum=-0.5).wrap(guided))
    torch.testing.assert_close(narrowed(z, 0.4, label=LABEL), APG().wrap(guided)(z, 0.4, label=LABEL))
    table = guided_plan(plan(UniPC(), model.schedule, UniformLambda()(model.schedule, 2)), 3.0)
    for guide in (APG(), CFGZero(), DeltaReuse()):
        with pytest.raises(BadInput, match="without further guides"):
            table(guide.wrap(guided), z, label=LABEL)
        with pytest.raises(BadInput, match="other than 1"):
            guide.wrap(model)
        with pytest.raises(BadInput, match="plain guidance only"):
            guide.wrap(guided).raw(z, 0.4, label=LABEL)
    with pytest.raises(BadInput, match="rectified flow"):
        CFGZero(zero_steps=1).wrap(guided)
    for text in (
        "apg:eta=2",
        "apg:momentum=1",
        "apg:norm=0",
        "cfg_zero:zero_steps=-1",
        "delta_reuse:every=0",
        "delta_reuse:low=2,high=1",
    ):
        with pytest.raises(BadInput, match=text.split(":")[0]):
            pick("guides", text)
    assert pick("guides", format_spec(APG(0.5, -0.5, 2.5))) == APG(0.5, -0.5, 2.5)
