"""Likelihood weighting: the loss is the variational bound, and sampling in log SNR keeps its mean with less variance."""

from __future__ import annotations

import pytest
import torch

from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.likelihood import VariationalBound
from hasten.pick import pick
from hasten.schedules import Flow, SubVP, VPCosine, VPLinear
from hasten.train.losses import DenoisingLoss, LikelihoodWeight, Uniform, UniformLogSNR, snr_weight
from tests.factories import noise_data, tiny_denoiser, tiny_unet

SCHEDULES = [VPLinear(), SubVP(), VPCosine(0.0), Flow()]


def per_time(schedule, times, weight, u):
    """The weighted expected squared error of x at the quantiles u, for data N(0, .25) and the exact network."""
    t = times(schedule, u)
    loss = DenoisingLoss(times=times, weight=weight)
    denoiser = tiny_denoiser(schedule=schedule, prediction="v")
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    _, _, c_out = denoiser.prediction.coefficients(alpha, sigma)
    error = 0.25 * sigma**2 / (0.25 * alpha**2 + sigma**2)
    return loss.factor(denoiser, t) / c_out**2 * error


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_both_forms_have_the_mean_of_the_bound(schedule):
    u = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    by_time = per_time(schedule, Uniform(), LikelihoodWeight(), u)
    by_snr = per_time(schedule, UniformLogSNR(), snr_weight, u)
    method = VariationalBound(samples=1)
    t, factor = method.weighted_times(schedule, (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    bound = (factor * (alpha / sigma) ** 2 * 0.25 * sigma**2 / (0.25 * alpha**2 + sigma**2)).mean()
    high, low = UniformLogSNR().range(schedule)
    assert float(by_snr.mean()) == pytest.approx(float(bound) / (high - low), rel=1e-3)
    assert float(by_time.mean()) == pytest.approx(float(by_snr.mean()), rel=5e-3)
    # a sample of the noise adds as much to both, so that the variance over times is what differs
    assert float(by_snr.std()) < float(by_time.std())


def test_the_likelihood_weight_of_linear_betas_is_beta_over_sigma_squared():
    # g^2 / sigma^2 of the variance-preserving equation, on the error of eps, over the range of log SNR
    schedule, t = VPLinear(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    beta = 0.1 + 19.9 * t
    weight = LikelihoodWeight().at(schedule, t) * (schedule.sigma(t) / schedule.alpha(t)) ** 2
    high, low = UniformLogSNR().range(schedule)
    assert torch.allclose(weight * (2 * high - 2 * low) / 0.999, beta / schedule.sigma(t) ** 2)


def test_as_an_option_of_training():
    process = pick("train_processes", "diffusion:weight=likelihood,times=log_snr,schedule=vp,prediction=eps")
    denoiser = process.denoiser(noise_data(), lambda **options: tiny_unet(**options))
    assert denoiser.schedule == VPLinear() and denoiser.prediction.name == "eps"
    from hasten.train_processes import TrainSettings

    (module,) = process.modules(denoiser, noise_data(), TrainSettings())
    x = torch.randn(64, 1, 8, 8)
    torch.manual_seed(0)
    loss = module.loss({"x": x})
    torch.manual_seed(0)
    assert torch.equal(loss, DenoisingLoss(0, UniformLogSNR(), snr_weight)(denoiser, {"x": x}))
    with pytest.raises(BadInput, match="pure noise"):
        pick("train_processes", "diffusion:prediction=eps")
    with pytest.raises(BadInput, match="likelihood"):
        pick("train_processes", "diffusion:weight=likelyhood")


def test_the_exact_network_has_the_smallest_loss():
    # of networks x0 = gain x_t the posterior mean's gain is the best at every time, whatever the weight
    data = Gaussian(torch.zeros(1), torch.tensor([0.25]), VPLinear())
    x = data.sample(1000, torch.Generator().manual_seed(0))
    bound = VariationalBound(samples=2)
    true = bound(data, x, range(1000)).nats.mean()
    for factor in (0.5, 2.0):
        other = Gaussian(torch.zeros(1), torch.tensor([0.25 * factor]), VPLinear())
        assert bound(other, x, range(1000)).nats.mean() > true
