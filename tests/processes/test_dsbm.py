"""Schroedinger bridge between N(-.5, 1) and N(.5, 1), reference Brownian motion of variance 1: covariance (sqrt(5) - 1) / 2.

Everything is normal and affine, so that Markovian fitting and IPF are run exactly, on coefficients of the noises.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import BadInput
from hasten.plan import plan
from hasten.processes.dsbm import DSBM, mean_matching_target
from hasten.processes.i2sb import I2SB
from hasten.samplers.dsbm import DSBMSampler
from hasten.samplers.i2sb import I2SBSampler
from hasten.sampling import Noise, walk
from hasten.schedules import schedule_from_dict

from .bridge_runs import F64, NormalTarget, even, unit

GOLDEN = (math.sqrt(5) - 1) / 2


def normal_denoiser(process: DSBM, start: float, end: float, variances: tuple[float, float], k: float) -> Callable:
    """E[x_0 | z_t] for normal ends: y ~ (start, variances[0]), x_0 ~ (end, variances[1]), covariance k."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        a, b, c = process.coefficients(t)
        total = a**2 * variances[0] + b**2 * variances[1] + 2 * a * b * k + c**2
        gain = (b * variances[1] + a * k) / total
        return end * unit(0) + gain * (z - (a * start + b * end) * unit(0))

    return denoise


def run(sampler: DSBMSampler, process: DSBM, denoise: Callable, x: Tensor, steps: int) -> Tensor:
    count = 1

    def noise() -> Tensor:
        nonlocal count
        count += 1
        return unit(count)

    coroutine, result = sampler.steps(process, x, even(steps), noise), None
    while True:
        try:
            query = coroutine.send(result)
        except StopIteration as stop:
            return stop.value
        result = denoise(query.x, query.t)


def test_markovian_fitting_reaches_the_covariance_of_the_bridge() -> None:
    """From independent pairs to .618 within .02, with both marginals kept at every iteration."""
    process, ends = DSBM(1.0), (0.5, -0.5)
    k, variances, found = 0.0, (1.0, 1.0), []
    for iteration in range(8):  # alternately from y to x and from x to y
        start, end = ends if iteration % 2 == 0 else ends[::-1]
        y = start * unit(0) + unit(1)
        x = run(DSBMSampler(), process, normal_denoiser(process, start, end, variances, k), y, 100)
        k = float(x[1:] @ y[1:])
        variances = (float(x[1:].square().sum()), 1.0)  # the next direction starts where this one ended
        assert float(x[0]) == pytest.approx(end, abs=1e-9) and variances[0] == pytest.approx(1.0, abs=0.02)
        found.append(k)
    assert found[0] < 0.55  # one iteration is not enough
    assert found[-1] == pytest.approx(GOLDEN, abs=0.02), found


def test_a_wrong_noise_scale_does_not_reach_it() -> None:
    process, k = DSBM(1.5), 0.0
    for iteration in range(8):
        start, end = (0.5, -0.5) if iteration % 2 == 0 else (-0.5, 0.5)
        y = start * unit(0) + unit(1)
        x = run(DSBMSampler(), process, normal_denoiser(process, start, end, (1.0, 1.0), k), y, 100)
        k = float(x[1:] @ y[1:])
    sigma2 = 1.5**2
    assert abs(k - GOLDEN) > 0.1 and k == pytest.approx((math.sqrt(sigma2**2 + 4) - sigma2) / 2, abs=0.02)


