"""SN-DPM: exact on Gaussians coordinate by coordinate, better than any scalar variance on a mixture, and its network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput, HastenError
from hasten.exact import Gaussian, GaussianMixture, g8, m2, m64
from hasten.nets.second_moment import SecondMoment as Net
from hasten.pick import format_spec
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers._exponential import make_nodes
from hasten.samplers.analytic import AnalyticDPM, weights
from hasten.samplers.sn import SNDPM, WithMoments
from hasten.sampling import Noise, walk
from hasten.schedules import Flow, Schedule, VPCosine, VPLinear
from hasten.times import UniformTime
from tests.samplers.problems import F64


class GaussianMoments(Gaussian):
    """E[eps^2 | z] = eps^2 + (alpha / sigma)^2 Var(x | z), in closed form."""

    def moments(self, x_t: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = self(x_t, t)
        left = self.variance * s**2 / (a**2 * self.variance + s**2)
        return x0, ((x_t - a * x0) / s) ** 2 + (a / s) ** 2 * left


class MixtureMoments(GaussianMixture):
    """The same for a mixture: E[x^2 | z] by components, then E[(z - alpha x)^2 | z] / sigma^2."""

    def moments(self, x_t: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        x = x_t.double()[:, None]
        spread = a**2 * self.variances + s**2
        off = x - a * self.means
        p = torch.softmax(torch.log(self.weights) - 0.5 * (off**2 / spread + torch.log(spread)).sum(-1), 1)[..., None]
        inside, left = self.means + a * self.variances / spread * off, self.variances * s**2 / spread
        x0, square = (p * inside).sum(1), (p * (inside**2 + left)).sum(1)
        return x0, ((x_t - a * x0) ** 2 + a**2 * (square - x0**2)) / s**2


def with_moments(model: GaussianMixture) -> MixtureMoments:
    return MixtureMoments(model.weights, model.means, model.variances, model.schedule)


def test_the_mixtures_second_moment_is_that_of_the_noise() -> None:
    """By brute force: over pairs (x, e) with x_t in a small box, the mean of e^2."""
    schedule = VPLinear()
    model, t = with_moments(m2(schedule)), torch.tensor(0.35, dtype=F64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    x = model.sample(2_000_000, torch.Generator().manual_seed(0))
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    z = a * x + s * e
    for centre in ([0.3, 0.2], [-0.5, 0.1]):
        point = torch.tensor([centre], dtype=F64)
        near = (z - point).abs().max(1).values < 0.03
        assert near.sum() > 1000
        _, m2_ = model.moments(z[near], t)
        error = e[near].square() - m2_
        assert (error.mean(0).abs() < 4 * error.std(0) / math.sqrt(len(error))).all()


@pytest.mark.parametrize("form", ["ddpm", "ddim"])
@pytest.mark.parametrize("K", [2, 6])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(offset=0.0), Flow()], ids=lambda s: type(s).__name__)
def test_each_coordinate_of_a_gaussian_is_exact(form: str, K: int, schedule: Schedule) -> None:
    """Eight coordinates of eight variances: the gain and variance of every step, composed, give the exact variance of
    each at every node. A single variance for all cannot."""
    base = g8(schedule)
    model = GaussianMoments(torch.zeros(8, dtype=F64), base.variance, schedule)
    times = torch.linspace(schedule.t_max, 0, K + 1, dtype=F64)
    path = make_nodes(schedule, times)
    v = path[0].alpha ** 2 * model.variance + path[0].sigma ** 2
    draws: list[Tensor] = []

    def unit() -> Tensor:
        draws.append(torch.ones(1, 8, dtype=F64))
        return draws[-1]

    sampler = SNDPM(form, pixels=0)
    for r, s in zip(path[:-2], path[1:-1]):
        if r.pure:  # it asks at q = 1000 there
            continue
        two = torch.stack([r.t, s.t])
        from_zero = walk(sampler, model, torch.zeros(1, 8, dtype=F64), two, unit)  # the deviation alone
        from_one = walk(sampler, model, torch.ones(1, 8, dtype=F64), two, unit) - from_zero
        v = from_one[0] ** 2 * (r.alpha**2 * model.variance + r.sigma**2) + from_zero[0] ** 2
        torch.testing.assert_close(v, s.alpha**2 * model.variance + s.sigma**2, rtol=0, atol=1e-10)


def test_from_pure_noise_to_the_data_of_a_gaussian() -> None:
    """Two steps from alpha = 0 give every variance of G8; 20,000 samples, within their sampling error."""
    schedule = VPCosine(offset=0.0)
    model = GaussianMoments(torch.zeros(8, dtype=F64), g8(schedule).variance, schedule)
    times = torch.tensor([1.0, 0.4, 0.02, 0.0], dtype=F64)
    a, s = schedule.alpha(times[2]), schedule.sigma(times[2])
    left = model.variance * s**2 / (a**2 * model.variance + s**2)  # of x, at the last noisy level
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 8, generator=g, dtype=F64)
    found = walk(SNDPM(), model, x, times, lambda: torch.randn(x.shape, generator=g, dtype=F64)).var(0)
    torch.testing.assert_close((found + left) / model.variance, torch.ones(8, dtype=F64), rtol=0, atol=0.05)


def divergences(model: MixtureMoments, times: Tensor, n: int = 2000) -> tuple[float, float, float]:
    """Mean divergence per dimension of the steps of a chain, nats: with the variance of each coordinate, with the best
    single one, and with the small one, on the same data and noise."""
    schedule = model.schedule
    path = make_nodes(schedule, times)
    g = torch.Generator().manual_seed(0)
    x = model.sample(n, g)
    own = scalar = small = 0.0
    for r, s in zip(path[:-2], path[1:-1]):
        z = r.alpha * x + r.sigma * torch.randn(x.shape, generator=g, dtype=F64)
        x0, m2_ = model.moments(z, r.t)
        _, gain, L = weights(r, s, "ddpm")
        miss = (gain * (x - x0)) ** 2
        C = SNDPM().variance(r, z, x0, m2_)
        gamma = ((z - r.alpha * x0) / r.sigma).square().mean()
        one = AnalyticDPM(gamma=lambda t, gamma=gamma: gamma).variance(schedule, r)

        def cost(V: Tensor, L: Tensor = L, miss: Tensor = miss) -> float:
            return float((0.5 * (L / V - torch.log(L / V) - 1 + miss / V)).mean())

        own += cost(L + gain**2 * C)
        scalar += cost(L + gain**2 * one)
        small += cost(L)
    return own, scalar, small


@pytest.mark.parametrize("make", [m2, m64])
@pytest.mark.parametrize("K", [5, 10, 25])
def test_a_variance_for_each_coordinate_beats_a_single_one(make: Any, K: int) -> None:
    model = with_moments(make(VPCosine(offset=0.0)))
    own, scalar, small = divergences(model, UniformTime(start=0.99, low=0.02)(model.schedule, K))
    ratio = {m2: {5: 0.98, 10: 0.975, 25: 0.99}, m64: {5: 0.88, 10: 0.93, 25: 0.975}}[make][K]
    assert own < ratio * scalar and scalar < 0.51 * small, (own, scalar, small)


def test_its_samples_have_the_mixtures_moments_in_few_steps() -> None:
    """Ten steps on M64, 1,000 samples: the variances of the coordinates are nearer the data's than with one variance, and
    those nearer than DDPM's."""
    from hasten.samplers import DDPM

    schedule = VPCosine(offset=0.0)
    model = with_moments(m64(schedule))
    times = UniformTime(low=0.02)(schedule, 10)
    noise = Noise(range(1000), (64,), dtype=F64)
    data = model.sample(200_000, torch.Generator().manual_seed(5)).var(0)
    gammas = {}
    x = model.sample(4000, torch.Generator().manual_seed(6))
    for t in times[:-1]:
        a, s = schedule.alpha(t), schedule.sigma(t)
        e = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=F64)
        gammas[float(t)] = (x - model(a * x + s * e, t)).square().mean()
    analytic = AnalyticDPM(moments="mse", mse=lambda t: gammas[float(t)])
    errors = []
    for sampler in (SNDPM(), analytic, DDPM()):  # measured: .084, .162, .453; DDPM("large") .820
        made = draw(model, sampler, times, noise)
        errors.append((torch.log(made.var(0) / data)).square().mean().sqrt().item())
    assert errors[0] < 0.6 * errors[1] and errors[1] < 0.5 * errors[2], errors


