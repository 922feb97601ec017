"""The bound of a chain: the sheet's numbers, the entropy of a Gaussian, and the divergences by their definition."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.samplers.analytic import AnalyticDPM
from hasten.schedules import EDM, VE, Discrete, Flow, Schedule, SubVP, VPCosine, VPLinear
from hasten.times import UniformLambda, UniformTime
from hasten.tuning._bound import BITS, Bound, decoder_cost, edge_costs, step_costs, variational_bound
from hasten.tuning._task import TuningTask

F64 = torch.float64
SCHEDULES = [VPLinear(), VPCosine(), VPCosine(offset=0.0), SubVP(), VE(), EDM(), Flow(), Discrete.linear()]


def posterior_variance(schedule: Schedule, times: Tensor, v: float) -> Tensor:
    """E||x - E[x|z]||^2 per dimension for data of variance v."""
    a, s = schedule.alpha(times), schedule.sigma(times)
    return v * s**2 / (a**2 * v + s**2)


def shortest(costs: Tensor, K: int) -> tuple[float, tuple[int, ...]]:
    T = len(costs) - 1
    paths = [(0, *inner, T) for inner in combinations(range(1, T), K - 1)]
    return min((sum(costs[s, r].item() for s, r in zip(p, p[1:])), p) for p in paths)


@pytest.mark.parametrize(
    ("K", "value", "path"),
    [
        (2, 7.712060, (0, 2, 16)),
        (3, 6.124050, (0, 2, 3, 16)),
        (4, 5.820066, (0, 2, 3, 5, 16)),
        (6, 5.701729, (0, 2, 3, 4, 5, 7, 16)),
    ],
)
def test_the_published_check_of_sixteen_steps(K: int, value: float, path: tuple[int, ...]) -> None:
    schedule = Discrete.from_betas(torch.linspace(1e-3, 0.5, 16, dtype=F64))
    times = torch.arange(17, dtype=F64) / 16
    costs = edge_costs(schedule, times, posterior_variance(schedule, times, 0.25), decoder=0.05, width=0.0)
    result, best = shortest(costs, K)
    assert result == pytest.approx(value, abs=5e-7) and best == path


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("variance", ["small", "large", "analytic"])
def test_costs_are_the_divergences_they_stand_for(schedule: Schedule, variance: str) -> None:
    """Each entry against E KL(q(z_s|z_r, x) | N(mu, V)), written out with the weights of section 2 of the sheet."""
    times = torch.cat([torch.zeros(1, dtype=F64), torch.linspace(0.05, schedule.t_max, 7, dtype=F64)])
    mse = posterior_variance(schedule, times, 0.3) + 0.01
    costs = edge_costs(schedule, times, mse, variance)
    a, s = schedule.alpha(times), schedule.sigma(times)
    for r in range(2, 8):
        for q in range(1, r):
            skip = s[r] ** 2 - (a[r] / a[q]) ** 2 * s[q] ** 2
            bt, gain = skip * s[q] ** 2 / s[r] ** 2, a[q] * skip / s[r] ** 2
            V = {"small": bt, "large": skip, "analytic": bt + gain**2 * mse[r]}[variance]
            expected = 0.5 * (bt / V + torch.log(V / bt) - 1 + gain**2 * mse[r] / V)
            assert costs[q, r].item() == pytest.approx(expected.item(), rel=1e-9)
    assert bool(torch.isinf(torch.tril(costs) + torch.triu(torch.full_like(costs, math.inf), 1)).all())
    assert bool(torch.isinf(costs[torch.tril(torch.ones(8, 8)).bool()]).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_of_an_exact_gaussian_it_is_the_entropy(schedule: Schedule, steps: int) -> None:
    """With the optimal variance the bound is the entropy at any number of steps, but for the prior N(0, a^2 + s^2) that
    the chain starts from where the truth is N(0, a^2 v + s^2)."""
    v = 0.25
    times = UniformTime(low=0.02)(schedule, steps)
    mse = posterior_variance(schedule, times[:-1], v)
    result = variational_bound(schedule, times, mse, "analytic", power=v, width=0.0)
    a2, s2 = float(schedule.alpha(times[0])) ** 2, float(schedule.sigma(times[0])) ** 2
    wrong_prior = 0.5 * ((a2 * v + s2) / (a2 + s2) - 1 - math.log((a2 * v + s2) / (a2 + s2)))
    entropy = 0.5 * math.log(2 * math.pi * math.e * v)
    assert result.total == pytest.approx((entropy + wrong_prior) * BITS, abs=1e-9)
    for other in ("small", "large"):
        more = variational_bound(schedule, times, mse, other, power=v, width=0.0).total
        assert more > result.total + 1e-4 if steps > 1 else more == pytest.approx(result.total)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_it_bounds_the_likelihood_of_the_chain_that_samples(variance: str) -> None:
    """In one dimension the chain's own marginal is a Gaussian found by hand: the bound lies above its cross entropy."""
    schedule, v = VPLinear(), 0.25
    times = UniformLambda()(schedule, 6)
    a, s = schedule.alpha(times), schedule.sigma(times)
    mse = posterior_variance(schedule, times[:-1], v)
    exact = Gaussian(torch.zeros(1), torch.full((1,), v), schedule)
    one = torch.ones(1, 1, dtype=F64)
    spread = a[0] ** 2 + s[0] ** 2
    for k in range(5):
        skip = s[k] ** 2 - (a[k] / a[k + 1]) ** 2 * s[k + 1] ** 2
        keep = (a[k] / a[k + 1]) * s[k + 1] ** 2 / s[k] ** 2 + a[k + 1] * skip / s[k] ** 2 * exact(one, times[k]).item()
        spread = keep**2 * spread + skip * (s[k + 1] ** 2 / s[k] ** 2 if variance == "small" else 1)
    marginal = exact(one, times[5]).item() ** 2 * spread + mse[-1]
    cross = 0.5 * (torch.log(2 * math.pi * marginal) + v / marginal).item() * BITS
    bound = variational_bound(schedule, times, mse, variance, power=v, width=0.0).total
    assert cross < bound < cross + {"small": 60, "large": 1.5}[variance]


