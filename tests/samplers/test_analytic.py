"""Analytic-DPM: exact on Gaussians, equal to DDPM and DDIM where it must be, its bounds, and its tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.pick import format_spec
from hasten.plan import plan
from hasten.samplers import DDIM, DDPM
from hasten.samplers.analytic import PIXEL, AnalyticDPM, Curve, curve
from hasten.sampling import Query
from hasten.schedules import EDM, VE, Discrete, Flow, Schedule, SubVP, VPCosine, VPLinear
from tests.samplers.problems import F64, Basis, drive

SCHEDULES = [VPLinear(), VPCosine(), VPCosine(offset=0.0), SubVP(), VE(), EDM(), Flow(), Discrete.linear()]


def exact_gamma(schedule: Schedule, v: float) -> Callable[[Tensor], Tensor]:
    return lambda t: schedule.sigma(t) ** 2 / (schedule.alpha(t) ** 2 * v + schedule.sigma(t) ** 2)


def exact_mse(schedule: Schedule, v: float) -> Callable[[Tensor], Tensor]:
    return lambda t: v * exact_gamma(schedule, v)(t)


def states(sampler: Any, schedule: Schedule, times: Tensor, v: float = 0.25, mean: float = 0.3) -> list[Tensor]:
    """(mean, variance) of the state at every node, exactly, from the true law at times[0], for data N(mean, v)."""
    basis, found = Basis(len(times) + 2), []

    def look(z: Tensor) -> Tensor:
        return torch.stack([z[-1], z[:-1].square().sum()])

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        found.append(look(z))
        a, s = schedule.alpha(t), schedule.sigma(t)
        one = torch.zeros_like(z)
        one[-1] = mean
        return one + a * v / (a**2 * v + s**2) * (z - a * one)

    a, s = schedule.alpha(times[0]), schedule.sigma(times[0])
    x = torch.sqrt(a**2 * v + s**2) * basis()
    x[-1] = a * mean
    z, _ = drive(sampler, schedule, denoise, x, times, basis)
    return [*found, look(z)]


def indices(K: int) -> Tensor:
    """The sheet's K nodes of the table of 1000, then the clean end."""
    nodes = (torch.linspace(999, 0, K, dtype=F64).round() + 1) / 1000
    return torch.cat([nodes, torch.zeros(1, dtype=F64)])


@pytest.mark.parametrize(
    ("K", "large", "small", "ddim"),
    [
        (1000, 0.250752, 0.246125, 0.248490),
        (100, 0.258652, 0.218981, 0.236041),
        (20, 0.298455, 0.150507, 0.185283),
        (10, 0.358521, 0.104222, 0.130759),
        (5, 0.558423, 0.043970, 0.050644),
        (2, None, None, None),
    ],
)
@pytest.mark.parametrize("form", ["ddpm", "ddim"])
def test_the_variance_of_a_gaussian_is_exact_at_every_number_of_steps(
    form: str, K: int, large: float | None, small: float | None, ddim: float | None
) -> None:
    """The sheet's table: data N(.3, .25), the linear table, from the exact law at index 999; the others for contrast.

    What the last denoising leaves out is C at index 0, which is .0001: with it the variance is .25 to rounding.
    """
    schedule = Discrete.linear()
    times, gamma = indices(K), exact_gamma(schedule, 0.25)
    sampler = AnalyticDPM(form, gamma=gamma, pixels=0)
    found = states(sampler, schedule, times)
    for t, (mean, variance) in zip(times[:-1], found):
        assert variance.item() == pytest.approx(
            float(schedule.alpha(t) ** 2 * 0.25 + schedule.sigma(t) ** 2), abs=1e-10
        )
        assert mean.item() == pytest.approx(0.3 * float(schedule.alpha(t)), abs=1e-10)
    left = exact_mse(schedule, 0.25)(times[-2]).item()
    assert found[-1][1].item() + left == pytest.approx(0.25, abs=1e-10)
    assert found[-1][0].item() == pytest.approx(0.3, abs=1e-10)
    if small is not None and form == "ddpm":
        for other, value in ((DDPM("large"), large), (DDPM(), small), (DDIM(), ddim)):
            assert states(other, schedule, times)[-1][1].item() == pytest.approx(value, abs=5e-7)