def test_it_cannot_be_compiled_and_says_what_it_needs() -> None:
    with pytest.raises(HastenError, match="depends on the sample"):
        plan(SNDPM(), VPLinear(), torch.tensor([1.0, 0.5, 0.0], dtype=F64))
    with pytest.raises(BadInput, match="--method second_moment --data IMAGES"):
        SNDPM().bind({}, {})
    with pytest.raises(BadInput, match="second moments"):
        SNDPM().wrap(g8(VPLinear()))
    with pytest.raises(HastenError, match="second moments"):
        draw(g8(VPLinear()), SNDPM(), UniformTime(), Noise([0], (8,)), steps=3)
    with pytest.raises(BadInput, match="ddim"):
        SNDPM("ddmi")
    net = Net(width=8, blocks=1)
    bound = SNDPM("ddim").bind({}, {"second_moment": net})
    assert (
        bound.net is net and bound.bind({}, {}) is bound and format_spec(bound) == "sn:form=ddim" and bound.nfe(7) == 7
    )


def images(schedule: Schedule) -> Gaussian:
    """Gaussian images whose left half is ten times as variable as the right."""
    variance = torch.full((1, 8, 8), 0.25, dtype=F64)
    variance[..., 4:] = 0.0025
    return Gaussian(torch.zeros(1, 8, 8, dtype=F64), variance, schedule)


