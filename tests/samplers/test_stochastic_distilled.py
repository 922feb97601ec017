"""The stochastic sampler of students: exact jumps keep every marginal, the calls are those of the grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.exact import GaussianMixture
from hasten.pick import pick
from hasten.plan import plan
from hasten.samplers import DDIM, stochastic_distilled
from hasten.samplers.stochastic_distilled import StochasticDistilled
from hasten.sampling import Noise, walk
from hasten.schedules import Flow, Schedule, VPCosine, VPLinear
from hasten.times import Trailing, UniformLambda
from tests.samplers.problems import F64, drive

POINTS = 4096  # scrambled Sobol points in all the noises of a run: their moments err by less than .01


def mixture(schedule: Schedule) -> GaussianMixture:
    means = torch.tensor([[1.0, 0.3], [-0.8, 0.9], [-0.2, -1.1]])
    stds = torch.tensor([0.25, 0.35, 0.2])
    return GaussianMixture(torch.tensor([0.5, 0.3, 0.2]), means, stds[:, None].square().expand(3, 2), schedule)


def flow(model: GaussianMixture, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the probability-flow equation takes z from t to s, of a cosine schedule: RK4 on dz/df = v(z, f) in the angle
    f = pi t / 2."""
    count = 2 + math.ceil(16 * abs(float(t - s)))
    start, d = t, (s - t) / count

    def v(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
        x0 = model(z, t)
        return (z - alpha * x0) / sigma * alpha - sigma * x0 if float(sigma) > 1e-9 else 0 * z

    for k in range(count):
        t, h = start + k * d, d * math.pi / 2
        a = v(z, t)
        b = v(z + h / 2 * a, t + d / 2)
        c = v(z + h / 2 * b, t + d / 2)
        z = z + h / 6 * (a + 2 * b + 2 * c + v(z + h * c, t + d))
    return z


def moments_off(steps: int) -> float:
    """The largest error of mean and covariance at any query and at the end, with exact jumps on N equal steps."""
    schedule = VPCosine(offset=0.0)
    model, times = mixture(schedule), Trailing()(schedule, steps)
    centre = (model.weights[:, None] * model.means).sum(0)
    spread = torch.einsum("k,ki,kj->ij", model.weights, model.means - centre, model.means - centre)
    spread = spread + torch.diag((model.weights[:, None] * model.variances).sum(0))
    sobol = torch.quasirandom.SobolEngine(2 * steps, scramble=True, seed=1).draw(POINTS, dtype=F64)
    draws = iter((math.sqrt(2) * torch.erfinv(2 * sobol.clamp(1e-9, 1 - 1e-9) - 1)).split(2, 1))
    asked, errors = [], []

    def check(z: Tensor, t: Tensor) -> None:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        wanted = alpha**2 * spread + sigma**2 * torch.eye(2, dtype=F64)
        errors.append(max((z.mean(0) - alpha * centre).abs().max().item(), (z.T.cov() - wanted).abs().max().item()))

    def answer(z: Tensor, t: Tensor) -> Tensor:
        """The x0 with which one DDIM step over the jump lands where the flow does."""
        check(z, t)
        k = len(asked)
        asked.append(t)
        s = times[min(k + 2, steps)]
        ratio = schedule.sigma(s) / schedule.sigma(t)
        return (flow(model, z, t, s) - ratio * z) / (schedule.alpha(s) - ratio * schedule.alpha(t))

    z, _ = drive(StochasticDistilled(), schedule, answer, next(draws), times, lambda: next(draws))
    check(z, times[-1])
    assert len(errors) == steps + 1 and next(draws, None) is None
    return max(errors)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_exact_jumps_keep_the_marginals(steps: int) -> None:
    assert moments_off(steps) < 0.02


@pytest.mark.parametrize("steps", [4, 8])
def test_the_forgotten_ratio_does_not(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of variance sigma_q^2 - sigma_k^2, a known mistake, is seen by the test above."""

    def wrong(low: stochastic_distilled.Node, high: stochastic_distilled.Node) -> Tensor:
        return torch.sqrt(high.sigma**2 - low.sigma**2)

    monkeypatch.setattr(stochastic_distilled, "renoise_std", wrong)
    assert moments_off(steps) > 0.1


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_it_asks_once_at_every_node(steps: int) -> None:
    schedule = VPCosine(offset=0.0)
    asked: list[float] = []

    def answer(z: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return 0.5 * z

    x = torch.ones(1, 2, dtype=F64)
    walk(StochasticDistilled(), answer, x, Trailing()(schedule, steps), lambda: 0 * x, schedule=schedule)
    assert asked == pytest.approx([i / steps for i in range(steps, 0, -1)], abs=1e-15)


@pytest.mark.parametrize("schedule", [VPCosine(offset=0.0), VPLinear(), Flow()], ids=lambda s: type(s).__name__)
def test_one_step_is_ddim(schedule: Schedule) -> None:
    for end in (0.0, 0.3):
        times = Trailing(end=end)(schedule, 1)
        x = Noise(range(5), (2,), dtype=F64).initial()
        mine, theirs = (walk(sampler, mixture(schedule), x, times) for sampler in (StochasticDistilled(), DDIM()))
        assert torch.equal(mine, theirs)


def test_two_steps_are_those_of_consistency_models() -> None:
    """x0, fresh noise at the second time, x0."""
    schedule = VPCosine(offset=0.0)
    model, times = mixture(schedule), torch.tensor([1.0, 0.4, 0.0], dtype=F64)
    x, fresh = torch.randn(2, 6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = walk(StochasticDistilled(), model, x, times, lambda: fresh)
    t = times[1]
    torch.testing.assert_close(found, model(schedule.alpha(t) * model(x, times[0]) + schedule.sigma(t) * fresh, t))


def test_it_works_on_the_nodes_it_is_given() -> None:
    """On equal steps in lam the jump from node k ends at node k + 2: with a constant answer the plan says it in numbers."""
    schedule = VPLinear()
    times = UniformLambda(end=0.05)(schedule, 5)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    found = plan(pick("samplers", "stochastic_distilled"), schedule, times)
    for k in range(4):
        back = alpha[k + 1] / alpha[k + 2]
        torch.testing.assert_close(found.a[k], back * sigma[k + 2] / sigma[k], rtol=1e-10, atol=0)
        torch.testing.assert_close(
            found.C[k, k] ** 2, sigma[k + 1] ** 2 - (back * sigma[k + 2]) ** 2, rtol=1e-10, atol=0
        )
        assert found.B[k].count_nonzero() == 1 and not found.A[k].any()
    torch.testing.assert_close(found.a[4], sigma[5] / sigma[4], rtol=1e-10, atol=0)
    assert not found.C[4].any()