def test_the_moments_of_the_sheet() -> None:
    schedule = Discrete.linear()
    t = (torch.tensor([0, 10, 100, 500, 999], dtype=F64) + 1) / 1000
    gamma = exact_gamma(schedule, 0.25)(t)
    C = torch.exp(-2 * schedule.lam(t)) * (1 - gamma)
    torch.testing.assert_close(gamma, torch.tensor([0.0004, 0.0087, 0.3191, 0.9793, 1.0], dtype=F64), rtol=0, atol=6e-5)
    expected = torch.tensor([0.00010, 0.00218, 0.07977, 0.24484, 0.25], dtype=F64)
    torch.testing.assert_close(C, expected, rtol=0, atol=2e-5)
    sampler = AnalyticDPM(gamma=exact_gamma(schedule, 0.25))
    path = [node_at(schedule, value) for value in t]
    torch.testing.assert_close(torch.stack([sampler.variance(schedule, r) for r in path]), C, rtol=1e-9, atol=0)


def node_at(schedule: Schedule, t: Tensor) -> Any:
    from hasten.samplers._exponential import make_node

    return make_node(schedule, t)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("form", ["ddpm", "ddim"])
@pytest.mark.parametrize("K", [2, 5])
def test_exact_on_every_schedule_from_end_to_end(schedule: Schedule, form: str, K: int) -> None:
    times = torch.linspace(schedule.t_max, 0, K + 1, dtype=F64)
    law = schedule.alpha(times) ** 2 * 0.25 + schedule.sigma(times) ** 2
    by_error = AnalyticDPM(form, "mse", mse=exact_mse(schedule, 0.25), pixels=0)
    by_gamma = AnalyticDPM(form, gamma=exact_gamma(schedule, 0.25), pixels=0)
    # Gam says nothing at alpha = 0, where it stands at q = 1000; far out 1 - Gam loses digits as q^2
    q2 = float(schedule.q(times[0])) ** 2
    for sampler, limit in ((by_error, 1e-10), (by_gamma, 1e-6 if math.isinf(q2) else 1e-10 + 1e-15 * q2)):
        found = torch.stack(states(sampler, schedule, times))[:-1, 1]
        torch.testing.assert_close(found / law[:-1], torch.ones(K, dtype=F64), rtol=0, atol=limit)


@pytest.mark.parametrize("form", ["ddpm", "ddim"])
def test_with_gamma_one_it_is_ddpm_or_ddim(form: str) -> None:
    """Gam = 1 (and what an estimate may say beyond it) is data without variance: the noise is that of a known x."""
    schedule, times = VPCosine(offset=0.0), torch.linspace(1, 0, 8, dtype=F64)
    other = DDPM() if form == "ddpm" else DDIM()
    for value in (1.0, 1.3):
        sampler = AnalyticDPM(form, gamma=lambda t, value=value: torch.full_like(t, value))
        for one, two in zip(states(sampler, schedule, times), states(other, schedule, times)):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_the_bounds_of_the_paper() -> None:
    schedule, times = VPLinear(), torch.tensor([1.0, 0.5, 0.02, 0.01, 0.0], dtype=F64)
    huge = AnalyticDPM("ddim", "mse", mse=lambda t: torch.full_like(t, 9.0), pixels=0)
    V = huge.variances(schedule, times)
    one = AnalyticDPM("ddim", "mse", mse=lambda t: torch.ones_like(t), pixels=0).variances(schedule, times)
    torch.testing.assert_close(V, one)  # C <= half_range^2
    wide = AnalyticDPM("ddim", "mse", half_range=2.0, mse=lambda t: torch.full_like(t, 9.0), pixels=0)
    torch.testing.assert_close(wide.variances(schedule, times), 4 * one)
    # the measured error bounds a gamma that the network's errors spoiled, and is as good as it where it is exact
    spoiled = AnalyticDPM(gamma=exact_gamma(schedule, 0.9), mse=exact_mse(schedule, 0.25))
    exact = AnalyticDPM(gamma=exact_gamma(schedule, 0.25))
    torch.testing.assert_close(spoiled.variances(schedule, times), exact.variances(schedule, times))
    for form, pixels in (("ddpm", None), ("ddim", None), ("ddim", 3.0)):
        k = pixels or {"ddpm": 2.0, "ddim": 1.0}[form]
        bounded = AnalyticDPM(form, "mse", mse=lambda t: torch.ones_like(t), pixels=pixels)
        free = AnalyticDPM(form, "mse", mse=lambda t: torch.ones_like(t), pixels=0)
        fine = torch.tensor([1.0, 0.5, 0.04, schedule.time(-math.log(0.99 * k * PIXEL)).item(), 0.0], dtype=F64)
        V, V_free = bounded.variances(schedule, fine), free.variances(schedule, fine)
        torch.testing.assert_close(V[:-1], V_free[:-1])  # only the last noisy step is bounded
        assert V_free[-1] > V[-1] and V[-1].item() == pytest.approx((k * PIXEL) ** 2)
        # never below the noise that is there for a known x, and not where a coarse grid ends its noise above it
        least = AnalyticDPM(form, "mse", mse=lambda t: 0 * t).variances(schedule, fine)[-1]
        assert V[-1] >= least
        fine[-2] = schedule.time(-math.log(1.01 * k * PIXEL))
        torch.testing.assert_close(bounded.variances(schedule, fine), free.variances(schedule, fine))


