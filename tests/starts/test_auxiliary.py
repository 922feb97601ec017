"""Auxiliary: a start from the marginal at T* loses nothing, and the density is normalised and sampled exactly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import g8, m2
from hasten.nets.density import MixtureDensity
from hasten.plan.draw import draw
from hasten.samplers import UniPC
from hasten.sampling import Noise
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from hasten.starts import Auxiliary
from hasten.starts.ccdf import contraction
from hasten.storage.weights import build_network
from hasten.times import UniformLambda

SCHEDULES: list[Schedule] = [VPCosine(offset=0.0), VPLinear(), Flow(), EDM()]


def marginal(schedule: Schedule, t: float) -> MixtureDensity:
    """The exact density of G8 diffused to t."""
    data = g8(schedule)
    net = MixtureDensity((8,), rank=8, time=t)
    a, s = schedule.alpha(t), schedule.sigma(t)
    net.centre[0] = a * data.mean
    net.factor[0, 0] = torch.diag((a**2 * data.variance + s**2).sqrt())
    return net


def covariance(net: MixtureDensity, label: Tensor | None = None) -> Tensor:
    """Of a density of one component, whose `sample` is affine: from its values at 0 and the unit vectors."""
    D = net.basis.shape[0]  # type: ignore[index,union-attr]
    noise = torch.cat([torch.zeros(1, D), torch.eye(D)]).double()
    z = net.sample(noise, label)
    return (z[1:] - z[0]).T @ (z[1:] - z[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_from_the_exact_marginal(schedule: Schedule) -> None:
    """CHECK 14: the truncated start and steps of the analytic variance reproduce v to 1e-12; so does the ODE."""
    data, t = g8(schedule), 0.55
    times = UniformLambda(start=t, low=0.02)(schedule, 9)
    a, s = schedule.alpha(times)[:, None], schedule.sigma(times)[:, None]
    variance = covariance(marginal(schedule, t)).diagonal()
    assert (variance - (a[0] ** 2 * data.variance + s[0] ** 2)).abs().max() < 1e-12 * float(variance.max())
    for k, factor in enumerate(contraction(schedule, times, data.variance)):
        fresh = 1 - (a[k] / a[k + 1] * s[k + 1] / s[k]) ** 2  # s_{r|s}^2 / s_r^2
        posterior = data.variance * s[k] ** 2 / (a[k] ** 2 * data.variance + s[k] ** 2)
        optimal = fresh * s[k + 1] ** 2 + (a[k + 1] * fresh) ** 2 * posterior
        variance = factor**2 * variance + optimal
    assert (variance - data.variance).abs().max() < 1e-12
    noise = torch.cat([torch.zeros(1, 8), torch.eye(8)]).double()
    end = data.endpoint(marginal(schedule, t).sample(noise), t)
    assert (end[0] - data.mean).abs().max() < 1e-12
    assert ((end[1:] - end[0]).square().sum(0) - data.variance).abs().max() < 1e-12


def random_density(D: int = 3, rank: int = 2, components: int = 3, classes: int = 2) -> MixtureDensity:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    net = MixtureDensity((D,), classes, rank, components, time=0.5)
    net.basis.copy_(torch.linalg.qr(randn(D, rank))[0])
    net.centre.copy_(randn(classes + 1, D))
    net.weight.copy_(torch.softmax(randn(classes + 1, components), 1))
    net.mean.copy_(2 * randn(classes + 1, components, rank))
    net.factor.copy_(torch.tril(0.3 * randn(classes + 1, components, rank, rank)) + 0.6 * torch.eye(rank))
    net.rest.copy_(torch.tensor([0.5, 0.7, 0.9]))
    return net


def test_log_prob_is_that_of_the_whole_gaussians() -> None:
    """Each component written out as a Gaussian in D dimensions."""
    net = random_density()
    z, label = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    U = net.basis
    for row, (point, c) in enumerate(zip(z, label)):
        parts = []
        for k in range(3):
            L = net.factor[c, k]
            cov = U @ L @ L.T @ U.T + net.rest[c] ** 2 * (torch.eye(3) - U @ U.T)
            whole = torch.distributions.MultivariateNormal(net.centre[c] + U @ net.mean[c, k], cov)
            parts.append(net.weight[c, k].log() + whole.log_prob(point))
        assert abs(float(net.log_prob(z, label)[row] - torch.logsumexp(torch.stack(parts), 0))) < 1e-10
    assert torch.equal(net.log_prob(z), net.log_prob(z, torch.full((7,), 2)))


def test_samples_have_the_law() -> None:
    """Shares, mean and covariance of each component, and independence of what is left of the shared coordinate."""
    net, n = random_density(), 60_000
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = net.sample(noise, torch.zeros(n, dtype=torch.long))
    mean = sum(w * (net.centre[0] + net.basis @ m) for w, m in zip(net.weight[0], net.mean[0]))
    second = torch.zeros(3, 3, dtype=torch.float64)
    for k in range(3):
        L, m = net.factor[0, k], net.centre[0] + net.basis @ net.mean[0, k] - mean
        cov = net.basis @ L @ L.T @ net.basis.T + net.rest[0] ** 2 * (torch.eye(3) - net.basis @ net.basis.T)
        second += net.weight[0, k] * (cov + torch.outer(m, m))
    assert (z.mean(0) - mean).abs().max() < 0.03
    assert (torch.cov(z.T) - second).abs().max() < 0.03 * float(second.abs().max())
    # E log p of its own samples is minus the entropy: the same by a second, independent set of samples
    other = net.sample(torch.randn(n, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.long))
    one, two = (net.log_prob(v, torch.zeros(n, dtype=torch.long)).mean() for v in (z, other))
    assert abs(float(one - two)) < 0.03
    u, g = noise @ net.basis[:, 0], net.weight[0].cumsum(0)
    picked = (torch.special.ndtr(u)[:, None] >= g[:-1]).sum(1)
    shares = torch.bincount(picked, minlength=3) / n
    assert (shares - net.weight[0]).abs().max() < 0.01


def test_an_image_depends_on_its_seed_alone() -> None:
    net = random_density(D=3)
    start = Auxiliary().bind({}, {"auxiliary": net})
    model, t = m2(VPCosine(offset=0.0)), torch.tensor(0.5, dtype=torch.float64)
    label = torch.arange(8) % 3
    whole = start.begin(model, Noise(range(8), (3,)), t, label=label)
    part = start.begin(model, Noise([6, 2], (3,)), t, label=label[[6, 2]])
    assert torch.equal(whole[[6, 2]], part) and whole.dtype == torch.float32
    copy = build_network("MixtureDensity", net.config)  # type: ignore[arg-type]
    copy.load_state_dict(net.state_dict())
    assert torch.equal(Auxiliary(copy).begin(model, Noise(range(8), (3,)), t, label=label), whole)
    assert Auxiliary().time is None and start.time == 0.5


def test_it_survives_half_precision(tmp_path: Path) -> None:
    """A model that is kept in fp16 keeps its parts so: the samples move by about that much, none jumps."""
    from hasten.storage.weights import load_weights, sha256, write_weights

    net = random_density(D=6, rank=4, components=5)
    write_weights(net, tmp_path / "net.safetensors", half=True)
    copy = build_network("MixtureDensity", net.config)  # type: ignore[arg-type]
    load_weights(copy, tmp_path / "net.safetensors", sha256(tmp_path / "net.safetensors"))
    noise, label = torch.randn(20_000, 6, dtype=torch.float64), torch.arange(20_000) % 3
    moved = (copy.sample(noise, label) - net.sample(noise, label)).abs().amax(1)  # type: ignore[operator]
    assert float((moved > 0.05).double().mean()) < 2e-3  # at the borders between components
    assert float(copy.sample(noise, label).abs().max()) < 1.1 * float(net.sample(noise, label).abs().max())  # type: ignore[operator]


def test_it_begins_where_the_density_is() -> None:
    """And goes on with any sampler: from G8's marginal at T* to the data's mean and variance."""
    schedule = VPCosine(offset=0.0)
    start, data = Auxiliary(marginal(schedule, 0.6)), g8(schedule)
    times = UniformLambda(start=start.time, low=0.02)(schedule, 12)
    noise = Noise(range(2000), (8,), torch.float64)
    x = draw(data, UniPC(3), times, noise, x=start.begin(data, noise, times[0]))
    e = noise.initial()
    wanted = data.mean + data.variance.sqrt() * e
    assert (x - wanted).abs().max() < 0.03 * math.sqrt(float(data.variance.max()))
    with pytest.raises(BadInput, match="is of t = 0.6, found a grid that begins at 1"):
        start.begin(data, noise, torch.tensor(1.0))
    with pytest.raises(BadInput, match="hasten tune MODEL --method auxiliary --data"):
        Auxiliary().bind({}, {})
    with pytest.raises(ValueError, match="1 <= rank <= 8"):
        MixtureDensity((8,), rank=9)
