"""The variational bound: closed forms on Gaussian data, the decoders, and the bound against the exact value."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.likelihood import OdeLikelihood, VariationalBound, decoder_log_probability, gaussian_bin_log_probability
from hasten.pick import pick
from hasten.predictions import V
from hasten.schedules import Flow, Schedule, VPCosine, VPLinear


@dataclasses.dataclass(frozen=True)
class Gamma(Schedule):
    """`sigma^2 = sigmoid(gamma)`, gamma from -13.3 to 5 with a shape, over t from .5 to 1; only for these times."""

    shape: str = "linear"

    @property
    def t_min(self):
        return 0.5

    def gamma(self, t):
        u = 2 * t - 1
        shapes = {
            "linear": lambda: u,
            "quadratic": lambda: u**2,
            "sine": lambda: torch.sin(math.pi * u / 2),
            "cubic": lambda: 0.5 * (u + u**3),
        }
        return -13.3 + 18.3 * shapes[self.shape]()

    def _alpha(self, t):
        return torch.sigmoid(-self.gamma(t)).sqrt()

    def _sigma(self, t):
        return torch.sigmoid(self.gamma(t)).sqrt()

    def _lam(self, t):
        return -0.5 * self.gamma(t)

    def _time(self, lam):
        low, high = torch.full_like(lam, 0.5), torch.ones_like(lam)
        for _ in range(60):
            middle = (low + high) / 2
            below = self._lam(middle) > lam
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


def hermite(n):
    """Nodes and weights of E over N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / weights.sum())


def pairs(std=0.5):
    """x, eps (9, 1) and weights (9,) that integrate quadratics of Gaussian data and noise exactly."""
    nodes, weights = hermite(3)
    x, eps = (each.reshape(-1, 1) for each in torch.meshgrid(std * nodes, nodes, indexing="ij"))
    return x, eps, torch.outer(weights, weights).flatten()


def diffusion(method, schedule, u):
    """E over data N(0, .25) and noise of the diffusion term, with the exact network, averaged over the quantiles u."""
    data = Gaussian(torch.zeros(1), torch.tensor([0.25]), schedule)
    x, eps, weights = pairs()
    t, factor = method.weighted_times(schedule, u)
    n = len(t)
    error = method.error(data, x.repeat(n, 1), eps.repeat(n, 1), t.repeat_interleave(9)).reshape(n, 9) @ weights
    return factor * error


def test_continuous_time_is_a_difference_of_informations_whatever_the_shape():
    # legendre nodes: 1e-8
    nodes, weights = np.polynomial.legendre.leggauss(80)
    u, w = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
    for shape in ("linear", "quadratic", "sine", "cubic"):
        value = float((diffusion(VariationalBound(), Gamma(shape), u) * w).sum())
        assert value == pytest.approx(5.95601, abs=2e-5)


@pytest.mark.parametrize(
    "shape, steps, value",
    [("linear", 10, 15.73), ("linear", 100, 6.486), ("linear", 1000, 6.006), ("sine", 10, 27.55), ("sine", 100, 6.756)],
)
def test_finite_steps_cost_more_and_depend_on_the_shape(shape, steps, value):
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    total = float(diffusion(VariationalBound(steps=steps), Gamma(shape), u).mean())
    assert total == pytest.approx(value, rel=5e-4)


@pytest.mark.parametrize("t_min, value", [(0.01, 1.2049681294), (1e-5, 1.2057909322)])
def test_the_bound_of_a_density_is_tight_where_the_network_is_exact(t_min, value):
    # E[-log p(x_t)] at t_min of one sample x = .7 under data N(0, .25): both sides in closed form
    schedule = VPLinear()
    data = Gaussian(torch.zeros(1), torch.tensor([0.25]), schedule)
    alpha, sigma = (float(f(t_min)) for f in (schedule.alpha, schedule.sigma))
    variance = alpha**2 * 0.25 + sigma**2
    true = 0.5 * math.log(2 * math.pi * variance) + ((alpha * 0.7) ** 2 + sigma**2) / (2 * variance)
    assert true == pytest.approx(value, abs=1e-9)
    end = math.hypot(0.5 * float(schedule.alpha(1.0)), float(schedule.sigma(1.0)))
    method = VariationalBound(t_min=t_min, prior_std=end)
    # the diffusion term by quadrature in place of random times and noise
    nodes, weights = np.polynomial.legendre.leggauss(100)
    t, factor = method.weighted_times(schedule, torch.tensor((nodes + 1) / 2))
    eps, w = hermite(3)
    x = torch.full((300, 1), 0.7, dtype=torch.float64)
    error = method.error(data, x, eps.repeat(100)[:, None], t.repeat_interleave(3)).reshape(100, 3) @ w
    integral = float((factor * error * torch.tensor(weights / 2)).sum())
    rest = method(data, x[:1], [0]).parts
    assert integral + float(rest["prior"]) + float(rest["entropy"]) == pytest.approx(value, abs=1e-8)
    # and with a network that is wrong it is not
    wrong = Gaussian(torch.tensor([-0.1]), torch.tensor([0.25]), schedule)
    error = method.error(wrong, x, eps.repeat(100)[:, None], t.repeat_interleave(3)).reshape(100, 3) @ w
    assert float((factor * error * torch.tensor(weights / 2)).sum()) > integral + 1e-3