SCALES = torch.tensor([1e-4, 3e-3, 0.02, 0.3, 1.5], dtype=F64)


def many_scales(q: Tensor) -> Tensor:
    """C of data with five very different variances, in closed form."""
    return (SCALES * q[..., None] ** 2 / (SCALES + q[..., None] ** 2)).mean(-1)


def test_tables_are_interpolated_to_the_fourth_digit() -> None:
    """From 64 times in lam; Gam itself, read linearly in time or in lam, is fifty times further off."""
    schedule = VPCosine(offset=0.0)
    t = torch.cat([schedule.time(torch.linspace(5.0, -5.0, 63, dtype=F64)), torch.ones(1, dtype=F64)])
    q = schedule.q(t)
    gamma = torch.where(torch.isinf(q), 1.0, 1 - many_scales(q) / q**2)
    known = (tuple(t.tolist()), tuple(gamma.tolist()))
    lam = torch.linspace(4.97, -4.97, 401, dtype=F64)
    found, exact = curve(known, schedule)(lam), many_scales(torch.exp(-lam))
    error = (found / exact - 1).abs().max().item()
    assert error < 2e-4
    assert bool((found.diff() >= 0).all())
    knots = -torch.linspace(5.0, -5.0, 63, dtype=F64)
    linear = torch.from_numpy(np.interp(-lam.numpy(), knots.numpy(), gamma[:-1].numpy()))
    worse = (torch.exp(-2 * lam) * (1 - linear) / exact - 1).abs().max().item()
    assert worse > 50 * error
    # beyond the table: Gam stays below it, C above it
    below = curve(known, schedule)(torch.tensor([6.0, 8.0], dtype=F64))
    assert (below[0] / below[1]).log().item() == pytest.approx(4.0)
    above = curve(known, schedule)(torch.tensor([-6.0, -math.inf], dtype=F64))
    torch.testing.assert_close(
        above, many_scales(torch.exp(torch.tensor([5.0], dtype=F64))).expand(2), rtol=1e-9, atol=0
    )


def test_a_noisy_table_still_gives_a_variance_that_grows_with_the_noise() -> None:
    schedule = VPLinear()
    t = torch.linspace(0.001, 1, 40, dtype=F64)
    q = schedule.q(t)
    noisy = many_scales(q) * (1 + 0.3 * torch.cos(9.0 * torch.arange(40)))
    known = (tuple(t.tolist()), tuple((1 - noisy / q**2).tolist()))
    lam = torch.linspace(float(schedule.lam(t[0])), float(schedule.lam(t[-1])), 300, dtype=F64)
    found = curve(known, schedule)(lam)
    assert bool((found.diff() >= -1e-12 * found[1:]).all()) and bool((found > 0).all())


