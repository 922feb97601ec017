"""Truncated chains: a start of the right law loses nothing, one of noise does, and what is wrong with it contracts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import BadInput
from hasten.exact import Gaussian, GaussianMixture
from hasten.guides.cfg import CFG
from hasten.model import Model
from hasten.nets.prior import PriorNet, SharedPrior
from hasten.nets.vae import VAE
from hasten.pick import pick
from hasten.samplers import DDIM, DDPM
from hasten.sampling import Noise, walk
from hasten.schedules import VE, Discrete, Flow, Schedule, Truncated, VPCosine, VPLinear, schedule_from_dict
from hasten.starts import EarlyStop, Prior
from hasten.starts.ccdf import remaining
from hasten.starts.early_stop import generated_images
from hasten.times import Trailing, UniformLambda
from tests.factories import tiny_denoiser

TABLE = Discrete.linear()


def bimodal(schedule: Schedule) -> GaussianMixture:
    """N(-1, .01) / 2 + N(1, .01) / 2."""
    return GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1), 0.01), schedule)


# ---- the schedule ----


@pytest.mark.parametrize("inner", [VPCosine(), VPLinear(), Flow(), VE(), TABLE], ids=lambda s: type(s).__name__)
def test_a_truncated_schedule_is_the_one_inside_up_to_its_end(inner: Schedule) -> None:
    cut = Truncated(inner, 0.4)
    t = torch.linspace(0, 1, 33, dtype=torch.float64)
    for curve in ("alpha", "sigma", "lam", "prior_std"):
        assert torch.equal(getattr(cut, curve)(t), getattr(inner, curve)(t))
    assert torch.equal(cut.time(inner.lam(t[1:-1])), inner.time(inner.lam(t[1:-1])))
    assert (cut.t_max, cut.t_min, cut.zero_snr) == (0.4, inner.t_min, inner.zero_snr)
    assert schedule_from_dict(json.loads(json.dumps(cut.to_dict()))) == cut
    for grid in (UniformLambda(), Trailing()):
        assert float(grid(cut, 4)[0]) == 0.4
    assert hasattr(cut, "index") == isinstance(inner, Discrete)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Truncated(VPCosine(), 1.0), r"0.001 < end <= 0.9946, found 1"),
        (lambda: Truncated(VPCosine(), 0.0), "found 0"),
        (lambda: Truncated(Truncated(VPLinear(), 0.5), 0.2), "ends at 0.5 already"),
        (lambda: Truncated("vp", 0.5), "needs a schedule"),  # type: ignore[arg-type]
        (lambda: EarlyStop(time=1.0), "0 < time < 1"),
    ],
)
def test_bad_input(make: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()


# ---- where the chain begins ----


@pytest.mark.parametrize("T, gap", [(10, 0.381), (50, 0.082), (100, 0.016)])
def test_the_exact_law_of_the_cut_state_gives_the_data_and_noise_does_not(T: int, gap: float) -> None:
    """Ancestral steps of the 1000-entry table from entry T: the Wasserstein-1 distance to the data. From N(0, 1) it is
    what the generator has to remove."""
    schedule = Truncated(TABLE, T / 1000)
    data, n, g = bimodal(schedule), 8_000, torch.Generator().manual_seed(0)
    e = torch.randn(n, 1, generator=g, dtype=torch.float64)
    z = float(schedule.alpha(T / 1000)) * data.sample(n, g) + float(schedule.sigma(T / 1000)) * e
    truth = data.sample(n, g).flatten().sort().values
    times = torch.arange(T, -1, -1, dtype=torch.float64) / 1000

    def distance(start: Tensor) -> float:
        x = walk(DDPM(), data, start, times, lambda: torch.randn(n, 1, generator=g, dtype=torch.float64))
        # the modes may have drawn unequal numbers of samples: compare within each
        low, high = (side.sort().values for side in (x[x < 0], x[x >= 0]))
        ours = torch.cat([resampled(low, n // 2), resampled(high, n // 2)])
        theirs = torch.cat([resampled(truth[truth < 0], n // 2), resampled(truth[truth >= 0], n // 2)])
        return float((ours - theirs).abs().mean())

    assert distance(z) < 0.006
    assert abs(distance(e) - gap) < 0.006 + 0.05 * gap


def resampled(sorted_values: Tensor, n: int) -> Tensor:
    """n quantiles of sorted values (m,)."""
    return sorted_values[(torch.arange(n) + 0.5).mul(len(sorted_values) / n).long()]


@pytest.mark.parametrize("entry, distance", [(100, 1.37057), (200, 0.65158), (400, 0.11430)])
def test_two_chains_with_the_same_noise_end_at_the_published_distance(entry: int, distance: float) -> None:
    """And so does the bias of a generator: variance .25, a gap of 2, `alpha^2 v / (alpha^2 v + sigma^2)` of it."""
    data = Gaussian(torch.zeros(1), torch.full((1,), 0.25), TABLE)
    times = torch.arange(entry, -1, -1, dtype=torch.float64) / 1000
    ends = []
    for bias in (-1.0, 1.0):
        noise = Noise([0], (1,), torch.float64)
        start = EarlyStop(entry / 1000, generator=lambda u, bias=bias: 0.5 * u + bias)
        ends.append(walk(DDPM(), data, start.begin(data, noise, times[0]), times, noise))
    found = float(ends[1] - ends[0])
    assert abs(found - distance) < 3e-5
    assert abs(found - 2 * float(remaining(TABLE, entry / 1000, 0.25))) < 1e-9


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_a_perfect_generator_is_unbiased_at_any_time(t: float) -> None:
    """Mean and variance of where the ODE ends, linear in the generator's image and in the noise of the start."""
    mean, std = torch.full((1,), 0.3, dtype=torch.float64), 0.5
    data, noise = Gaussian(mean, torch.full((1,), std**2), VPLinear()), Noise([0], (1,), torch.float64)
    e, at = float(noise.initial()), torch.tensor(t, dtype=torch.float64)
    at_mean, above = (
        EarlyStop(t, lambda u, x=x: mean[None] + x).begin(data, noise, at)
        for x in (0.0, std)  # type: ignore[misc]
    )
    clean = float(data.schedule.alpha(t)) * mean[None]
    ends = [float(data.endpoint(z, t)) for z in (clean, clean + (at_mean - clean) / e, clean + above - at_mean)]
    assert abs(ends[0] - 0.3) < 1e-12
    assert abs(sum((end - ends[0]) ** 2 for end in ends[1:]) - std**2) < 1e-12