def test_the_posterior_is_that_of_i2sb_with_constant_rate() -> None:
    process, other = DSBM(math.sqrt(0.3)), I2SB(beta_min=0.3, beta_max=0.3)
    x, target = torch.full((2, 3), -0.4, dtype=F64), NormalTarget(process)
    results = [
        walk(sampler, target, x, even(5), Noise([1, 2], (3,), dtype=F64), schedule=one)
        for sampler, one in ((DSBMSampler("bridge"), process), (I2SBSampler(), other))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_brownian_variance_adds_up() -> None:
    """For a constant drift the noise of all steps but the last is that of the Brownian motion."""
    process = DSBM(0.7)

    class Drift(nn.Module):
        schedule = process

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return z + t * unit(0)

    x = run(DSBMSampler("brownian"), process, Drift(), unit(1) * 0, 10)
    assert float(x[0]) == pytest.approx(1.0) and float(x[1:].norm()) == pytest.approx(0.7 * math.sqrt(0.9))


@pytest.mark.parametrize("variance", ("bridge", "brownian"))
def test_plan_equals_the_walk(variance: str) -> None:
    process, sampler, x = DSBM(0.5), DSBMSampler(variance), torch.randn(1, 3, dtype=F64)
    compiled = plan(sampler, process, even(4))
    noises = [Noise([5], (3,), dtype=F64) for _ in range(2)]
    walked = walk(sampler, NormalTarget(process), x, even(4), noises[0])
    torch.testing.assert_close(compiled(NormalTarget(process), x, noises[1]), walked, rtol=0, atol=1e-12)


def test_stored_and_refused() -> None:
    assert schedule_from_dict(DSBM(0.3).to_dict()) == DSBM(0.3)
    for make in (lambda: DSBM(0.0), lambda: DSBM(math.inf), lambda: DSBMSampler("bridges")):
        with pytest.raises(BadInput):
            make()


def test_euler_maruyama_keeps_more_variance_with_few_steps() -> None:
    process, y, variances = DSBM(1.0), 0.5 * unit(0) + unit(1), {}
    for variance in ("brownian", "bridge"):
        denoise = normal_denoiser(process, 0.5, -0.5, (1.0, 1.0), GOLDEN)
        x = run(DSBMSampler(variance), process, denoise, y, 20)
        variances[variance] = float(x[1:].square().sum())
    assert variances["bridge"] == pytest.approx(0.87, abs=0.01)
    assert variances["brownian"] == pytest.approx(0.966, abs=0.01)


def test_fitted_proportionally_as_well() -> None:
    """Iterative proportional fitting by mean matching, N = 20 and 200 steps: .503, .601, .613, .619 with N = 20."""
    found = [proportional_fitting(20, iterations) for iterations in (0, 1, 2, 4)]
    assert [k for k, _ in found] == pytest.approx([0.503, 0.601, 0.613, 0.619], abs=4e-3)
    k, mean = proportional_fitting(200, 4)
    assert k == pytest.approx(GOLDEN, abs=0.02) and -0.5 < mean < -0.48


def proportional_fitting(steps: int, iterations: int) -> tuple[float, float]:
    """Covariance of the ends of the backward process after some iterations, and the mean of its last state.

    Every regression is that of normal variables, which is exact on the coefficients of the noises.
    """
    gamma = 0.5 / steps  # 2 gamma N = 1

    def simulate(means: list[tuple[float, float]], mean: float) -> list[Tensor]:
        states, count = [mean * unit(0) + unit(1)], 1
        for slope, offset in means:
            count += 1
            states.append(slope * states[-1] + offset * unit(0) + math.sqrt(2 * gamma) * unit(count))
        return states

    def fit(means: list[tuple[float, float]], states: list[Tensor]) -> list[tuple[float, float]]:
        """The opposite direction: the regression of the mean-matching target on the later state."""
        fitted = []
        for k, map_ in enumerate(means):
            target = mean_matching_target(lambda z, m=map_: m[0] * z + m[1] * unit(0), states[k], states[k + 1])
            z = states[k + 1]
            slope = float(z[1:] @ target[1:] / z[1:].square().sum())
            fitted.append((slope, float(target[0] - slope * z[0])))
        return fitted[::-1]

    forward = [(1.0, 0.0)] * steps
    backward = fit(forward, simulate(forward, -0.5))
    for _ in range(iterations):
        forward = fit(backward, simulate(backward, 0.5))
        backward = fit(forward, simulate(forward, -0.5))
    states = simulate(backward, 0.5)
    return float(states[-1][1:] @ states[0][1:]), float(states[-1][0])
