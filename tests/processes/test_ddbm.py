"""DDBM: Gaussian conditioning, scores, preconditioning, the hybrid sampler."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.plan import plan
from hasten.predictions import prediction_from
from hasten.processes._pinned import bridge_coefficients, posterior_variance
from hasten.processes.ddbm import DDBM, BridgeEDM
from hasten.processes.i2sb import I2SB
from hasten.samplers.ddbm import DDBMSampler
from hasten.sampling import Noise, walk
from hasten.schedules import schedule_from_dict
from hasten.times import Karras

from .bridge_runs import F64, NormalTarget, even, moments

BOTH = {"vp": DDBM(), "ve": DDBM(base="ve"), "ve1": DDBM(base="ve", sigma_max=1.0)}
both = pytest.mark.parametrize("process", BOTH.values(), ids=list(BOTH))
inside = torch.tensor([1e-4, 0.01, 0.3, 0.5, 0.9, 0.9999], dtype=F64)


@both
def test_the_bridge_is_the_diffusion_conditioned_on_its_end(process: DDBM) -> None:
    """p(z_t | x_0) p(y | z_t) by the rule for two normal observations of z_t."""
    a, b, c = process.coefficients(inside)
    alpha, sigma = process.alpha(inside), process.sigma(inside)
    onward = process.alpha(1.0) / alpha  # y = onward z_t + sqrt(rest) eps
    rest = process.sigma(1.0) ** 2 - onward**2 * sigma**2
    precision = 1 / sigma**2 + onward**2 / rest
    torch.testing.assert_close(c**2, 1 / precision, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(b, alpha / sigma**2 / precision, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(a, onward / rest / precision, rtol=1e-10, atol=1e-13)


@both
def test_ends(process: DDBM) -> None:
    a, b, c = process.coefficients(torch.tensor([0.0, 1.0], dtype=F64))
    assert a.tolist() == [0, 1] and b.tolist() == [1, 0] and c.tolist() == [0, 0]
    torch.testing.assert_close(process.time(process.lam(inside)), inside)


@both
def test_the_bridge_score_is_the_score_of_the_diffusion_and_h(process: DDBM) -> None:
    a, b, c = process.coefficients(inside)
    alpha, sigma, x0, y, z = process.alpha(inside), process.sigma(inside), 0.3, -0.7, 0.4
    odds = torch.expm1(2 * (process.lam(inside) - process.lam(1.0)))
    h = (alpha / process.alpha(1.0) * y - z) / (sigma**2 * odds)
    bridge = -(z - a * y - b * x0) / c**2
    torch.testing.assert_close(bridge, (alpha * x0 - z) / sigma**2 + h, rtol=1e-8, atol=1e-8)


def test_with_unit_alpha_it_is_i2sb() -> None:
    """alpha = 1 and sigma^2 = V_t make I2SB's mean and variance."""
    process = I2SB()
    t = inside[1:-1]
    a, b, c = bridge_coefficients(process, t)
    V, total = process.variance(t), process.total
    torch.testing.assert_close(a, V / total)
    torch.testing.assert_close(b, 1 - V / total)
    torch.testing.assert_close(c, process.bridge_std(t))


@both
def test_the_posterior_composes(process: DDBM) -> None:
    """q(z_s | x_0, z_t) after q(z_t | x_0, y) is q(z_s | x_0, y)."""
    s, t = inside[:-1], inside[1:]
    a, b, c = process.coefficients(t)
    a_s, b_s, c_s = process.coefficients(s)
    variance = posterior_variance(process, t, s)
    c_z = process.alpha(t) / process.alpha(s) * process.sigma(s) ** 2 / process.sigma(t) ** 2
    c_x = process.alpha(s) * variance / process.sigma(s) ** 2
    torch.testing.assert_close(c_z * a, a_s)
    torch.testing.assert_close(c_z * b + c_x, b_s)
    torch.testing.assert_close(c_z**2 * c**2 + variance, c_s**2)