def test_the_decoder_bounds_the_integrated_gaussian_and_the_best_is_best() -> None:
    width, generator = 2 / 255, torch.Generator().manual_seed(0)
    # data on a grid, mean off it by a normal error of the model's own deviation
    for deviation in (0.002, 0.01, 0.1):
        error = deviation * torch.randn(200_000, generator=generator, dtype=F64)
        mse = error.square().mean()
        cost = decoder_cost(mse, None, width)
        D = (mse + width**2 / 12).sqrt()
        normal = torch.distributions.Normal(0.0, 1.0)
        inside = normal.cdf((error + width / 2) / D) - normal.cdf((error - width / 2) / D)
        exact = -torch.log(inside).mean()
        assert exact <= cost + 1e-3 and cost - exact < 0.15
        others = [decoder_cost(mse, float(D) * k, width) for k in (0.8, 0.97, 1.03, 1.3)]
        assert all(cost < other for other in others)


def test_given_variances_and_those_of_each_coordinate() -> None:
    schedule = VPCosine()
    times = UniformTime(low=0.02)(schedule, 5)
    mse = posterior_variance(schedule, times[:-1], 0.3)
    a, s = schedule.alpha(times), schedule.sigma(times)
    f = -torch.expm1(2 * (schedule.lam(times[:-2]) - schedule.lam(times[1:-1])))
    V = s[1:-1] ** 2 * f + (a[1:-1] * f) ** 2 * mse[:-1]
    one = variational_bound(schedule, times, mse, "analytic")
    same = variational_bound(schedule, times, mse, V)
    assert same.total == pytest.approx(one.total, abs=1e-12)
    wrong = [variational_bound(schedule, times, mse, V * k).total for k in (0.9, 1.1)]
    assert min(wrong) > one.total
    wide = torch.stack([mse * 0.5, mse * 1.5], 1)  # two coordinates: their own variances are worth something
    each = s[1:-1, None] ** 2 * f[:, None] + (a[1:-1, None] * f[:, None]) ** 2 * wide[:-1]
    assert bool((step_costs(schedule, times, wide, each) < step_costs(schedule, times, wide, V)).all())


def test_refusals_name_what_is_wrong() -> None:
    schedule, times = VPLinear(), torch.linspace(0, 1, 5, dtype=F64)
    with pytest.raises(BadInput, match="analytic"):
        edge_costs(schedule, times, torch.ones(5), "analytical")
    with pytest.raises(BadInput, match="ascending"):
        edge_costs(schedule, times.flip(0), torch.ones(5))
    with pytest.raises(BadInput, match="> 0"):
        edge_costs(schedule, times, torch.zeros(5))
    with pytest.raises(BadInput, match="t = 0"):
        variational_bound(schedule, times[1:].flip(0), torch.ones(3))
    with pytest.raises(BadInput, match="3 noisy steps"):
        variational_bound(schedule, times.flip(0), torch.ones(4), torch.ones(4))


def test_it_is_measured_on_images_at_the_times_of_the_grid() -> None:
    """Of a Gaussian with equal variances the analytic bound is the entropy, whatever the sampler's grid."""
    schedule, v = VPCosine(offset=0.0), 0.04
    model = Gaussian(torch.zeros(1, 4, 4, dtype=F64), torch.full((1, 4, 4), v, dtype=F64), schedule)
    task = TuningTask(
        denoiser=model,
        sampler=AnalyticDPM(moments="mse", mse=lambda t: posterior_variance(schedule, t, v), pixels=0),
        times=UniformTime(low=0.02)(schedule, 5),
        shape=(1, 4, 4),
        images=lambda n: (model.sample(n, torch.Generator().manual_seed(0)), None),
    )
    figures = Bound(images=4000, width=0.0).tune(task).figures
    entropy = 0.5 * math.log(2 * math.pi * math.e * v) * BITS
    assert figures["analytic"] == pytest.approx(entropy, abs=0.02)
    assert figures["sampler"] == pytest.approx(figures["analytic"], abs=1e-3)
    assert figures["analytic"] < figures["large"] < figures["small"]
    with pytest.raises(BadInput, match="--data"):
        Bound().tune(replace(task, images=None))
