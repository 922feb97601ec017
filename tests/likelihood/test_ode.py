"""The likelihood by the probability-flow ODE: exact densities, the estimator, scaling, dequantisation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.exact import Gaussian, GaussianMixture
from hasten.likelihood import OdeLikelihood, bits_per_dim
from hasten.likelihood._base import dequantise, level_indices
from hasten.pick import pick
from hasten.schedules import EDM, VE, Discrete, Flow, SubVP, VPCosine, VPLinear


def mixture(schedule, scale=1.0):
    """Three components in 4 dimensions."""
    k, j = torch.arange(3.0)[:, None], torch.arange(4.0)
    means = 0.7 * torch.cos(1.7 * k + 2.3 * j)
    variances = 0.04 * (1 + 0.5 * torch.sin(k + j))
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), scale * means, scale**2 * variances, schedule)


def exact(data, x, **options):
    """The log-density by the ODE with the exact prior, which leaves the solver's error alone."""
    method = OdeLikelihood(divergence="exact", t_min=1e-5, **options)
    end = data.schedule.t_max
    log_p, nfe = method.log_density(data, x, log_prior=lambda x_t: data.log_prob(x_t, end))
    return log_p, nfe


@pytest.mark.parametrize(
    "schedule", [VPLinear(), SubVP(), VPCosine(), VPCosine(0.0), Flow(), EDM()], ids=lambda s: type(s).__name__
)
def test_the_density_of_a_mixture_is_exact(schedule):
    data = mixture(schedule)
    x = data.sample(64, torch.Generator().manual_seed(0))
    log_p, nfe = exact(data, x)
    # the usual tolerance; sigma is below 1e-4 at t_min, so the true density is that of the data
    assert float((log_p - data.log_prob(x)).abs().mean()) < 1e-3 and nfe < 250


def test_tolerance_sets_the_error():
    data = mixture(VPLinear())
    x = data.sample(16, torch.Generator().manual_seed(0))
    errors, counts = [], []
    for tol in (1e-3, 1e-5, 1e-7):
        log_p, nfe = exact(data, x, rtol=tol, atol=tol)
        errors.append(float((log_p - data.log_prob(x)).abs().mean()))
        counts.append(nfe)
    assert errors[0] > 10 * errors[1] > 10 * errors[2] and errors[2] < 1e-4  # the last is what t_min leaves
    assert counts == sorted(counts)


def test_a_table_with_its_first_entry_as_the_end():
    data = mixture(Discrete.linear())
    x = data.sample(16, torch.Generator().manual_seed(0))
    method = OdeLikelihood(divergence="exact", rtol=1e-6, atol=1e-6)
    t_min, end = data.schedule.t_min, data.schedule.t_max
    log_p, _ = method.log_density(data, x, log_prior=lambda x_t: data.log_prob(x_t, end))
    # the density of x_t / alpha at t_min
    alpha = float(data.schedule.alpha(t_min))
    assert torch.allclose(log_p, data.log_prob(alpha * x, t_min) + 4 * math.log(alpha), atol=1e-3)


def test_the_estimator_is_unbiased():
    data = mixture(VPLinear())
    x = data.sample(1, torch.Generator().manual_seed(3)).repeat(64, 1)
    method = OdeLikelihood(rtol=1e-3, atol=1e-3)
    values = -method(data, x, range(64)).nats
    true, _ = OdeLikelihood(divergence="exact", rtol=1e-3, atol=1e-3).log_density(data, x[:1])
    error = values.std() / 8
    assert 0 < float(error) and abs(float(values.mean() - true)) < 3 * float(error)


def test_scaling_the_data_changes_the_density_by_d_log_a():
    a, schedule = 1.7, VPLinear()
    small, large = mixture(schedule), mixture(schedule, a)
    x = small.sample(16, torch.Generator().manual_seed(0))
    difference = exact(small, x, rtol=1e-5, atol=1e-5)[0] - exact(large, a * x, rtol=1e-5, atol=1e-5)[0]
    assert torch.allclose(difference, torch.full((16,), 4 * math.log(a), dtype=torch.float64), atol=1e-3)


def test_the_prior_of_the_samplers_costs_its_own_divergence():
    # the difference of two priors is log p_T - log N at the end of each trajectory, exactly; their mean is the KL
    schedule = VPLinear(beta_max=6.0)
    data = Gaussian(torch.zeros(3), torch.full((3,), 0.25), schedule)
    x = data.sample(4, torch.Generator().manual_seed(0))
    method = OdeLikelihood(divergence="exact", rtol=1e-6, atol=1e-6)
    end = data.endpoint(x * schedule.alpha(schedule.t_min), schedule.t_min, 1.0)
    std = math.sqrt(float(schedule.alpha(1.0)) ** 2 * 0.25 + float(schedule.sigma(1.0)) ** 2)

    def normal(std):
        return lambda x_t: torch.distributions.Normal(0.0, std).log_prob(x_t).sum(1)

    ours, _ = method.log_density(data, x)
    with_exact, _ = method.log_density(data, x, log_prior=normal(std))
    assert torch.allclose(with_exact - ours, normal(std)(end) - normal(1.0)(end), atol=1e-4)