# ---- the starts ----


class Fixed(nn.Module):
    """A generator that remembers what it was given."""

    latent_shape = (3,)

    def forward(self, noise: Tensor, **cond: Any) -> Tensor:
        self.noise, self.cond = noise, cond
        return noise.mean(1).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_early_stop_diffuses_the_images_once() -> None:
    denoiser = tiny_denoiser(classes=2, schedule=VPCosine())
    noise, net = Noise([4, 5], (1, 8, 8)), Fixed()
    label = torch.tensor([0, 1])
    z = EarlyStop(0.3, net).begin(denoiser, noise, torch.tensor(0.3), label=label, null_text=label)
    a, s = float(denoiser.schedule.alpha(0.3)), float(denoiser.schedule.sigma(0.3))
    x = net.noise.mean(1).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    assert torch.allclose(z, a * x + s * noise.initial(), atol=1e-6)
    assert list(net.cond) == ["label"] and net.noise.shape == (2, 3)
    assert not torch.equal(net.noise, Noise([4, 5], (3,)).initial())  # independent of the noise that is added
    alone = EarlyStop(0.3, net).begin(denoiser, Noise([5], (1, 8, 8)), torch.tensor(0.3), label=label[1:])
    assert torch.allclose(alone, z[1:])


def test_any_model_is_a_generator() -> None:
    """Whose image k is that of its own seed, whatever the batch; conditions are its labels."""
    denoiser = tiny_denoiser(classes=2, schedule=VPCosine())
    other = Model(tiny_denoiser(classes=2, seed=3), "other", (1, 8, 8), ("a", "b"), steps=2)
    label = torch.tensor([1, 0, 1])
    x = generated_images(other, Noise([7, 8, 3], (1, 8, 8)), label=label)
    for k, seed in enumerate((7, 8, 3)):
        assert torch.allclose(x[k], other.sample(1, int(label[k]), seed + 2**40)[0], atol=1e-5)
    model = Model(denoiser, "tiny", (1, 8, 8), ("a", "b"), steps=3)
    drawn = model.sample(2, seed=7, start=EarlyStop(0.4, other))
    assert torch.isfinite(drawn).all() and not torch.equal(drawn, model.sample(2, seed=7))


def test_early_stop_refuses_what_it_cannot_begin_with() -> None:
    denoiser, noise = tiny_denoiser(), Noise([0], (1, 8, 8))
    with pytest.raises(BadInput, match="give it time="):
        EarlyStop(generator=Fixed()).begin(denoiser, noise, torch.tensor(denoiser.schedule.t_max))
    cut = tiny_denoiser(schedule=Truncated(VPCosine(), 0.4))
    with pytest.raises(BadInput, match="trained up to t = 0.4, found a grid that begins at 0.5"):
        EarlyStop(0.5, Fixed()).begin(cut, noise, torch.tensor(0.5))
    with pytest.raises(BadInput, match=r"must give images of shape \(1, 1, 8, 8\), it gave \(1, 5\)"):
        EarlyStop(0.3, lambda u: u, latent=(5,)).begin(denoiser, noise, torch.tensor(0.3))
    with pytest.raises(BadInput, match="draws no images"):
        EarlyStop(0.3, "folder").begin(denoiser, noise, torch.tensor(0.3))
    with pytest.raises(BadInput, match="needs a generator"):
        EarlyStop(0.3).bind({}, {})
    with pytest.raises(BadInput, match="hasten train DATA --process tdpm"):
        Prior().bind({}, {})
    with pytest.raises(BadInput, match="begins at 0.5"):
        Prior(SharedPrior(0.3)).begin(denoiser, noise, torch.tensor(0.5))
    assert pick("starts", "early_stop:time=0.2") == EarlyStop(0.2) and pick("starts", "prior") == Prior()


