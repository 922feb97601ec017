"""Soft diffusion: the score identity, the convergence of its samplers, and its two ends."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten import plan
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.plan import Plan
from hasten.predictions import prediction_from
from hasten.processes.soft import Soft
from hasten.samplers.soft import SoftSampler, heat_noise
from hasten.sampling import Noise, walk
from hasten.schedules import schedule_from_dict

F64 = torch.float64
SHAPE = (1, 6, 8)
CORRUPTIONS = pytest.mark.parametrize("corruption", ["blur", "mask"])


def soft(corruption: str = "blur", **options: Any) -> Soft:
    return Soft(SHAPE, corruption, **{"blur_max": 3.0, "edge": 2.0, "noise_max": 0.5, **options})


def images(n: int = 2, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=F64)


@CORRUPTIONS
def test_nothing_is_corrupted_at_0_and_the_same_everywhere(corruption: str) -> None:
    """C_0 = I; c_t only falls; at t = 1 the mask has covered every pixel, and a blur leaves the mean alone."""
    process, x = soft(corruption, blur_max=200.0), images()
    assert (process.apply(x, torch.zeros(2, dtype=F64)) - x).abs().max() < 1e-13
    c = process.factor(torch.linspace(0, 1, 41, dtype=F64)[:, None, None], process.keys)
    assert (c.diff(dim=0) <= 0).all() and (c >= 0).all()
    end = process.apply(x, torch.tensor(1.0))
    mean = x.mean((-2, -1), keepdim=True).expand_as(x) if corruption == "blur" else torch.zeros_like(x)
    assert (end - mean).abs().max() < 1e-9
    by_sample = process.apply(x, torch.tensor([0.2, 0.6], dtype=F64))
    assert (by_sample[1:] - process.apply(x[1:], torch.tensor(0.6, dtype=F64))).abs().max() < 1e-14


@CORRUPTIONS
def test_the_score_is_that_of_the_corrupted_mean(corruption: str) -> None:
    """grad log q_t(z) = (C_t E[x | z] - z) / sigma_t^2, by differentiating the density of five images."""
    process, data = soft(corruption), images(5)
    t = torch.tensor(0.6, dtype=F64)
    sigma = process.sigma(t)
    z = process.apply(images(1, seed=4), t).requires_grad_()
    logits = -0.5 * (z - process.apply(data, t)).square().flatten(1).sum(1) / sigma**2
    (score,) = torch.autograd.grad(torch.logsumexp(logits, 0), z)
    mean = (torch.softmax(logits, 0).view(-1, 1, 1, 1) * data).sum(0, keepdim=True)
    assert (score - (process.apply(mean, t) - z) / sigma**2).abs().max() < 1e-11


class Rotated(Soft):
    """Six numbers, each of which fades at a rate of its own."""

    kind = "identity"  # type: ignore[assignment]
    keys = torch.arange(1.0, 7.0, dtype=F64).reshape(1, 2, 3)  # type: ignore[assignment]

    def factor(self, t: Tensor, keys: Tensor) -> Tensor:
        return torch.exp(-0.5 * keys * t)


def covariance_error(form: str, steps: int) -> float:
    """The relative error of the covariance of the samples for Gaussian data, whose covariance does not commute with
    C_t, and the exact E[x | z]; exact itself: every source of noise is followed as a sample of its own."""
    process = Rotated((1, 2, 3), noise_min=0.01, noise_max=1.0)
    root = torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    cov = root @ root.T / 6 + 0.1 * torch.eye(6, dtype=F64)
    sources = 6 * (steps + 1)

    def level(t: Tensor) -> tuple[Tensor, Tensor]:
        c = process.factor(t, process.keys).flatten()
        return c, c[:, None] * cov * c + process.sigma(t) ** 2 * torch.eye(6, dtype=F64)

    def denoiser(z: Tensor, t: Tensor) -> Tensor:
        c, total = level(t)
        return (z.flatten(1) @ torch.linalg.solve(total, c[:, None] * cov)).reshape(z.shape)

    drawn = 0

    def noise() -> Tensor:
        nonlocal drawn
        drawn += 1
        xi = torch.zeros(sources, 6, dtype=F64)
        xi[6 * drawn : 6 * drawn + 6] = torch.eye(6, dtype=F64)
        return xi.reshape(-1, 1, 2, 3)

    x = torch.zeros(sources, 6, dtype=F64)
    x[:6] = torch.linalg.cholesky(level(torch.ones((), dtype=F64))[1]).T
    times = grid(steps)
    times[-1] = 1e-9
    coroutine, result = SoftSampler(form).steps(process, x.reshape(-1, 1, 2, 3), times, noise), None
    try:
        while True:
            query = coroutine.send(result)
            result = denoiser(query.x, query.t)
    except StopIteration as stop:
        z = stop.value.flatten(1)
    wanted = level(times[-1])[1]
    return float((z.T @ z - wanted).norm() / wanted.norm())


def test_momentum_and_ode_converge_and_naive_does_not() -> None:
    """First order in the covariance, as the paper's identity says; the naive sampler keeps an error of its own."""
    for form in ("momentum", "ode"):
        errors = [covariance_error(form, steps) for steps in (25, 50, 100, 200)]
        assert errors[-1] < 0.05 and all(1.6 < a / b < 2.6 for a, b in zip(errors, errors[1:])), (form, errors)
    naive = [covariance_error("naive", steps) for steps in (50, 100, 200)]
    assert min(naive) > 0.3 and max(naive) / min(naive) < 1.1, naive