@both
def test_preconditioning_has_unit_variances(process: DDBM) -> None:
    """Input and target have variance 1 and the target is uncorrelated with the state, from the exact covariances."""
    v0, v1, k = 0.5**2, 0.7**2, 0.2
    t = inside[1:-1]
    prediction = BridgeEDM(0.5, 0.7, k, float(process.alpha(1.0)), float(process.sigma(1.0)))
    c_in, c_skip, c_out = prediction.coefficients(process.alpha(t), process.sigma(t))
    a, b, c = process.coefficients(t)
    zz = a**2 * v1 + b**2 * v0 + 2 * a * b * k + c**2
    xz = b * v0 + a * k
    one = torch.ones_like(t)
    torch.testing.assert_close(c_in**2 * zz, one)
    torch.testing.assert_close((v0 - 2 * c_skip * xz + c_skip**2 * zz) / c_out**2, one)
    torch.testing.assert_close((xz - c_skip * zz) / c_out, 0 * one, rtol=0, atol=1e-9)


def test_target_inverts_the_denoiser() -> None:
    """A network that outputs the target makes the denoiser return x0, and has no loss, for every prediction."""
    process, x0, xi, source = DDBM(), *torch.randn(3, 4, 3, dtype=F64)
    t = torch.tensor([1e-3, 0.2, 0.7, 0.999], dtype=F64)
    z, alpha, sigma = process.corrupt(x0, t, xi, source), process.alpha(t), process.sigma(t)
    eps = (z - alpha[:, None] * x0) / sigma[:, None]
    for prediction in (process.prediction, prediction_from("eps"), prediction_from("v")):
        denoiser = Denoiser(Fixed(prediction.target(x0, eps, alpha, sigma)), process, prediction)
        torch.testing.assert_close(denoiser(z, t), x0, rtol=1e-5, atol=1e-5)
        assert float(process.loss(denoiser, x0, t, xi, {}, source).max()) < 1e-6


class Fixed(nn.Module):
    """A network with a fixed output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output


def test_prediction_and_process_are_stored() -> None:
    process = DDBM(base="ve", sigma_max=3.0)
    assert schedule_from_dict(process.to_dict()) == process
    assert prediction_from(process.prediction.to_dict()) == process.prediction


# ---- the hybrid sampler ----


def karras(steps: int) -> Tensor:
    """The paper's grid: rho = 7 in t from T - 1e-4 to 1e-4, and 0."""
    low, high = 1e-4 ** (1 / 7), (1 - 1e-4) ** (1 / 7)
    return torch.cat([torch.linspace(high, low, steps, dtype=F64) ** 7, torch.zeros(1, dtype=F64)])


def test_reference_moments() -> None:
    """x_0 | y ~ N(.6, .3^2): without churn a point, with it the standard deviation falls to .3 from above."""
    target = NormalTarget(DDBM())
    for steps, std in ((5, 0.385), (10, 0.353), (20, 0.327), (50, 0.313)):
        mean, found = moments(DDBMSampler(), target, karras(steps))
        assert found == pytest.approx(std, abs=2e-3) and mean == pytest.approx(0.6, abs=0.017)
        assert moments(DDBMSampler(churn=0.0), target, karras(steps))[1] == 0
    assert moments(DDBMSampler(churn=0.9), target, karras(5))[1] == pytest.approx(0.517, abs=3e-3)


@both
def test_it_converges_to_the_target(process: DDBM) -> None:
    mean, std = moments(DDBMSampler(), NormalTarget(process), Karras()(process, 150))
    assert mean == pytest.approx(0.6, abs=4e-3) and std == pytest.approx(0.3, abs=8e-3)


def test_plan_equals_the_walk() -> None:
    process, sampler = DDBM(), DDBMSampler()
    target, x = NormalTarget(process), torch.full((2, 3), -0.4, dtype=F64)
    times = even(4)
    compiled = plan(sampler, process, times)
    assert compiled.nfe == sampler.nfe(4) == 11
    noises = [Noise([1, 2], (3,), dtype=F64) for _ in range(2)]
    walked = walk(sampler, target, x, times, noises[0])
    torch.testing.assert_close(compiled(target, x, noises[1]), walked, rtol=0, atol=1e-12)


def test_settings_out_of_range() -> None:
    for make in (
        lambda: DDBM(base="vpp"),
        lambda: DDBM(beta_min=3.0),
        lambda: DDBM(sigma_max=0.0),
        lambda: BridgeEDM(covariance=0.3),
        lambda: DDBMSampler(churn=1.0),
        lambda: DDBMSampler(churn=math.nan),
    ):
        with pytest.raises(BadInput):
            make()
    with pytest.raises(BadInput, match="source images, are missing"):
        DDBM().begin(torch.randn(1, 3), 1.0)
    with pytest.raises(BadInput, match="begins at t = 1"):
        DDBM().begin(torch.randn(1, 3), 0.5, torch.randn(1, 3))
