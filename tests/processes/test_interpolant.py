"""Rectified flow and stochastic interpolants between two normal sets: velocity, marginals, cost, reflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.plan import plan
from hasten.processes.interpolant import Interpolant
from hasten.samplers.interpolant import InterpolantSampler
from hasten.sampling import Noise, walk
from hasten.schedules import schedule_from_dict

from .bridge_runs import F64, even

SOURCE, IMAGE = (-1.0, 0.25), (2.0, 0.0625)  # (mean, variance)


class NormalSets(nn.Module):
    """The exact denoiser between two normal sets whose covariance under the coupling is `covariance`."""

    def __init__(self, schedule: Interpolant, covariance: float = 0.0) -> None:
        super().__init__()
        self.schedule, self.covariance = schedule, covariance

    def line(self, t: Tensor) -> tuple[float, float]:
        """(slope, offset) of the regressed velocity v = slope (z - m_t) + offset."""
        (m1, v1), (m0, v0), k, t = SOURCE, IMAGE, self.covariance, torch.as_tensor(t, dtype=F64)
        gamma = self.schedule.gamma(t)
        variance = (1 - t) ** 2 * v0 + t**2 * v1 + 2 * t * (1 - t) * k + gamma**2
        # Cov(y - x + (gamma' + e / gamma) xi, z), with gamma gamma' in closed form where gamma' is infinite
        product = 0.0
        if self.schedule.curve == "brownian":
            product = self.schedule.noise**2 * (1 - 2 * t) / 2
        elif self.schedule.curve != "none":
            product = gamma * self.schedule.gamma_rate(t)
        covariance = t * v1 - (1 - t) * v0 + (1 - 2 * t) * k + product + self.schedule.diffusion
        return covariance / variance, m1 - m0

    def mean(self, t: Tensor) -> Tensor:
        return (1 - t) * IMAGE[0] + t * SOURCE[0]

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        slope, offset = self.line(t)
        return z - t * (slope * (z - self.mean(t)) + offset)


def transport(process: Interpolant, steps: int, order: int = 1, covariance: float = 0.0) -> tuple[Tensor, Tensor]:
    """The sources on a fine normal grid of quantiles, and where the equation takes them."""
    quantiles = torch.special.ndtri((torch.arange(400, dtype=F64) + 0.5) / 400)
    y = SOURCE[0] + math.sqrt(SOURCE[1]) * quantiles / quantiles.std(correction=0)
    x = walk(InterpolantSampler(order), NormalSets(process, covariance), y[:, None], even(steps))
    return y, x[:, 0]


def std(x: Tensor) -> float:
    return float(x.std(correction=0))


def test_rectified_flow_reaches_the_other_set_at_the_cost_of_optimal_transport() -> None:
    """200 Heun steps: std .25, slope .500 of the optimal map, cost 9.063; an independent pair costs 9.305."""
    y, x = transport(Interpolant(), 200, order=2)
    assert std(x) == pytest.approx(0.25, abs=3e-4) and float(x.mean()) == pytest.approx(2.0, abs=1e-4)
    slope = float(((x - x.mean()) * (y - y.mean())).mean() / y.var(correction=0))
    assert slope == pytest.approx(0.5, abs=1e-3)
    independent = (SOURCE[0] - IMAGE[0]) ** 2 + SOURCE[1] + IMAGE[1]
    best = (SOURCE[0] - IMAGE[0]) ** 2 + (math.sqrt(SOURCE[1]) - math.sqrt(IMAGE[1])) ** 2
    cost = float((x - y).square().mean())
    assert independent == pytest.approx(9.3125) and best == 9.0625
    assert best - 1e-3 <= cost < 9.064


def test_one_step_collapses_before_reflow_and_is_exact_after_it() -> None:
    assert std(transport(Interpolant(), 1)[1]) < 1e-6
    y, x = transport(Interpolant(), 200, order=2)
    covariance = float(((x - x.mean()) * (y - y.mean())).mean())
    assert std(transport(Interpolant(), 1, covariance=covariance)[1]) == pytest.approx(0.25, abs=5e-4)


def test_euler_and_heun_have_their_orders() -> None:
    exact = 0.25
    for order, low, high in ((1, 1.7, 2.3), (2, 3.2, 4.8)):
        # the last step is Euler's, of the size of a step: its own error is of second order too
        errors = [abs(std(transport(Interpolant(), n, order)[1]) - exact) for n in (40, 80)]
        assert low < errors[0] / errors[1] < high, (order, errors)


@pytest.mark.parametrize("diffusion", (0.0, 0.4))
def test_velocity_of_the_noisy_interpolant_is_the_regression(diffusion: float) -> None:
    """The regression of the target on z_t has the slope and the offset of the formula."""
    process = Interpolant(curve="brownian", diffusion=diffusion)
    generator = torch.Generator().manual_seed(0)
    y, x, xi = (torch.randn(400_000, generator=generator, dtype=F64) for _ in range(3))
    y, x = SOURCE[0] + math.sqrt(SOURCE[1]) * y, IMAGE[0] + math.sqrt(IMAGE[1]) * x
    for t in (0.3, 0.7):
        at = torch.tensor(t, dtype=F64)
        z = process.corrupt(x, at, xi, y)
        velocity = process.velocity(x, y, xi, at)
        centred = z - z.mean()
        slope = float((centred * velocity).mean() / centred.square().mean())
        exact, offset = NormalSets(process).line(at)
        assert slope == pytest.approx(float(exact), abs=0.015)
        assert float(velocity.mean()) == pytest.approx(float(offset), abs=5e-3)


@pytest.mark.parametrize("curve", ("brownian", "quadratic", "sine"))
def test_gamma_and_its_derivative(curve: str) -> None:
    process = Interpolant(curve=curve, noise=0.7)
    t = torch.linspace(0.05, 0.95, 9, dtype=F64, requires_grad=True)
    (derivative,) = torch.autograd.grad(process.gamma(t).sum(), t)
    torch.testing.assert_close(process.gamma_rate(t.detach()), derivative)
    assert process.gamma(torch.tensor([0.0, 1.0])).abs().max() < 1e-12


def test_velocity_is_that_without_noise_minus_the_score_times_gamma() -> None:
    """b = E[y - x | z] - gamma gamma' score, and a diffusion subtracts it once more times the diffusion."""
    t = torch.tensor([0.2, 0.6, 0.9], dtype=F64)
    process = Interpolant(curve="sine", noise=0.8)
    gamma, variance = process.gamma(t), []
    for at in t:
        variance.append((1 - at) ** 2 * IMAGE[1] + at**2 * SOURCE[1] + process.gamma(at) ** 2)
    score = -1 / torch.stack(variance)  # slope
    plain = torch.stack([(at * SOURCE[1] - (1 - at) * IMAGE[1]) / v for at, v in zip(t, variance, strict=True)])
    b = torch.stack([NormalSets(process).line(at)[0] for at in t])
    torch.testing.assert_close(b, plain - gamma * process.gamma_rate(t) * score)
    stochastic = torch.stack([NormalSets(Interpolant("sine", 0.8, 0.3)).line(at)[0] for at in t])
    torch.testing.assert_close(stochastic, b - 0.3 * score)


