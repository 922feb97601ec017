"""The predictors are the paper's rules on every schedule; the corrector pulls a wrong distribution right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput, HastenError
from hasten.exact import Gaussian, g8
from hasten.pick import format_spec
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers import DDPM
from hasten.samplers.predictor_corrector import PREDICTORS, PredictorCorrector, _rates
from hasten.sampling import Count, Noise, walk
from hasten.schedules import VE, Discrete, SubVP, VPLinear
from hasten.times import UniformLambda, UniformTime
from tests.samplers.problems import ALL, F64, ends

over_schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))
DIMENSIONS = torch.arange(8, dtype=F64)


def step(sampler: Any, schedule: Any, times: list[float], z: Tensor, x0: Tensor, xi: Tensor) -> Tensor:
    """One predictor step between two positive times, by the table of the sampler."""
    table = plan(sampler, schedule, torch.tensor(times, dtype=F64))
    return table.a[0] * z + table.B[0, 0] * x0 + table.C[0, 0] * xi


def test_the_predictors_are_those_of_the_paper() -> None:
    z, x0, xi = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    table = Discrete.linear()
    b = torch.linspace(1e-4, 0.02, 1000, dtype=F64)[700]
    times = [0.701, 0.7]
    score = -(z - table.alpha(0.701) * x0) / table.sigma(0.701) ** 2
    reverse = step(PredictorCorrector(corrections=0), table, times, z, x0, xi)
    torch.testing.assert_close(reverse, (2 - (1 - b).sqrt()) * z + b * score + b.sqrt() * xi, rtol=1e-10, atol=1e-10)
    large = step(PredictorCorrector("ancestral", 0, variance="large"), table, times, z, x0, xi)
    torch.testing.assert_close(large, (z + b * score) / (1 - b).sqrt() + b.sqrt() * xi, rtol=1e-10, atol=1e-10)

    ve, times = VE(), [0.7, 0.68]
    r, s = ve.sigma(0.7) ** 2, ve.sigma(0.68) ** 2
    score = -(z - x0) / r
    reverse = step(PredictorCorrector(corrections=0), ve, times, z, x0, xi)
    torch.testing.assert_close(reverse, z + (r - s) * score + (r - s).sqrt() * xi, rtol=1e-10, atol=1e-10)
    small = step(PredictorCorrector("ancestral", 0), ve, times, z, x0, xi)
    torch.testing.assert_close(small, z + (r - s) * score + (s * (r - s) / r).sqrt() * xi, rtol=1e-10, atol=1e-10)

    for schedule in (VPLinear(), SubVP()):
        beta, far = 0.1 + 19.9 * 0.7, torch.tensor(0.1 * 0.7 + 19.9 * 0.7**2 / 2, dtype=F64)
        g2 = beta * (-torch.expm1(-2 * far)) if isinstance(schedule, SubVP) else torch.tensor(beta, dtype=F64)
        score = -(z - schedule.alpha(0.7) * x0) / schedule.sigma(0.7) ** 2
        euler = step(PredictorCorrector("euler_maruyama", 0), schedule, [0.7, 0.69], z, x0, xi)
        expected = z - 0.01 * (-0.5 * beta * z - g2 * score) + (0.01 * g2).sqrt() * xi
        torch.testing.assert_close(euler, expected, rtol=1e-10, atol=1e-10)


@over_schedules
def test_the_rates_are_those_of_the_forward_process(schedule: Any) -> None:
    """f and g^2 take alpha and sigma^2 from t to t + h: alpha' = f alpha, (sigma^2)' = 2 f sigma^2 + g^2."""
    t, h = torch.tensor(0.43217, dtype=F64), 1e-6
    f, g2 = _rates(schedule, t)
    alpha, variance = schedule.alpha(t), schedule.sigma(t) ** 2
    slopes = [(c(t + h) - c(t - h)) / (2 * h) for c in (schedule.alpha, lambda t: schedule.sigma(t) ** 2)]
    torch.testing.assert_close(f * alpha, slopes[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(2 * f * variance + g2, slopes[1], rtol=1e-6, atol=1e-7)


@over_schedules
def test_ancestral_without_corrections_is_ddpm(schedule: Any) -> None:
    for variance in ("small", "large"):
        ours = plan(PredictorCorrector("ancestral", 0, variance=variance), schedule, ends(schedule, 9))
        theirs = plan(DDPM(variance), schedule, ends(schedule, 9))
        rows = slice(1 if schedule.zero_snr else 0, None)  # from alpha = 0 it takes the small variance
        for name in ("a", "B", "C"):
            a, b = getattr(ours, name)[rows], getattr(theirs, name)[rows]
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def variance_errors(sampler: Any, schedule: Any, times: Tensor) -> Tensor:
    """Relative error of the variance of each dimension of G8 at the end, exact, of a linear sampler."""
    exact = g8(schedule)
    return plan(sampler, schedule, times).marginals(exact.mean, exact.variance)[1][-1] / exact.variance - 1


@pytest.mark.parametrize(
    ("predictor", "steps", "bar"),
    [("euler_maruyama", 100, 0.086), ("euler_maruyama", 1000, 0.047), ("reverse_diffusion", 1000, 0.056)],
)
def test_variance_of_a_gaussian(predictor: str, steps: int, bar: float) -> None:
    """The bars are estimates from samples; the errors are .034, .001 and .012."""
    errors = variance_errors(PredictorCorrector(predictor, 0), VPLinear(), UniformTime()(VPLinear(), steps))
    assert errors.abs().max() < bar, errors


@over_schedules
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_order_in_law_from_end_to_end(predictor: str, schedule: Any) -> None:
    """On every schedule, alpha = 0 and sigma = 0 included, the variance converges at order 1."""
    sampler = PredictorCorrector(predictor, 0)
    coarse, fine = (
        variance_errors(sampler, schedule, UniformLambda(low=schedule.time(-math.log(0.004)).item())(schedule, n))
        .abs()
        .max()
        for n in (80, 320)
    )
    assert math.log(coarse / fine) / math.log(4) > 0.8, (coarse, fine)
    assert fine < 0.11


def tiled(schedule: Any, copies: int) -> Gaussian:
    """G8 with every dimension repeated: images have many entries, of which the corrector's norm is a mean."""
    mean, v = (0.3 * DIMENSIONS.cos(), 0.25 / (DIMENSIONS + 1))
    return Gaussian(mean[:, None].expand(8, copies), v[:, None].expand(8, copies), schedule)