def test_where_nothing_is_corrupted_momentum_is_reverse_diffusion() -> None:
    """The mean of the image, which no blur touches: z + (sigma_t^2 - sigma_s^2) score, and noise of that variance."""
    process, times = soft(), grid(4)
    rows, sigma = plan(SoftSampler(), process, times), process.sigma(times)
    for k in range(3):
        removed = sigma[k] ** 2 - sigma[k + 1] ** 2
        assert abs(rows.B[k, k, 0] - removed / sigma[k] ** 2) < 1e-14
        assert abs(rows.C[k, k, 0] ** 2 - removed) < 1e-14 and abs(rows.a[k, 0] + rows.B[k, k, 0] - 1) < 1e-14


def test_cold_steps_cannot_lose_what_a_constant_answer_adds() -> None:
    """The sum of cold steps telescopes: z_0 = z_1 + (I - C_1) y for any y that the network always says, at every number
    of steps; the naive sampler says y."""
    process, y, z = soft(), images(1, seed=2), images(1, seed=3)
    kept = z + y - process.apply(y, torch.tensor(1.0))
    for steps in (1, 4, 9):
        run = {
            form: walk(SoftSampler(form), lambda x, t: y, z, grid(steps), schedule=process) for form in ("cold", "ode")
        }
        assert (run["cold"] - kept).abs().max() < 1e-13
        assert (run["ode"] - y).abs().max() < 1e-13, "the last step takes the noise away"


@CORRUPTIONS
def test_with_the_true_image_every_sampler_ends_at_it(corruption: str) -> None:
    process, x = soft(corruption), images()
    noise = Noise([0, 1], SHAPE, F64)
    z = process.corrupt(x, torch.ones(2, dtype=F64), noise.initial())
    for form in ("momentum", "ode", "naive"):
        result = walk(SoftSampler(form), lambda z, t: x, z, grid(5), noise, schedule=process)
        assert (result - x).abs().max() < 1e-13, form