@pytest.mark.parametrize(("diffusion", "expected"), ((0.0, 0.2486), (0.5, 0.25), (2.0, 0.2539)))
def test_all_diffusions_end_in_the_same_set(diffusion: float, expected: float) -> None:
    """400 steps, with the noise that the last one leaves out; exact, since every step is affine."""
    process = Interpolant(curve="brownian", diffusion=diffusion)
    slots = torch.zeros(500, dtype=F64)
    slots[0], count = math.sqrt(SOURCE[1]), 0

    def noise() -> Tensor:
        nonlocal count
        count += 1
        drawn = torch.zeros(500, dtype=F64)
        drawn[count] = 1.0
        return drawn

    class Centred(NormalSets):
        def mean(self, t: Tensor) -> Tensor:
            return torch.zeros((), dtype=F64)

        def line(self, t: Tensor) -> tuple[Any, Any]:
            return super().line(t)[0], 0.0

    end = float(walk(InterpolantSampler(), Centred(process), slots[None], even(400), noise).norm())
    assert math.hypot(end, math.sqrt(2 * diffusion / 400)) == pytest.approx(expected, abs=4e-3)


@pytest.mark.parametrize("process", (Interpolant(), Interpolant("brownian"), Interpolant("sine", 0.5, 0.2)), ids=str)
@pytest.mark.parametrize("prediction", ("flow", "v", "x0"))
def test_loss_is_0_for_the_velocity_itself(process: Interpolant, prediction: str) -> None:
    """One pair and no noise between: a network with the exact output has no loss, and the denoiser returns z - t v."""
    x, y = torch.randn(2, 4, 3, dtype=F64)
    t, xi = torch.tensor([0.1, 0.4, 0.6, 0.95], dtype=F64), torch.zeros(4, 3, dtype=F64)
    z, v = process.corrupt(x, t, xi, y), process.velocity(x, y, xi, t)
    pair = z - t[:, None] * v, z + (1 - t[:, None]) * v
    raw = Denoiser(nn.Identity(), process, prediction).prediction.target(*pair, process.alpha(t), process.sigma(t))
    denoiser = Denoiser(Fixed(raw), process, prediction)
    torch.testing.assert_close(denoiser(z, t), x, rtol=1e-9, atol=1e-9)
    assert float(process.loss(denoiser, x, t, xi, {}, y).max()) < 1e-20


class Fixed(nn.Module):
    """A network with a fixed output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.register_buffer("output", output)

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.output


@pytest.mark.parametrize("order", (1, 2))
@pytest.mark.parametrize("process", (Interpolant(), Interpolant("brownian", diffusion=0.5)), ids=("flow", "noisy"))
def test_plan_equals_the_walk(process: Interpolant, order: int) -> None:
    sampler, target, x = InterpolantSampler(order), NormalSets(process), torch.randn(1, 3, dtype=F64)
    compiled = plan(sampler, process, even(4))
    assert compiled.nfe == sampler.nfe(4)
    noises = [Noise([5], (3,), dtype=F64) for _ in range(2)]
    walked = walk(sampler, target, x, even(4), noises[0])
    torch.testing.assert_close(compiled(target, x, noises[1]), walked, rtol=0, atol=1e-12)


def test_stored_and_refused() -> None:
    process = Interpolant("quadratic", 0.5)
    assert schedule_from_dict(process.to_dict()) == process
    for wrong in ({"curve": "square"}, {"noise": 0.0}, {"diffusion": -1.0}, {"diffusion": 0.5}):
        with pytest.raises(BadInput):
            Interpolant(**wrong)
    with pytest.raises(BadInput, match="order 1 or 2"):
        InterpolantSampler(3)
    with pytest.raises(BadInput, match="no source images"):
        process.corrupt(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2))