def test_the_wrapped_network_answers_with_moments() -> None:
    torch.manual_seed(0)
    schedule = VPCosine(offset=0.0)
    model, net = images(schedule), Net(width=8, blocks=1, patch=2)
    wrapped = SNDPM(net=net).wrap(model)
    assert isinstance(wrapped, WithMoments) and wrapped.schedule is schedule
    x, t = torch.randn(3, 1, 8, 8), torch.tensor(0.4, dtype=F64)
    with torch.no_grad():
        x0, second = wrapped.moments(x, t)
        each = wrapped.moments(x, t.expand(3))[1]
    torch.testing.assert_close(each, second)
    torch.testing.assert_close(x0, model(x, t))
    # before training it is sigmoid(log scale^2 + 2 log alpha)
    eps = (x.double() - schedule.alpha(t) * x0.double()) / schedule.sigma(t)
    a2 = schedule.alpha(t) ** 2
    torch.testing.assert_close(second - eps**2, (a2 * 0.25 / (a2 * 0.25 + 1)).expand(3, 1, 8, 8), rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        made = draw(wrapped, SNDPM(net=net), UniformTime(), Noise(range(3), (1, 8, 8)), steps=4)
    assert made.shape == (3, 1, 8, 8) and bool(torch.isfinite(made).all()) and made.dtype == torch.float32


def test_the_network_learns_the_variance_of_each_pixel() -> None:
    """Trained on images whose halves differ by a factor of 100 in variance, it tells them apart at every noise level,
    and its loss on held-out images is far below that of the best single variance, near what is possible."""
    from hasten.tuning._task import TuningTask
    from hasten.tuning.second_moment import SecondMomentTuner, added_noise, nats

    schedule = VPCosine(offset=0.0)
    model = images(schedule)
    task = TuningTask(
        denoiser=model, sampler=None, times=torch.tensor([1.0, 0.0]), shape=(1, 8, 8),
        images=lambda n: (model.sample(n, torch.Generator().manual_seed(0)).float(), None),
    )  # fmt: skip
    tuned = SecondMomentTuner(steps=250, batch=32, images=2048, width=16, blocks=1).tune(task)
    net, figures = tuned.parts["second_moment"], tuned.figures
    assert figures["steps"] == 250 and net.config["width"] == 16
    left = []
    for q, rho in ((0.1, 0.0), (0.5, 0.0), (3.0, 0.4)):  # from far out it matters only as part of a step's variance
        lam = torch.full((64,), -math.log(q))
        a, s = torch.sigmoid(2 * lam[0]).sqrt(), torch.sigmoid(-2 * lam[0]).sqrt()
        x = model.sample(64, torch.Generator().manual_seed(3)).float()
        z = a * x + s * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        C = q**2 * net(z, model(z, schedule.time(lam[0].double())), lam)
        exact = model.variance * q**2 / (model.variance + q**2)
        k = float(added_noise(torch.tensor(q**2), rho))
        left.append((torch.log((C.double() + k) / (exact + k))).square().mean().sqrt().item())
    assert max(left[:2]) < 0.5 and left[2] < 0.05, left
    assert figures["nats"] < figures["nats_scalar"] - 0.05, figures
    assert nats(torch.tensor(0.04), torch.tensor(0.04)) < nats(torch.tensor(0.04), torch.tensor(0.08))
    with pytest.raises(BadInput, match="--data"):
        SecondMomentTuner().tune(
            TuningTask(denoiser=model, sampler=None, times=torch.tensor([1.0, 0.0]), shape=(1, 8, 8))
        )
    with pytest.raises(BadInput, match="sides"):
        SecondMomentTuner(patch=3).tune(task)
