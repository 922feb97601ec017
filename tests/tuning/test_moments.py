"""Moments measured by sampling, against their closed form on Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import Gaussian, GaussianMixture
from hasten.guides.cfg import CFG
from hasten.samplers.analytic import AnalyticDPM
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from hasten.tuning._task import TuningTask
from hasten.tuning.moments import Moments, dct, dct_spectrum, regressed_mean, statistic_at

F64 = torch.float64
SHAPE = (2, 4, 6)


def gaussian(schedule: Schedule) -> Gaussian:
    j = torch.arange(48, dtype=F64).reshape(SHAPE)
    return Gaussian(0.3 * torch.cos(j), 0.3 / (j + 1) ** 0.5, schedule)


def task(model: Any, **more: Any) -> TuningTask:
    def images(n: int) -> tuple[Tensor, Tensor | None]:
        return model.sample(n, torch.Generator().manual_seed(3)).float(), None

    return TuningTask(denoiser=model, sampler=None, times=torch.tensor([1.0, 0.0]), shape=SHAPE, images=images, **more)


@pytest.mark.parametrize("schedule", [VPCosine(offset=0.0), VPLinear(), Flow(), EDM()], ids=lambda s: type(s).__name__)
def test_of_a_gaussian_they_are_the_closed_form(schedule: Schedule) -> None:
    model = gaussian(schedule)
    result = Moments(times=12, images=2000).tune(task(model)).statistics
    t, v = result["gamma_times"], model.variance.flatten()
    assert all(value.dtype == F64 for value in result.values()) and bool((t.diff() > 0).all())
    assert t[-1] == schedule.t_max and torch.equal(t, result["mse_times"])
    a2, s2 = schedule.alpha(t)[:, None] ** 2, schedule.sigma(t)[:, None] ** 2
    gamma, mse = (s2 / (a2 * v + s2)).mean(1), (v * s2 / (a2 * v + s2)).mean(1)
    n = 2000 * 48
    torch.testing.assert_close(result["gamma"], gamma, rtol=5 * math.sqrt(2 / n), atol=1e-4)
    torch.testing.assert_close(result["mse"], mse, rtol=8 * math.sqrt(2 / n), atol=0)
    # what is wanted is C = q^2 (1 - gamma): right to a few per cent up to q = 150, where a gamma wrong by 1e-3 is useless
    inside = torch.isfinite(schedule.lam(t)) & (schedule.q(t) > 0.05)
    C = schedule.q(t)[inside] ** 2 * (1 - result["gamma"][inside])
    torch.testing.assert_close(C, mse[inside], rtol=0.05, atol=0)
    if schedule.zero_snr and schedule.t_max == 1:
        assert result["gamma"][-1].item() == pytest.approx(1.0, abs=1e-12)


def test_control_variates_are_regressed_out() -> None:
    """Against the plain mean at q = 10, 20 seeds: the estimate of 1 - gamma scatters by a tenth or less, around the
    truth, and the standard error that is told is the scatter."""
    schedule = VPCosine(offset=0.0)
    model, t = gaussian(schedule), schedule.time(-math.log(10.0))
    truth = (schedule.sigma(t) ** 2 / (schedule.alpha(t) ** 2 * model.variance + schedule.sigma(t) ** 2)).mean().item()
    ours, plain, record = [], [], []
    x = model.sample(400, torch.Generator().manual_seed(0)).float()
    for seed in range(20):
        value, _, error = Moments(images=400).measure(
            task(model, seed=seed * 7_000_000), t, x, None, x.double().mean(0)
        )
        ours.append(value - truth)
        record.append(error)
        e = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        z = schedule.alpha(t) * x + schedule.sigma(t) * e
        eps = (z - schedule.alpha(t) * model(z, t)) / schedule.sigma(t)
        plain.append(eps.square().mean().item() - truth)
    assert np.std(ours) < 0.1 * np.std(plain)
    assert abs(np.mean(ours)) < 4 * np.std(ours) / math.sqrt(20) + 0.02 * (1 - truth)
    assert 0.5 < np.mean(record) / np.std(ours) < 2


def test_the_regressed_mean() -> None:
    g = torch.Generator().manual_seed(0)
    known = torch.randn(500, 2, generator=g, dtype=F64)
    y = 3.0 + known @ torch.tensor([2.0, -5.0], dtype=F64)
    value, error = regressed_mean(y, known)
    assert value == pytest.approx(3.0, abs=1e-10) and error < 1e-10
    value, error = regressed_mean(y, torch.cat([known, known], 1))  # the same twice is no trouble
    assert value == pytest.approx(3.0, abs=1e-10)


def test_the_spectrum_is_that_of_an_orthonormal_cosine_transform() -> None:
    from scipy.fft import dctn

    x = torch.randn(50, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = torch.from_numpy(dctn(x.numpy(), type=2, norm="ortho", axes=(-2, -1))).square().mean(0)
    torch.testing.assert_close(dct_spectrum(x), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dct(7) @ dct(7).T, torch.eye(7, dtype=F64), rtol=0, atol=1e-12)
    model = gaussian(VPCosine(offset=0.0))
    result = Moments(times=2, images=500).tune(task(model)).statistics
    real = model.sample(500, torch.Generator().manual_seed(3)).float().double()
    torch.testing.assert_close(result["mean"], real.mean(0))
    assert result["spectrum"].shape == SHAPE
    assert result["spectrum"].sum().item() == pytest.approx((real - real.mean(0)).square().sum((1, 2, 3)).mean().item())


def test_a_sampler_bound_to_them_keeps_the_variance() -> None:
    """AnalyticDPM with measured moments, on times that were not measured, starting from pure noise: a run of four steps
    on images of equal variances keeps the variance to 2 %; DDPM's variances miss by more than 25 %."""
    from hasten.plan.draw import draw
    from hasten.samplers import DDPM
    from hasten.sampling import Noise

    schedule = VPCosine(offset=0.0)
    model = Gaussian(torch.zeros(SHAPE, dtype=F64), torch.full(SHAPE, 0.25, dtype=F64), schedule)
    statistics = Moments(times=48, images=1000).tune(task(model)).statistics
    times = torch.tensor([1.0, 0.71, 0.39, 0.13, 0.0], dtype=F64)
    left = 0.25 * schedule.sigma(times[3]) ** 2 / (0.25 * schedule.alpha(times[3]) ** 2 + schedule.sigma(times[3]) ** 2)
    ratios = {}
    samplers = {"gamma": AnalyticDPM(), "mse": AnalyticDPM("ddim", "mse"), "small": DDPM(), "large": DDPM("large")}
    for name, sampler in samplers.items():
        bound = sampler.bind(statistics, {}) if hasattr(sampler, "bind") else sampler
        output = draw(model, bound, times, Noise(range(3000), SHAPE, dtype=F64))
        ratios[name] = (output.var().item() + left.item()) / 0.25
    assert abs(ratios["gamma"] - 1) < 0.02 and abs(ratios["mse"] - 1) < 0.02, ratios
    assert ratios["small"] < 0.75 and ratios["large"] > 1.25, ratios
    # the two measurements are of the same quantity, at any time
    at = torch.linspace(0.02, 0.97, 7, dtype=F64)
    one, two = (statistic_at(statistics, name, schedule, at) for name in ("gamma", "mse"))
    torch.testing.assert_close(one, two, rtol=0.03, atol=0)