@pytest.mark.parametrize("schedule", [VPCosine(), TABLE, VE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_shared_prior_is_the_network_at_time_one(schedule: Schedule, prediction: str) -> None:
    """`alpha F(xi, 1) + sigma xi` at T', without the guidance around it."""
    denoiser = tiny_denoiser(classes=2, schedule=Truncated(schedule, 0.4), prediction=prediction)
    noise, label = Noise([0, 1], (1, 8, 8)), torch.tensor([0, 1])
    start = Prior().bind({}, {"prior": SharedPrior(0.4)})
    assert start.time == 0.4
    z = start.begin(CFG(scale=3.0).wrap(denoiser), noise, torch.tensor(0.4), label=label)
    xi = noise.initial()
    c_in, _, _ = denoiser.prediction.coefficients(schedule.alpha(1.0), schedule.sigma(1.0))
    raw = denoiser.net(float(c_in * schedule.prior_std(1.0)) * xi, denoiser.time_input(1.0).float().expand(2), label)
    assert torch.allclose(z, float(schedule.alpha(0.4)) * raw + float(schedule.sigma(0.4)) * xi, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16), (5,)])
def test_a_prior_of_its_own_begins_as_noise(shape: tuple[int, ...]) -> None:
    net = PriorNet(shape, 0.4, classes=2, widths=(8,))
    denoiser = tiny_denoiser()
    xi, label = torch.randn(3, *shape), torch.tensor([0, 1, 2])
    assert torch.equal(net(denoiser, xi, label=label), float(denoiser.schedule.sigma(0.4)) * xi)


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_a_truncated_model_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    import hasten

    denoiser = tiny_denoiser(classes=2, schedule=Truncated(VPCosine(), 0.4))
    net = SharedPrior(0.4) if kind == "shared" else PriorNet((1, 8, 8), 0.4, 2, (8,))
    parts = {"prior": net, "generator": VAE((1, 8, 8), 4, 2, (8,))}
    model = Model(denoiser, "cut", (1, 8, 8), ("a", "b"), steps=3, parts=parts)
    model.save(tmp_path / "m")
    again = hasten.load(tmp_path / "m")
    for start in ("prior", "early_stop"):
        x = model.sample(3, start=start)
        assert torch.equal(again.sample(3, start=start), x)
        assert (x - model.sample(1, start=start, seed=0)).abs()[0].max() < 1e-5
        assert float(again.resolve(start=start).times[0]) == 0.4


def test_the_plan_of_a_truncated_chain_is_its_sampler() -> None:
    denoiser = tiny_denoiser(schedule=Truncated(TABLE, 0.3), prediction="eps").double()
    model = Model(denoiser, "cut", (1, 8, 8), parts={"prior": SharedPrior(0.3)}, sampler="ddim", steps=4)
    resolved = model.resolve(start="prior")
    noise = Noise([0, 1], (1, 8, 8), torch.float64)
    z = resolved.start.begin(denoiser, noise, resolved.times[0])
    x = walk(DDIM(), denoiser, z, resolved.times)
    assert resolved.plan is not None and (resolved.plan(denoiser, z) - x).abs().max() < 1e-12


def test_the_latents_of_the_vae_are_those_of_its_posteriors() -> None:
    """`fit_latents`: drawn latents have mean and covariance of q(u | x) averaged over the data, class by class."""
    torch.manual_seed(0)
    vae = VAE((6,), 2, classes=2, widths=(8,))
    x, label = torch.randn(400, 6) * torch.linspace(0.5, 2, 6), torch.arange(400) % 2
    vae.fit_latents(x, label)
    for c in (0, 1):
        mean, logvar = vae.encode(x[label == c], label[label == c])
        off = mean - mean.mean(0)
        expected = off.T @ off / len(off) + torch.diag(logvar.exp().mean(0))
        assert torch.allclose(vae.factor[c] @ vae.factor[c].T, expected, atol=1e-5)
        assert torch.allclose(vae.centre[c], mean.mean(0), atol=1e-6)
    vae.fit_latents(x)  # without labels: that of all
    assert all(torch.equal(vae.factor[c], vae.factor[2]) for c in (0, 1))
