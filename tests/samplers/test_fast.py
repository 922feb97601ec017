"""FastDPM: the bijection, the bisection, and what STEP and VAR must be equal to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import g8, m2
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers import DDIM, DDPM
from hasten.samplers.fast import FastDPM, log_bijection, short_chain, var_times
from hasten.sampling import Noise
from hasten.schedules import EDM, Discrete, Flow, VPCosine, VPLinear
from hasten.times import UniformTime
from tests.samplers.problems import F64

TABLE = Discrete.linear()
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)


def run(sampler: Any, schedule: Any, times: Tensor) -> Tensor:
    return draw(m2(schedule), sampler, times, Noise(range(4), (2,), dtype=F64))


def test_the_bijection_is_the_table_at_whole_steps() -> None:
    """log R, by lgamma, against the cumulative product of all 1000 steps."""
    t = torch.arange(1001, dtype=F64)
    exact = 0.5 * torch.cat([torch.zeros(1, dtype=F64), torch.log1p(-BETAS).cumsum(0)])
    error = (log_bijection(t, 1e-4, 0.02, 1000) - exact).abs().max().item()
    assert error < 2e-10
    torch.testing.assert_close(torch.log(TABLE.alpha(t / 1000)), exact, rtol=1e-12, atol=1e-14)


def test_straight_lines_stand_for_the_bijection_between_the_steps() -> None:
    """The two differ least where betas are small, and by less than 3e-6 in log alpha anywhere."""
    t = torch.arange(0, 1000, dtype=F64) + 0.5
    off = (log_bijection(t, 1e-4, 0.02, 1000) - torch.log(TABLE.alpha(t / 1000))).abs()
    assert 1e-7 < off.max().item() < 3e-6


@pytest.mark.parametrize("family", ["linear", "quadratic"])
@pytest.mark.parametrize("S", [2, 3, 10, 50, 200])
def test_the_bisection_gives_the_product(family: str, S: int) -> None:
    abar = float(torch.exp(torch.log1p(-BETAS).sum()))
    betas = short_chain(S, 1e-4, abar, family)
    assert float(torch.exp(torch.log1p(-betas).sum())) == pytest.approx(abar, rel=1e-10)
    assert betas[0].item() == pytest.approx(1e-4) and bool((betas.diff() > 0).all()) and betas[-1] < 1
    root = betas if family == "linear" else betas.sqrt()
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(S - 1), rtol=1e-9, atol=1e-15)


def test_var_with_the_models_own_betas_is_the_models_own_steps() -> None:
    """1000 linear betas from the first with the table's product are the table's: times 1 .. 1000, to 1e-6 of a step."""
    times = torch.arange(1000, -1, -1, dtype=F64) / 1000
    found = var_times(TABLE, times, "linear")
    assert ((found - times).abs().max() * 1000).item() < 1e-6


def test_step_with_all_steps_and_kappa_one_is_ddpm() -> None:
    schedule = Discrete.linear(60, 1e-3, 0.3)
    times = torch.arange(60, -1, -1, dtype=F64) / 60
    one, two = (run(s, schedule, times) for s in (FastDPM("step", kappa=1.0), DDPM()))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(offset=0.0), EDM(), Flow()], ids=lambda s: type(s).__name__)
def test_it_is_ddim_with_eta_kappa_on_its_times(kappa: float, schedule: Any) -> None:
    times = UniformTime()(schedule, 7)
    for mode in ("step", "var"):
        its = times if mode == "step" else var_times(schedule, times)
        compiled = plan(FastDPM(mode, kappa=kappa), schedule, times)
        torch.testing.assert_close(compiled.times, its, rtol=0, atol=0)
        other = plan(DDIM(kappa), schedule, its)
        for a, b in ((compiled.B, other.B), (compiled.C, other.C), (compiled.a, other.a)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["linear", "quadratic"])
@pytest.mark.parametrize(
    "schedule", [VPLinear(), VPCosine(), VPCosine(offset=0.0), EDM(), Flow(), TABLE], ids=lambda s: type(s).__name__
)
def test_the_chain_asks_where_its_levels_are(family: str, schedule: Any) -> None:
    """Ratios of abar at the queried times are 1 - eta of a family: linear in i, or its square root is."""
    times = UniformTime(low=schedule.time(4.0).item())(schedule, 12)
    its = var_times(schedule, times, family)
    assert its[0] == times[0] and its[-2] == times[-2] and its[-1] == 0 and bool((its.diff() < 0).all())
    lam = schedule.lam(its[:-1]).flip(0)
    lam = torch.where(torch.isinf(lam), -math.log(150.0), lam)
    log_abar = torch.nn.functional.logsigmoid(2 * lam)
    eta = -torch.expm1(torch.cat([log_abar[:1], log_abar.diff()]))
    root = eta if family == "linear" else eta.sqrt()
    torch.testing.assert_close(root.diff(), root.diff()[:1].expand(11), rtol=1e-6, atol=1e-9)
    assert bool((root.diff() > 0).all())


def test_more_of_its_steps_are_better() -> None:
    """The default converges to the probability-flow endpoint of a Gaussian, at order 1."""
    schedule = VPLinear()
    model, errors = g8(schedule), []
    for steps in (20, 80):
        times = UniformTime()(schedule, steps)
        noise = Noise(range(64), (8,), dtype=F64)
        x = noise.initial()
        errors.append(
            (draw(model, FastDPM(), times, noise) - model.endpoint(x, times[0])).square().mean().sqrt().item()
        )
    assert math.log(errors[0] / errors[1]) / math.log(4) > 0.7 and errors[1] < 0.05


def test_refusals() -> None:
    with pytest.raises(BadInput, match="quadratic"):
        FastDPM(schedule="quadratik")
    with pytest.raises(BadInput, match="step"):
        FastDPM("stap")
    with pytest.raises(BadInput, match=r"\[0, 1\]"):
        FastDPM(kappa=1.5)
    with pytest.raises(BadInput, match="fewer steps"):
        short_chain(50, 0.2, 0.01)
    # few steps always fit; two are given outright
    times = torch.tensor([1.0, 0.01, 0.0], dtype=F64)
    torch.testing.assert_close(var_times(VPLinear(), times), times, rtol=0, atol=0)
    part = torch.tensor([1.0, 0.7, 0.3, 0.1], dtype=F64)  # and part of a chain is taken as it is
    torch.testing.assert_close(var_times(VPLinear(), part), part, rtol=0, atol=0)