class Tiny(nn.Module):
    """A network that mixes neighbours and depends on the time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1).double()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + time.to(x.dtype).view(-1, 1, 1, 1))


@CORRUPTIONS
@pytest.mark.parametrize("form", ["momentum", "ode", "naive", "cold"])
def test_the_plan_runs_as_the_sampler_does(form: str, corruption: str) -> None:
    process, sampler = soft(corruption), SoftSampler(form)
    denoiser = Denoiser(Tiny(), process, "residual")
    noise = Noise([5], SHAPE, F64)
    start = process.begin(noise.initial(), 1.0)
    walked = walk(sampler, denoiser, start, grid(6), noise.rows(slice(None)))
    compiled = Plan.from_json(plan(sampler, process, grid(6)).to_json())
    assert compiled.stochastic == (form in ("momentum", "naive"))
    assert (compiled(denoiser, start, noise.rows(slice(None))) - walked).abs().max() < 1e-12


@pytest.mark.parametrize("prediction", ["residual", "eps", "v", "x0"])
def test_soft_score_matching_weighs_what_is_left(prediction: str) -> None:
    """With floor 0 an error that C_t hides costs nothing, and another its corrupted square."""
    process, x, eps = soft("mask", floor=0.0), images(), images(seed=1)
    t = torch.tensor([0.3, 0.6], dtype=F64)

    class Told(nn.Module):
        extra: Any = 0.0

        def forward(self, z: Tensor, time: Tensor) -> Tensor:
            _, skip, out = denoiser.prediction.coefficients(process.alpha(t), process.sigma(t))
            return (x + self.extra - skip.view(-1, 1, 1, 1) * z) / out.view(-1, 1, 1, 1)

    denoiser: Any = Denoiser(Told(), process, prediction)
    assert process.loss(denoiser, x, t, eps, {}).max() < 1e-12
    c = process.at(t, x)
    denoiser.net.extra = 3.0 * (c == 0)
    assert (c == 0).any() and process.loss(denoiser, x, t, eps, {}).max() < 1e-12
    denoiser.net.extra = 1.0
    assert torch.allclose(process.loss(denoiser, x, t, eps, {}), (c**2).mean((1, 2, 3)).float(), atol=1e-6)
    cold: Any = Denoiser(Told(), soft("mask", objective="l1"), prediction)
    denoiser = cold
    cold.net.extra = -2.0
    assert torch.allclose(cold.schedule.loss(cold, x, t, eps, {}), torch.full((2,), 2.0), atol=1e-5)


def test_the_prior_has_the_moments_of_the_blurred_data() -> None:
    """A sample's coordinates have the mean and covariance of C_1 x + sigma_1 eps, on the data themselves."""
    g = torch.Generator().manual_seed(0)
    data = images(400) * 0.3 + torch.randn(400, 1, 1, 1, dtype=F64, generator=g) - 0.4
    process = soft(noise_max=0.05).fitted(data)
    assert 0 < process._kept < 48
    noise = torch.eye(48, dtype=F64).reshape(48, *SHAPE)
    middle = process.begin(torch.zeros(1, *SHAPE, dtype=F64), 1.0).flatten(1)
    jacobian = (process.begin(process.back(noise), 1.0).flatten(1) - middle).T
    blurred = process.apply(data, torch.ones((), dtype=F64)).flatten(1)
    wanted = torch.cov(blurred.T) + process.sigma(1.0) ** 2 * torch.eye(48, dtype=F64)
    # what is not kept lies below half the noise
    assert (jacobian @ jacobian.T - wanted).abs().max() < 0.3 * float(process.sigma(1.0)) ** 2
    assert (middle - blurred.mean(0)).abs().max() < 0.05
    again = schedule_from_dict(json.loads(json.dumps(process.to_dict())))
    assert again == process and torch.equal(again.begin(noise, 1.0), process.begin(noise, 1.0))


def test_without_a_prior_the_data_are_standard_normal() -> None:
    process = soft()
    noise = torch.eye(48, dtype=F64).reshape(48, *SHAPE)
    jacobian = process.begin(noise, 1.0).flatten(1)
    c = process.apply(noise, torch.ones((), dtype=F64)).flatten(1)
    assert torch.allclose(
        jacobian @ jacobian.T, c @ c.T + process.sigma(1.0) ** 2 * torch.eye(48, dtype=F64), atol=1e-12
    )


def test_heat_noise_makes_the_bound_largest() -> None:
    sigma, mse = 0.02, 3e-4
    delta = torch.linspace(0.5, 3, 5001, dtype=F64) * sigma
    term = sigma**2 / delta**2 - 1 + 2 * torch.log(delta / sigma) + mse / delta**2
    assert math.isclose(float(delta[term.argmin()]) / sigma, heat_noise(sigma, mse), abs_tol=1e-3)
    assert heat_noise(sigma, 0.0) == 1


def test_a_residual_is_what_the_state_lacks() -> None:
    x, eps = images(seed=5), images(seed=6)
    alpha, sigma = torch.tensor([0.3, 1.0], dtype=F64), torch.tensor([2.0, 0.1], dtype=F64)
    kind = prediction_from("residual")
    z = alpha.view(-1, 1, 1, 1) * x + sigma.view(-1, 1, 1, 1) * eps
    assert (z + kind.target(x, eps, alpha, sigma) - x).abs().max() < 1e-14
    assert all(bool((c == 1).all()) for c in kind.coefficients(alpha, sigma))


def test_errors_say_what_is_valid() -> None:
    with pytest.raises(BadInput, match="Soft needs blur_max > 0"):
        soft(noise_min=0.0)
    with pytest.raises(BadInput, match="no grid in lambda: use uniform"):
        soft(noise_min=0.5).time(0.3)
    with pytest.raises(BadInput, match="triangular factor, found 3"):
        soft(prior=(1.0, 2.0, 3.0))
    with pytest.raises(BadInput, match="begin there, not at t = 0.5"):
        soft().fitted(images(8) + 1).begin(images(), 0.5)
    with pytest.raises(BadInput, match="corruption='noise'"):
        soft("noise")