def test_the_curve_is_differentiable_and_exact_on_straight_lines() -> None:
    lam = torch.tensor([-2.0, -1.5, 0.0, 0.3, 2.0], dtype=F64)
    line = Curve(lam, torch.exp(-0.7 * lam + 0.2))
    at = torch.linspace(-2, 2, 33, dtype=F64)
    torch.testing.assert_close(line(at), torch.exp(-0.7 * at + 0.2), rtol=1e-12, atol=0)
    bent = Curve(lam, many_scales(torch.exp(-lam)))
    inner = torch.tensor([-1.7, -0.3, 0.1, 1.1, 2.4], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(bent, inner)
    schedule = VPLinear()
    known = (tuple(torch.linspace(0.01, 1, 9).tolist()), tuple(torch.linspace(0.1, 0.99, 9).tolist()))
    times = torch.tensor([1.0, 0.6, 0.2, 0.0], dtype=F64, requires_grad=True)
    plan(AnalyticDPM(gamma=known), schedule, times).C.sum().backward()
    assert bool(torch.isfinite(times.grad).all()) and times.grad[1:3].abs().min() > 0


def test_the_optimal_variance_is_the_least_divergence_on_a_mixture() -> None:
    """For the mixture M2 with C by the denoiser's own second moment: of all multiples of V, V itself has the least mean
    divergence between q(z_s|z_r, x) and the step, over data and noise."""
    from hasten.exact import m2

    schedule = VPCosine()
    model = m2(schedule)
    x = model.sample(20_000, torch.Generator().manual_seed(0))
    times = torch.tensor([0.6, 0.3, 0.0], dtype=F64)
    a, s = schedule.alpha(times), schedule.sigma(times)
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    x0 = model(a[0] * x + s[0] * e, times[0])
    eps = e + (a[0] / s[0]) * (x - x0)
    gamma = eps.square().mean()
    V = AnalyticDPM(gamma=lambda t: gamma, pixels=0).variances(schedule, times)
    f = -torch.expm1(2 * (schedule.lam(times[0]) - schedule.lam(times[1])))
    bt, gain = s[1] ** 2 * f, a[1] * f
    miss = (gain * (x - x0)).square().mean()

    def divergence(V: Tensor) -> float:
        return float(0.5 * (bt / V - torch.log(bt / V) - 1 + miss / V))

    best = divergence(V[0])
    assert all(best < divergence(V[0] * k) for k in (0.9, 0.95, 1.05, 1.1))
    assert best < 0.9 * min(divergence(bt), divergence(s[0] ** 2 * f))


def test_it_says_what_it_needs_and_binds_to_it() -> None:
    t = torch.linspace(0.01, 1, 5, dtype=F64)
    statistics = {"gamma_times": t, "gamma": t, "mse_times": t, "mse": 0.3 * t}
    for form, moments in (("ddpm", "gamma"), ("ddim", "mse")):
        sampler = AnalyticDPM(form, moments)
        with pytest.raises(BadInput, match="hasten tune MODEL --method moments --data IMAGES"):
            sampler.bind({}, {})
        with pytest.raises(BadInput, match="needs"):
            drive(sampler, VPLinear(), lambda z, t: z, torch.ones(1), torch.tensor([1.0, 0.5, 0.0]), lambda: 0.0)
        bound = sampler.bind(statistics, {})
        assert bound.bind({}, {}) is bound and hash(bound) == hash(sampler.bind(statistics, {}))
        assert format_spec(bound) == format_spec(sampler) and bound == sampler.bind(statistics, {})
        compiled = plan(bound, VPCosine(offset=0.0), torch.linspace(1, 0, 6, dtype=F64))
        assert compiled.nfe == bound.nfe(5) == 5 and compiled.C.count_nonzero() == 4
    with pytest.raises(BadInput, match="ddim"):
        AnalyticDPM("dimm")
    with pytest.raises(BadInput, match="mse"):
        AnalyticDPM(moments="ms")
    with pytest.raises(BadInput, match="pixels"):
        AnalyticDPM(pixels=-1.0)


def test_one_step_asks_once_and_adds_no_noise() -> None:
    walker = AnalyticDPM(gamma=lambda t: 0.5 + 0 * t).steps(VPLinear(), torch.ones(1), torch.tensor([1.0, 0.0]), None)  # type: ignore[arg-type]
    query = next(walker)
    assert isinstance(query, Query)
    with pytest.raises(StopIteration) as stop:
        walker.send(torch.full((1,), 0.25))
    assert stop.value.value.item() == 0.25