def test_random_times_and_noise_estimate_it():
    schedule = VPLinear()
    data = Gaussian(torch.zeros(1), torch.tensor([0.25]), schedule)
    method = VariationalBound(samples=8, t_min=0.01, prior_std=math.hypot(0.5 * float(schedule.alpha(1.0)), 1.0))
    nats = method(data, torch.full((2000, 1), 0.7), range(2000)).nats
    assert abs(float(nats.mean()) - 1.2049681294) < 3 * float(nats.std()) / 2000**0.5 < 0.5


def test_the_complete_sum_has_no_randomness_of_times():
    schedule = VPLinear()
    method = VariationalBound(steps=12, samples=99)
    t = torch.cat([method.weighted_times(schedule, (j + torch.rand(1).double()) / 12)[0] for j in range(12)])
    grid = schedule.t_min + (1 - schedule.t_min) * torch.arange(1, 13) / 12
    assert (
        torch.allclose(t, grid.double())
        and method(Gaussian(torch.zeros(1), torch.ones(1), schedule), torch.zeros(2, 1), [0, 1]).nfe == 12
    )


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_decoders_sum_to_one(levels):
    k = torch.arange(levels).repeat(3, 1)
    z = torch.tensor([-1.3, 0.21, 0.9]).reshape(3, 1).expand(3, levels).double()
    for q in (0.002, 0.1, 3.0):
        for log_p in (decoder_log_probability(z, k, levels, q), gaussian_bin_log_probability(z, q, k, levels)):
            assert torch.allclose(log_p.exp().sum(1), torch.ones(3, dtype=torch.float64), atol=1e-12)
            assert not torch.isnan(log_p).any()


def test_the_decoder_is_bayes_rule():
    k, e = torch.tensor([[4, 11]]), torch.linspace(-1, 1, 17).double()
    z, q = torch.tensor([[-0.4, 0.31]]).double(), 0.07
    p = torch.stack([torch.distributions.Normal(e, q).log_prob(value).exp() for value in z[0]])
    expected = torch.log(p[[0, 1], k[0]] / p.sum(1))
    assert torch.allclose(decoder_log_probability(z, k, 17, q)[0], expected, atol=1e-12)


class Weak(nn.Module):
    """An untrained network of images."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return 0.3 * self.conv(x)


@pytest.mark.parametrize("schedule, prediction", [(VPCosine(), "eps"), (VPCosine(0.0), "v"), (Flow(), "flow")])
def test_the_bound_is_above_the_ode_and_falls_with_more_steps(schedule, prediction):
    denoiser = Denoiser(Weak(), schedule, prediction).eval()
    k = torch.randint(0, 17, (24, 1, 3, 2), generator=torch.Generator().manual_seed(0))
    x = (k / 8 - 1).float()
    seeds = range(24)
    exact = OdeLikelihood(rtol=1e-2, atol=1e-2, divergence="exact")(denoiser, x, seeds, levels=17).nats

    def bound(**options):
        return VariationalBound(**options)(denoiser, x, seeds, levels=17).nats

    few, twice, many = bound(steps=20, samples=20), bound(steps=40, samples=40), bound(samples=40)
    difference = many - exact
    assert float(difference.mean()) > -3 * float(difference.std()) / 24**0.5
    assert float(few.mean()) > float(twice.mean()) > float(many.mean())


def test_parts_sum_to_the_bound_and_seeds_are_the_samples_own():
    denoiser = Denoiser(Weak(), VPCosine(0.0), V()).eval()
    x = torch.randint(0, 256, (3, 1, 4, 4)) / 127.5 - 1
    result = VariationalBound(samples=3)(denoiser, x, [5, 6, 7], levels=256)
    assert set(result.parts) == {"diffusion", "prior", "reconstruction"}
    assert torch.allclose(sum(result.parts.values()), result.nats)
    alone = VariationalBound(samples=3)(denoiser, x[1:2], [6], levels=256)
    assert torch.allclose(alone.nats, result.nats[1:2], rtol=1e-5)
    gaussian = VariationalBound(samples=3, decoder="gaussian")(denoiser, x, [5, 6, 7], levels=256)
    assert torch.allclose(gaussian.parts["prior"], result.parts["prior"])
    assert not torch.allclose(gaussian.nats, result.nats)


def test_by_name_and_bad_options():
    assert pick("likelihood", "bound:steps=1000,samples=50") == VariationalBound(1000, 50)
    with pytest.raises(BadInput, match="steps"):
        VariationalBound(steps=0)
    with pytest.raises(BadInput, match="softmax"):
        VariationalBound(decoder="softmx")
