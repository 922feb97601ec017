"""Improved DDPM: the table, the optimal variance, the hybrid loss, importance-sampled times, the sampler."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.likelihood import AncestralBound, VariationalBound
from hasten.likelihood._learned_variance import interpolated_log_variance, transition, x0_and_variance
from hasten.nets.variance_unet import VarianceUNet
from hasten.predictions import Eps
from hasten.samplers import DDPM
from hasten.sampling import Noise, walk
from hasten.schedules import Discrete, VPCosine
from hasten.train.data import Data
from hasten.train.losses import DenoisingLoss
from hasten.train_processes.improved_ddpm import VarianceLoss, WithHistory, cosine_table
from tests.factories import noise_data, tiny_model


def test_the_cosine_table():
    table = cosine_table(1000)
    alphas = torch.tensor(table.alphas_cumprod)
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    for i, beta in ((1, 4.128e-5), (500, 3.146e-3), (999, 0.75), (1000, 0.999)):
        assert float(betas.double()[i - 1]) == pytest.approx(beta, rel=2e-3)
    assert table.alphas_cumprod[499] == pytest.approx(0.49384, abs=1e-5)
    assert table.alphas_cumprod[999] == pytest.approx(2.43e-9, rel=2e-3)
    assert 1 - cosine_table(4000).alphas_cumprod[0] == pytest.approx(9.866e-6, rel=1e-3)
    assert 1 - cosine_table(10).alphas_cumprod[0] == pytest.approx(0.02791, rel=1e-3)
    assert cosine_table(10).alphas_cumprod[9] == pytest.approx(2.41e-5, rel=1e-2)


def optimal(steps, schedule=None):
    """b~, b and the best variance of the steps 2 .. T for data N(0, .25), float64."""
    schedule = schedule or cosine_table(steps)
    i = torch.arange(2, steps + 1, dtype=torch.float64)
    gain, small, large = transition(schedule, (i - 1) / steps, i / steps)
    alpha, sigma = schedule.alpha(i / steps), schedule.sigma(i / steps)
    return i, small, large, small + gain**2 * 0.25 * sigma**2 / (0.25 * alpha**2 + sigma**2)


def test_the_best_interpolation_lies_between_the_bounds():
    i, small, large, best = optimal(1000)
    v = torch.log(best / small) / torch.log(large / small)
    assert 0.25 - 1e-3 < float(v.min()) and float(v.max()) < 1 + 1e-9
    assert float(v[i == 500]) == pytest.approx(0.397, abs=1e-3)


def hermite_terms(steps, v):
    """E of the KL terms of the steps 2 .. T with variances of the interpolations v (T - 1,), for data N(0, .25)."""
    schedule = cosine_table(steps)
    data = Gaussian(torch.zeros(1), torch.tensor([0.25]), schedule)
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    x, eps = (each.reshape(-1, 1) for each in torch.meshgrid(0.5 * nodes, nodes, indexing="ij"))
    i = torch.arange(2, steps + 1, dtype=torch.float64).repeat_interleave(9)
    x, eps = x.repeat(steps - 1, 1), eps.repeat(steps - 1, 1)
    x_t = schedule.alpha(i / steps)[:, None] * x + schedule.sigma(i / steps)[:, None] * eps
    method = AncestralBound(steps=steps, clip=False)
    kl = method.kl(schedule, x, data(x_t, i / steps), v.repeat_interleave(9)[:, None], i, 1.0)
    return kl.reshape(steps - 1, 9) @ torch.outer(weights, weights).flatten()


@pytest.mark.parametrize(
    "steps, sums", [(10, (1.703, 1.192, 1.136)), (50, (3.319, 2.496, 2.484)), (1000, (4.757, 4.355, 4.354))]
)
def test_the_terms_of_small_large_and_best_variances(steps, sums):
    _, small, large, best = optimal(steps)
    v = torch.log(best / small) / torch.log(large / small)
    for one, expected in zip((torch.zeros_like(v), torch.ones_like(v), v), sums):
        assert float(hermite_terms(steps, one).sum()) == pytest.approx(expected, abs=1.5e-3)


def test_the_bound_is_least_at_the_best_variance():
    _, small, large, best = optimal(100)
    v = (torch.log(best / small) / torch.log(large / small)).requires_grad_(True)
    (grad,) = torch.autograd.grad(hermite_terms(100, v).sum(), v)
    assert float(grad.abs().max()) < 1e-9
    (off,) = torch.autograd.grad(hermite_terms(100, v + 0.1).sum(), v)
    assert bool((off > 0).all())


class Oracle(nn.Module):
    """eps of data N(0, .25) in closed form, and an interpolation from a small network of the time."""

    def __init__(self, schedule, v=None):
        super().__init__()
        self.data = Gaussian(torch.zeros(1), torch.tensor([0.25]), schedule)
        self.v = v
        self.layers = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def with_learned_variance(self, x, time):
        t = time.double()
        alpha, sigma = (
            f(t).reshape(-1, *[1] * (x.ndim - 1)) for f in (self.data.schedule.alpha, self.data.schedule.sigma)
        )
        eps = sigma / (0.25 * alpha**2 + sigma**2) * x
        o = self.layers(2 * time[:, None].to(x.dtype) - 1) if self.v is None else 2 * self.v(t)[:, None] - 1
        return eps.to(x.dtype), o.to(x.dtype).reshape(eps.shape[0], *[1] * (x.ndim - 1)).expand_as(x)

    def forward(self, x, time):
        return self.with_learned_variance(x, time)[0]


@pytest.mark.slow
def test_a_network_learns_the_best_variance():
    torch.manual_seed(0)
    schedule = cosine_table(100)
    net = Oracle(schedule)
    denoiser = Denoiser(net, schedule, Eps())
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    loss, n = VarianceLoss(), 2000
    for step in range(n):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / n)
        x = 0.5 * torch.randn(1024, 1)
        i = torch.randint(2, 101, (1024,)).double()
        x_t = schedule.alpha(i / 100)[:, None] * x + schedule.sigma(i / 100)[:, None] * torch.randn_like(x)
        x0, v = x0_and_variance(denoiser, x_t.float(), i / 100)
        value = loss.bound(schedule, x, x0.detach(), v, i).mean()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    i, small, large, best = optimal(100, schedule)
    with torch.no_grad():
        _, v = x0_and_variance(denoiser, torch.zeros(99, 1), i / 100)
    error = (interpolated_log_variance(v[:, 0].double(), large, small) - best.log()).abs()
    inside = (i / 100 >= 0.05) & (i / 100 <= 0.95)
    assert float(error[inside].max()) < 0.01 and float(error.max()) < 0.04


def test_the_hybrid_loss_trains_the_variance_with_a_detached_mean():
    torch.manual_seed(0)
    net = VarianceUNet(1, widths=(8,), embedding=8)
    nn.init.normal_(net.unet.conv_out.weight, std=0.1)
    denoiser = Denoiser(net, cosine_table(20), Eps())
    batch = {"x": torch.randint(0, 256, (32, 1, 4, 4)) / 127.5 - 1}

    def gradient(share):
        torch.manual_seed(1)
        net.zero_grad()
        VarianceLoss(share=share)(denoiser, batch).backward()
        return net.unet.conv_out.weight.grad.clone()

    plain, more = gradient(0.0), gradient(1e-3)
    assert torch.allclose(plain[0], more[0], atol=1e-7)  # the channel of eps
    assert float(plain[1].abs().max()) == 0 and float(more[1].abs().max()) > 0  # and that of the variance


def test_the_simple_term_is_the_error_of_the_raw_output():
    torch.manual_seed(0)
    net = VarianceUNet(1, widths=(8,), embedding=8)
    nn.init.normal_(net.unet.conv_out.weight, std=0.1)
    batch = {"x": torch.randint(0, 256, (16, 1, 4, 4)) / 127.5 - 1}
    for prediction in ("eps", "v"):
        denoiser = Denoiser(net, cosine_table(20), prediction)
        torch.manual_seed(2)
        ours = float(VarianceLoss(share=0.0)(denoiser, batch).detach())
        torch.manual_seed(2)
        grid = dataclasses.replace(DENOISING, times=lambda schedule, u: ((u * 20).floor() + 1) / 20)
        assert ours == pytest.approx(float(grid(denoiser, batch).detach()), rel=1e-3)


DENOISING = DenoisingLoss(label_drop=0.0)


def test_importance_sampled_times():
    net = WithHistory(VarianceUNet(1, widths=(8,), embedding=8), 50)
    losses = 1 / torch.arange(1, 51)
    assert torch.allclose(net.probabilities(), torch.full((50,), 0.02, dtype=torch.float64))
    for _ in range(10):
        net.update(torch.arange(1, 51).double(), losses)
    torch.manual_seed(0)
    i, weight = net.draw(torch.rand(20_000).double())
    weighted = weight * losses[i.long() - 1]
    uniform = losses[torch.randint(0, 50, (20_000,))]
    assert abs(float(weighted.mean() - losses.mean())) < 3 * float(weighted.std()) / 20_000**0.5 + 1e-9
    assert float(weighted.std()) < 0.2 * float(uniform.std())
    # the oldest value leaves
    net.update(torch.tensor([7.0]).double(), torch.tensor([5.0]))
    assert float(net.history[6, -1]) == 5 and float(net.counts[6]) == 11


def test_the_sampler_has_the_variance_of_the_data_with_the_learned_variance():
    # with the best variance every step is exact in law for Gaussian data, in however few steps; with the small one not
    steps, n = 5, 4000
    schedule = VPCosine()

    def best(t):
        s = (t - 1 / steps).clamp(min=0)
        gain, small, large = transition(schedule, s.clamp(min=1e-9), t)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        value = small + gain**2 * 0.25 * sigma**2 / (0.25 * alpha**2 + sigma**2)
        return torch.log(value / small) / torch.log(large / small)

    denoiser = Denoiser(Oracle(schedule, best), schedule, Eps()).eval()
    times = torch.tensor([0.99, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(0.2)), float(schedule.sigma(0.2))
    wanted = math.sqrt(0.25 * alpha**2 + sigma**2)
    stds = {}
    for variance in ("learned", "small", "large"):
        sampler = DDPM(variance)
        # the first state is exact, so that the steps alone are measured
        x = Noise(range(n), (1,), torch.float64)() * math.sqrt(
            0.25 * float(schedule.alpha(0.8)) ** 2 + float(schedule.sigma(0.8)) ** 2
        )
        out = walk(sampler, sampler.wrap(denoiser), x, times[1:], Noise(range(n, 2 * n), (1,), torch.float64))
        stds[variance] = float(out.std())
    assert stds["learned"] == pytest.approx(wanted, rel=0.03)
    assert abs(stds["small"] - wanted) > abs(stds["learned"] - wanted) + 0.01
    assert DDPM().linear and not DDPM("learned").linear


def test_a_network_without_a_variance_is_refused():
    with pytest.raises(BadInput, match="variance=learned needs a network"):
        tiny_model().sample(1, sampler="ddpm:variance=learned", steps=2)


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_train_save_load_sample_evaluate(tmp_path, loss):
    options = {"steps": 3, "widths": (8,), "batch_size": 8, "precision": "fp32", "show": False, "device": "cpu"}
    data = noise_data(classes=("a", "b")) if loss == "hybrid" else noise_data()
    data = Data.of(data.images(range(len(data))), data.labels, data.classes)
    process = f"improved_ddpm:loss={loss},timesteps=30"
    model = hasten.train_model(data, tmp_path / "out", process=process, **options)
    assert model.sampler == "ddpm:variance=learned" and isinstance(model.denoiser.net, VarianceUNet)
    again = hasten.load(tmp_path / "out")
    x = model.sample(2, steps=3)
    assert torch.equal(x, again.sample(2, steps=3)) and torch.isfinite(x).all()
    assert not torch.equal(x, again.sample(2, steps=3, sampler="ddpm"))
    assert torch.isfinite(again.sample(1, steps=3, sampler="unipc")).all()
    if loss == "hybrid":
        assert torch.isfinite(again.sample(2, steps=3, guidance_scale=2.0)).all()
    method = AncestralBound(steps=4, samples=3, variance="learned")
    result = hasten.evaluate_likelihood(again, data, method=method, n=4)
    assert math.isfinite(result["bits_per_dim"]) and result["nfe"] == 4


def test_the_ancestral_bound_with_the_small_variance_is_the_bound_in_steps():
    # the same KL terms as of VariationalBound on a grid of a table, whose first entry is where that begins
    schedule = Discrete.linear(10)
    data = Gaussian(torch.zeros(1), torch.tensor([0.25]), schedule)
    x = (torch.randint(0, 17, (3000, 1)) / 8 - 1.0).double()
    one = AncestralBound(steps=10, samples=9, clip=False)(data, x, range(3000), levels=17).parts
    other = VariationalBound(steps=9, samples=9)(data, x, range(3000), levels=17).parts
    for name in ("diffusion", "prior"):
        error = math.hypot(float(one[name].std()), float(other[name].std())) / 3000**0.5
        assert float(one[name].mean()) == pytest.approx(float(other[name].mean()), abs=3 * error + 1e-9)