def test_classes_are_used_and_guidance_is_not() -> None:
    schedule = VPCosine(offset=0.0)
    means = torch.stack([torch.full(SHAPE, -0.5), torch.full(SHAPE, 0.5)])
    model = GaussianMixture(torch.ones(2), means, torch.full_like(means, 0.01), schedule, labels=[0, 1])
    label = torch.arange(64) % 2

    def images(n: int) -> tuple[Tensor, Tensor | None]:
        noise = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0))
        return means[label[:n]] + 0.1 * noise, label[:n]

    def run(denoiser: Any, classes: bool) -> dict[str, Tensor]:
        record = TuningTask(
            denoiser=denoiser,
            sampler=None,
            times=torch.tensor([1.0, 0.0]),
            shape=SHAPE,
            images=images,
            labels=(lambda n: torch.arange(n) % 2) if classes else (lambda n: None),
        )
        return Moments(times=4, images=64).tune(record).statistics

    conditional, pooled, guided = run(model, True), run(model, False), run(CFG(4.0).wrap(model), True)
    assert conditional["mse"][-1].item() == pytest.approx(0.01, rel=0.1)
    assert pooled["mse"][-1].item() == pytest.approx(0.26, rel=0.1)
    torch.testing.assert_close(guided["mse"], conditional["mse"])


def test_refusals() -> None:
    model = gaussian(VPCosine(offset=0.0))
    with pytest.raises(BadInput, match="--data"):
        Moments().tune(TuningTask(denoiser=model, sampler=None, times=torch.tensor([1.0, 0.0]), shape=SHAPE))
    with pytest.raises(BadInput, match="times >= 2"):
        Moments(times=1)
    with pytest.raises(BadInput, match="mixed"):
        Moments(precision="fp16")
