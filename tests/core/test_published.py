"""Coefficients and limits of the papers that no order of convergence pins down."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.plan import plan
from hasten.samplers import DEIS, PLMS, Heun, PredictorCorrector
from hasten.samplers.adaptive import AdaptiveSDE, _drift, _Run
from hasten.sampling import Query, walk
from hasten.schedules import EDM, VE, Discrete, Schedule, VPLinear
from hasten.times import UniformLambda, UniformTime
from tests.samplers.problems import VE_WIDE, drive

F64 = torch.float64


def at_levels(schedule: Schedule, levels: Tensor) -> Tensor:
    return schedule.time(-torch.log(levels))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plms_integrates_polynomials_in_q(order: int) -> None:
    """Adams-Bashforth of order p: with nodes uniform in q every step is exact for eps of degree p - 1 (2202.09778)."""
    q = torch.linspace(9.0, 1.0, 9, dtype=F64)
    coefficients = [0.7, -0.3, 0.11, 0.05][:order]

    def integral(a: Tensor, b: Tensor) -> Tensor:
        return sum(c * (b ** (k + 1) - a ** (k + 1)) / (k + 1) for k, c in enumerate(coefficients))

    states: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        states.append(z)
        level = VE_WIDE.sigma(t)
        return z - level * sum(c * level**k for k, c in enumerate(coefficients))

    end, _ = drive(PLMS(order, "ramp"), VE_WIDE, denoise, torch.tensor(1.0, dtype=F64), at_levels(VE_WIDE, q))
    path = torch.stack([*states, end])
    moved, expected = path.diff(), torch.stack([integral(a, b) for a, b in zip(q, q[1:])])
    assert (moved[order - 1 :] - expected[order - 1 :]).abs().max() < 1e-9
    assert order == 1 or (moved[0] - expected[0]).abs() > 1e-3


def asked(sampler: Any, schedule: Schedule, times: Tensor) -> Tensor:
    """q at every query."""
    zero = torch.zeros((), dtype=F64)
    _, found = drive(sampler, schedule, lambda z, t: 0 * z, zero, times, lambda: zero)
    return torch.stack([schedule.q(t) for t in found])


@pytest.mark.parametrize("schedule", [VE(), EDM(), VPLinear(), Discrete.linear()], ids=lambda s: type(s).__name__)
def test_churn_stops_at_the_noisiest_level(schedule: Schedule) -> None:
    """q^ = min(q (1 + gamma), q(t_max)): no network was trained on more noise than its schedule has (2206.00364)."""
    top = float(schedule.q(schedule.t_max))
    times = torch.cat([at_levels(schedule, top * torch.tensor([0.9, 0.3, 0.05], dtype=F64)), torch.zeros(1, dtype=F64)])
    found = asked(Heun(churn=100.0), schedule, times)
    gamma = 1 + (math.sqrt(2) - 1)
    assert torch.allclose(found[::2], top * torch.tensor([1.0, 0.3 * gamma, 0.05 * gamma], dtype=F64), rtol=1e-9)


def test_churn_is_for_the_levels_between_its_ends() -> None:
    """Noise only where churn_min <= q <= churn_max."""
    levels = torch.tensor([40.0, 10.0, 2.0, 0.5, 0.1], dtype=F64)
    times = torch.cat([at_levels(EDM(), levels), torch.zeros(1, dtype=F64)])
    found = asked(Heun(churn=0.5, churn_min=0.3, churn_max=5.0), EDM(), times)
    assert torch.allclose(found[::2], levels * torch.tensor([1, 1, 1.1, 1.1, 1], dtype=F64), rtol=1e-9)


@pytest.mark.parametrize("variable", ["t", "rho", "log_rho"])
def test_the_order_of_deis_falls_at_the_end(variable: str) -> None:
    """lower_order_final: at most as many answers as steps are left; without it always three."""
    times = UniformTime(end=0.1)(VPLinear(), 8)
    for lowered, last in ((True, [3, 2, 1]), (False, [3, 3, 3])):
        made = plan(DEIS(3, variable, lowered), VPLinear(), times)
        assert (made.B[-3:] != 0).sum(1).tolist() == last


def test_the_length_of_a_correction() -> None:
    """2011.13456, algorithm 5: step = 2 alpha_i (snr |xi| / |score|)^2, alpha_i = 1 - beta_i = (alpha_s / alpha_s')^2."""
    schedule, snr = Discrete.linear(), 0.16
    times = torch.tensor([0.9, 0.7, 0.4, 0.0], dtype=F64)
    coroutine = PredictorCorrector(snr=snr).steps(
        schedule, torch.ones(1, 6, dtype=F64), times, lambda: torch.zeros(1, 6, dtype=F64)
    )
    query = next(coroutine)
    query = coroutine.send(0.2 * query.x)  # the corrector asks at s = .7
    z, x0 = query.x, 0.1 * query.x
    assert float(query.t) == pytest.approx(0.7)
    corrected = coroutine.send(x0).x
    score = (schedule.alpha(0.7) * x0 - z) / schedule.sigma(0.7) ** 2
    one_minus_beta = (schedule.alpha(0.7) / schedule.alpha(0.4)) ** 2
    step = 2 * one_minus_beta * snr**2 / score.square().mean()  # |xi|^2 is its mean, the dimension
    torch.testing.assert_close(corrected, z + step * score, rtol=1e-9, atol=1e-12)


def test_the_tolerance_of_the_adaptive_step_remembers_the_first_order_state() -> None:
    """2105.14080, algorithm 1: delta = max(e_abs, e_rel max(|x'|, |x'_prev|)), x'_prev the Euler state, not x''."""
    g = torch.Generator().manual_seed(0)
    run = _Run(AdaptiveSDE(e_rel=0.5), torch.randn(3, 8, generator=g, dtype=F64), 0.8,
               lambda: torch.randn(3, 8, generator=g, dtype=F64))  # fmt: skip
    rows, u_end = torch.arange(3), 1e-3

    def slope(x: Tensor, u: Tensor) -> Tensor:
        return _drift(x, 0.3 * x, u)

    run.begin(rows, slope(run.x, run.u), u_end)
    first = run.guess.clone()
    run.finish(rows, slope(run.guess, run.u - run.h), u_end)
    assert bool((~run.trying).all()), "the step is accepted"
    assert torch.equal(run.before, first) and not torch.allclose(run.x, first)


def test_conditions_that_are_not_of_the_batch_stay_whole() -> None:
    """A query of two states a sample repeats what has an entry for each of the B samples, and nothing else."""

    class Asks:
        linear, order = False, 1

        def nfe(self, steps: int) -> None:
            return None

        def steps(self, schedule: Any, x: Tensor, times: Tensor, noise: Any) -> Any:
            yield Query(x.repeat(2, 1), torch.full((6,), 0.5, dtype=F64))
            yield Query(x[:2], torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([2, 0]))
            return x

    class Net(nn.Module):
        schedule = VPLinear()
        seen: list[dict[str, Any]] = []

        def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            self.seen.append(cond)
            return x

    net, table = Net(), torch.arange(5.0)
    cond = {"label": torch.tensor([3, 4, 5]), "table": table, "scale": torch.tensor(2.0)}
    walk(Asks(), net, torch.zeros(3, 2), UniformLambda()(VPLinear(), 2), cond=cond)
    assert net.seen[0]["label"].tolist() == [3, 4, 5, 3, 4, 5] and net.seen[1]["label"].tolist() == [5, 3]
    assert all(torch.equal(each["table"], table) and each["scale"].ndim == 0 for each in net.seen)


@pytest.mark.parametrize("sampler", [Heun(), PLMS(), PLMS(start="ramp")], ids=str)
def test_lowering_the_order_at_the_clean_end(sampler: Any) -> None:
    """With 2 steps from q = 152 the methods as published give 76 standard deviations; lowered they stay in range."""
    import dataclasses

    lowered = dataclasses.replace(sampler, lower_order_final=True)
    times = UniformLambda()(VPLinear(), 2)
    if sampler.start == "heun" if isinstance(sampler, PLMS) else True:
        assert plan(sampler, VPLinear(), times).gain > 50
    assert plan(lowered, VPLinear(), times).gain < 1.5
    for steps in (1, 2, 3, 6):
        made = plan(lowered, VPLinear(), UniformLambda()(VPLinear(), steps))
        assert made.nfe == lowered.nfe(steps)
        assert made.B[-1, :-1].abs().max() == 0 if steps > 1 else True
    whole = UniformTime(end=0.2)(VPLinear(), 5)  # a grid that does not end at the image has nothing to lower
    assert (
        plan(lowered, VPLinear(), whole).to_json().split('"times"')[1]
        == (plan(sampler, VPLinear(), whole).to_json().split('"times"')[1])
    )


def test_a_plan_that_blows_values_up_is_warned_of() -> None:
    import warnings

    from hasten.exact import m2
    from hasten.plan.draw import _cached, draw
    from hasten.sampling import Noise

    _cached.cache_clear()
    noise = Noise([0], (2,))
    with pytest.warns(UserWarning, match=r"heun with 2 steps gives values of about 76 .* heun:lower_order_final=true"):
        draw(m2(VPLinear()), Heun(), UniformLambda(), noise, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sampler, steps in ((Heun(lower_order_final=True), 2), (Heun(), 8), (DEIS(3), 3), (PLMS(), 6)):
            draw(m2(VPLinear()), sampler, UniformLambda(), noise, steps=steps)