def measured(model: Gaussian, z: Tensor) -> Tensor:
    return ((z - model.mean).square() / model.variance).mean((0, 2)) - 1


def test_with_a_corrector() -> None:
    """500 steps with a correction each: the variance errs by less than .049 (800 entries; sampling error .010)."""
    schedule, g = VPLinear(), torch.Generator().manual_seed(0)
    model = Count(tiled(schedule, 100))
    sampler = PredictorCorrector()

    def noise() -> Tensor:
        return torch.randn(200, 8, 100, generator=g, dtype=F64)

    z = walk(sampler, model, noise(), UniformTime()(schedule, 500), noise)
    assert model.calls == sampler.nfe(500) == 999
    errors = measured(model.denoiser, z)
    assert errors.abs().max() < 0.049, errors


def test_corrections_repair_a_wrong_distribution() -> None:
    """From starts far too narrow and far too wide, the corrector at the second time brings them to what it should be."""
    schedule, g = VPLinear(), torch.Generator().manual_seed(0)
    model = tiled(schedule, 50)
    times = torch.tensor([0.31, 0.3, 0.2999], dtype=F64)
    alpha, sigma = schedule.alpha(times[-1]), schedule.sigma(times[-1])

    def noise() -> Tensor:
        return torch.randn(40, 8, 50, generator=g, dtype=F64)

    def spread(start: Tensor, corrections: int) -> float:
        z = walk(PredictorCorrector(corrections=corrections, snr=0.1), model, start, times, noise)
        return ((z - alpha * model.mean) ** 2 / (alpha**2 * model.variance + sigma**2)).mean().item()

    narrow, wide = torch.zeros(40, 8, 50, dtype=F64), 2 * noise()
    assert spread(narrow, 0) < 0.4 and spread(wide, 0) > 3
    assert spread(narrow, 100) == pytest.approx(1.0, abs=0.04)
    assert spread(wide, 400) == pytest.approx(1.0, abs=0.06)


@over_schedules
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_both_ends_of_every_schedule(predictor: str, schedule: Any) -> None:
    """Finite, of the start's dtype, at the declared cost, and the right mean: to sampling error."""
    noise = Noise(range(64), (8, 10), dtype=torch.float32)
    counted = Count(tiled(schedule, 10))
    sampler = PredictorCorrector(predictor)
    z = draw(counted, sampler, UniformTime(), noise, steps=60)
    assert z.dtype == torch.float32 and bool(torch.isfinite(z).all())
    assert counted.calls == sampler.nfe(60) == 119
    model = counted.denoiser
    assert (z.mean((0, 2)) - model.mean[:, 0]).abs().max() < 0.12
    assert measured(model, z).abs().max() < 0.75


def test_a_sample_does_not_see_its_neighbours() -> None:
    model, times = g8(ALL["Flow"]), ends(ALL["Flow"], 12)
    together = draw(model, PredictorCorrector(), times, Noise([5, 6, 7], (8,), dtype=F64))
    alone = [draw(model, PredictorCorrector(), times, Noise([k], (8,), dtype=F64)) for k in (5, 6, 7)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-11, atol=1e-11)


def test_it_says_why_it_is_not_a_table() -> None:
    with pytest.raises(HastenError, match="cannot be compiled to a plan: the step of a correction follows the norm"):
        plan(PredictorCorrector(), VPLinear(), ends(VPLinear(), 4))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"predictor": "ancestal"}, "did you mean 'ancestral'"),
        ({"variance": "smal"}, "did you mean 'small'"),
        ({"corrections": -1}, "corrections must not be negative"),
        ({"snr": 0.0}, "snr must be positive"),
    ],
)
def test_bad_options(options: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        PredictorCorrector(**options)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_nothing_is_recorded(guard: Any) -> None:
    schedule, sampler = VPLinear(), PredictorCorrector("euler_maruyama")
    draws = [Noise([3], (8,), dtype=F64) for _ in range(2)]
    plain = draw(g8(schedule), sampler, ends(schedule, 10), draws[0])
    with guard():
        torch.testing.assert_close(draw(g8(schedule), sampler, ends(schedule, 10), draws[1]), plain)


def test_it_is_spelled() -> None:
    assert format_spec(PredictorCorrector("ancestral", 2)) == "predictor_corrector:predictor=ancestral,corrections=2"


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