def test_levels():
    k = torch.arange(17).reshape(1, 17)
    x = (2 * k / 16 - 1).float()
    assert torch.equal(level_indices(x, 17), k)
    as_bytes = (k * 255 / 16).round() / 127.5 - 1  # 17 levels that were stored as uint8
    assert torch.equal(level_indices(as_bytes, 17), k)
    low, high = dequantise(k, 17, torch.zeros(1, 17)), dequantise(k, 17, torch.ones(1, 17))
    assert torch.allclose(high[:, :-1], low[:, 1:]) and torch.allclose(high - low, torch.tensor(2 / 16).double())
    assert torch.allclose((low + high) / 2, x.double())
    with pytest.raises(BadInput, match="not of 17 levels"):
        level_indices(x * 0.9, 17)


def test_discrete_data_get_the_mass_of_their_bins():
    # data uniform on 4 levels in 2 dimensions: 2 bits a dimension, which a mixture of narrow Gaussians cannot reach,
    # but N(0, s^2) is known exactly
    s, levels, schedule = 0.6, 9, VPLinear()
    data = Gaussian(torch.zeros(2), torch.full((2,), s**2), schedule)
    x = torch.tensor([[0.25, -0.5]]).repeat(200, 1)
    method = OdeLikelihood(divergence="exact", rtol=1e-4, atol=1e-4, t_min=1e-5)
    values = method(data, x, range(200), levels=levels).nats
    normal = torch.distributions.Normal(0.0, s)
    edges = torch.tensor([0.125, 0.375]), torch.tensor([-0.625, -0.375])
    true = -sum(float(torch.log(normal.cdf(high) - normal.cdf(low))) for low, high in edges)
    # dequantisation is a bound, and here almost tight
    assert true - 3 * float(values.std() / 200**0.5) - 0.01 < float(values.mean()) < true + 0.1
    assert float(bits_per_dim(values.mean(), 2)) == pytest.approx(float(values.mean()) / 2 / math.log(2))


class Random(nn.Module):
    """An untrained network, whose Jacobian is not symmetric."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 1, 3, padding=1))

    def forward(self, x, t):
        return self.layers(x) + t.view(-1, 1, 1, 1) * x


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_the_density_of_any_network_is_that_of_its_own_map(prediction):
    # change of variables: log p = log N(y_T) + log |det dy_T / dx|, by differences of the trajectories' ends
    denoiser = Denoiser(Random().double(), VPCosine(), prediction)
    method = OdeLikelihood(divergence="exact", rtol=1e-7, atol=1e-7, t_min=0.2)
    x = torch.randn(1, 1, 2, 3, dtype=torch.float64)
    ends = []

    def keep(x_t):
        ends.append(x_t)
        return torch.zeros(len(x_t))

    shifts = torch.cat([torch.zeros(1, 6), 1e-3 * torch.eye(6), -1e-3 * torch.eye(6)]).double().reshape(13, 1, 2, 3)
    log_p, _ = method.log_density(denoiser, x + shifts, log_prior=keep)
    y = ends[0].flatten(1)
    jacobian = (y[1:7] - y[7:]) / 2e-3
    assert float(log_p[0]) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-4)


def test_half_precision_and_one_image():
    net = Random().to(torch.bfloat16)
    denoiser = Denoiser(net, VPCosine(0.0), "v").eval()
    result = OdeLikelihood(rtol=1e-2, atol=1e-2)(denoiser, torch.zeros(1, 1, 3, 2) + 1 / 255, [7], levels=256)
    assert result.nats.shape == (1,) and torch.isfinite(result.nats).all() and result.nats.dtype == torch.float64


def test_by_name_and_bad_options():
    assert pick("likelihood", "ode:divergence=exact,rtol=1e-4") == OdeLikelihood(divergence="exact", rtol=1e-4)
    with pytest.raises(BadInput, match="hutchinson"):
        OdeLikelihood(divergence="hutchison")
    with pytest.raises(BadInput, match="rtol"):
        OdeLikelihood(rtol=0)
    with pytest.raises(BadInput, match="t_min must lie"):
        OdeLikelihood(t_min=2.0)(mixture(VE()), torch.zeros(1, 4), [0])
