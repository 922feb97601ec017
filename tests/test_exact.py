"""Closed-form denoisers: against brute-force integration, at both ends, with classes, and the reference ODE."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import Gaussian, GaussianMixture, PointSet, g8, m2, m64
from hasten.plan import plan
from hasten.samplers import DDIM, UniPC
from hasten.sampling import walk
from hasten.schedules import EDM, Discrete, Flow, Schedule, SubVP, VPCosine, VPLinear, rescale_zero_snr
from hasten.times import UniformLambda

from .test_schedules import each

LABELS = [0, 0, 1, 1, 2, 2]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each
@pytest.mark.parametrize("t", [0.02, 0.5, 0.95])
def test_posterior_mean_by_brute_force(schedule: Schedule, t: float) -> None:
    """E[x | x_t] in one dimension, by summing over a fine grid of x."""
    weights, means, variances = (
        torch.tensor([0.2, 0.5, 0.3]),
        torch.tensor([-1.0, 0.1, 0.9]),
        torch.tensor([0.04, 0.3, 0.01]),
    )
    mixture = GaussianMixture(weights, means[:, None], variances[:, None], schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = (alpha * randn(20, 1) + sigma * randn(20, 1, seed=1)).double()
    x = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    w, m, v = (p.double() for p in (weights, means, variances))
    log_prior = torch.logsumexp(torch.log(w) - 0.5 * (x[:, None] - m) ** 2 / v - 0.5 * torch.log(v), 1)
    posterior = torch.softmax(log_prior - 0.5 * ((x_t - alpha * x) / sigma) ** 2, 1)
    assert (mixture(x_t, t) - (posterior @ x)[:, None]).abs().max() < 1e-6


def test_mixture_of_one_is_the_gaussian_and_tight_components_are_points() -> None:
    schedule, x_t = VPLinear(), randn(7, 8)
    one = g8(schedule)
    mixture = GaussianMixture(torch.ones(1), one.mean[None], one.variance[None], schedule)
    points = randn(5, 8, seed=3)
    tight = GaussianMixture(torch.ones(5), points, torch.full((5, 8), 1e-12), schedule)
    for t in (0.0, 0.1, torch.linspace(0.05, 1.0, 7, dtype=torch.float64)):
        assert (mixture(x_t, t) - one(x_t, t)).abs().max() < 1e-12
        if not isinstance(t, float):
            assert (PointSet(points, schedule)(x_t, t) - tight(x_t, t)).abs().max() < 1e-8


@pytest.mark.parametrize("schedule", [Flow(), VPCosine(offset=0.0), rescale_zero_snr(Discrete.linear())])
def test_both_ends(schedule: Schedule) -> None:
    x = randn(6, 2)
    mixture, points = m2(schedule), randn(30, 2, seed=2)
    mean = mixture.weights @ mixture.means
    t = torch.tensor([0.0, 1.0] * 3)
    for model, whole in (
        (mixture, mean),
        (PointSet(points, schedule), points.mean(0)),
        (g8(schedule), g8(schedule).mean),
    ):
        x = randn(6, len(whole))
        assert (model(x, 1.0) - whole).abs().max() < 1e-12, "pure noise: the mean of the data"
        both = model(x, t)
        assert torch.equal(both[1::2], model(x, 1.0)[1::2]) and torch.equal(both[::2], model(x, 0.0)[::2])
    assert (m2(schedule)(randn(6, 2), 0.0) - randn(6, 2)).abs().max() < 1e-12, "no noise: the state itself"
    x = randn(6, 2)
    nearest = points[torch.cdist(x, points).argmin(1)]
    assert torch.equal(PointSet(points, schedule)(x, 0.0), nearest)
    assert (PointSet(points, schedule)(x, 1e-9) - nearest).abs().max() < 1e-12


def test_classes() -> None:
    schedule, x_t = VPCosine(), randn(4, 2)
    model = m2(schedule, labels=LABELS)
    assert model.null_label == 3
    label = torch.tensor([0, 2, 3, 1])
    found = model(x_t, 0.6, label=label)
    for row, c in enumerate(label.tolist()):
        keep = torch.tensor(LABELS) == c if c < 3 else torch.ones(6, dtype=torch.bool)
        alone = GaussianMixture(model.weights[keep], model.means[keep], model.variances[keep], schedule)
        assert (found[row] - alone(x_t[row : row + 1], 0.6)[0]).abs().max() < 1e-12
    assert torch.equal(model(x_t, 0.6), model(x_t, 0.6, label=torch.tensor([3] * 4)))
    drawn = model.sample(300, torch.Generator().manual_seed(0), label=1)
    nearest = torch.cdist(drawn, model.means).argmin(1)
    assert set(torch.tensor(LABELS)[nearest].tolist()) == {1}
    points = PointSet(model.means, schedule, labels=LABELS)
    assert torch.equal(points(x_t, 0.0, label=torch.tensor([1, 1, 1, 1])).unique(dim=0), model.means[2:4].unique(dim=0))
    with pytest.raises(BadInput, match=r"0 .. 3 .* found \[1, 4\]"):
        model(x_t[:2], 0.6, label=torch.tensor([1, 4]))
    with pytest.raises(BadInput, match="no classes"):
        m2(schedule)(x_t, 0.6, label=label)


def test_shapes_dtypes_and_samples() -> None:
    schedule = VPLinear()
    for model in (
        Gaussian(torch.zeros(3, 4, 4), torch.ones(3, 4, 4), schedule),
        GaussianMixture(torch.ones(2), torch.randn(2, 3, 4, 4), torch.ones(2, 3, 4, 4), schedule),
        PointSet(torch.randn(9, 3, 4, 4), schedule),
    ):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for t in (0.3, torch.rand(5)):
                answer = model(torch.randn(5, 3, 4, 4, dtype=dtype), t)
                assert answer.shape == (5, 3, 4, 4) and answer.dtype == dtype
        assert model.sample(6).shape == (6, 3, 4, 4)
    model = m2(schedule)
    drawn = model.sample(100_000, torch.Generator().manual_seed(0))
    mean = model.weights @ model.means
    variance = model.weights @ (model.variances + model.means**2) - mean**2
    assert (drawn.mean(0) - mean).abs().max() < 0.01 and (drawn.var(0) / variance - 1).abs().max() < 0.02


def test_the_named_problems() -> None:
    """The standard deviation of the exact endpoints that the protocol of the tables gives: .5750 and .2438."""
    schedule = Discrete.linear()
    assert g8(schedule).mean[1] == pytest.approx(0.3 * math.cos(1)) and g8(schedule).variance.tolist()[3] == 0.0625
    for problem, D, K, spread in ((m2, 2, 6, 0.5750), (m64, 64, 10, 0.2438)):
        model = problem(schedule)
        assert model.means.shape == model.variances.shape == (K, D)
        import numpy

        n = torch.from_numpy(numpy.random.default_rng(0).standard_normal((256, D)))
        end = model.ode(n * schedule.prior_std(1.0), 1.0, rtol=1e-6, atol=1e-7)
        assert end.std(unbiased=False).item() == pytest.approx(spread, abs=6e-5)


@pytest.mark.parametrize("schedule", [VPLinear(), SubVP(), EDM(), Flow(), rescale_zero_snr(Discrete.linear())])
def test_gaussian_endpoint(schedule: Schedule) -> None:
    """Moves the marginals exactly, composes, turns back, and is where a fine run of a solver arrives."""
    model = g8(schedule)
    x = schedule.prior_std(1.0) * randn(5, 8)
    middle = model.endpoint(x, 1.0, 0.4)
    assert (model.endpoint(middle, 0.4) - model.endpoint(x, 1.0)).abs().max() < 1e-12
    assert (model.endpoint(middle, 0.4, 1.0) - x).abs().max() < 1e-9
    start = 0.9
    x = schedule.alpha(start) * model.mean + torch.sqrt(
        schedule.alpha(start) ** 2 * model.variance + schedule.sigma(start) ** 2
    )
    assert (model.endpoint(x, start) - model.mean - model.variance.sqrt()).abs().max() < 1e-12
    x = schedule.prior_std(start) * randn(5, 8)
    times = UniformLambda(start=start, end=0.1)(schedule, 400)
    assert (walk(UniPC(order=3), model, x, times) - model.endpoint(x, start, 0.1)).abs().max() < 1e-4


def test_reference_ode() -> None:
    """On one component it is the closed form; on the mixture it does not depend on where it is cut, nor on the path."""
    n = randn(16, 8)
    for schedule in (VPLinear(), Flow(), EDM()):
        one = g8(schedule)
        mixture = GaussianMixture(torch.ones(1), one.mean[None], one.variance[None], schedule)
        for start, end in ((1.0, 0.0), (0.7, 0.0), (1.0, 0.6), (0.9, 0.2), (0.2, 0.01)):
            x = schedule.prior_std(start) * n
            exact = one.endpoint(x, start, end)
            assert (mixture.ode(x, start, end) - exact).abs().max() < 1e-7
    n = randn(16, 2)
    flow, linear = m2(Flow()), m2(VPLinear())
    whole = flow.ode(n, 1.0)
    assert (flow.ode(flow.ode(n, 1.0, 0.55), 0.55) - whole).abs().max() < 1e-6
    q = float(VPLinear().q(0.8))
    by_flow = flow.ode(n * Flow().prior_std(Flow().time(-math.log(q))), Flow().time(-math.log(q)))
    by_linear = linear.ode(n * VPLinear().prior_std(0.8), 0.8)
    assert (by_flow - by_linear).abs().max() < 1e-7
    labelled = m2(Flow(), labels=LABELS)
    assert (labelled.ode(n, 1.0, label=torch.tensor([1] * 16)) - labelled.means[2:4].mean(0)).abs().max() < 1.0


def test_a_trajectory_depends_on_the_noise_levels_alone() -> None:
    """DDIM on M2 with the same q list, once as VP-linear and once as flow: equal to 1e-10."""
    n, linear, flow = randn(32, 2), VPLinear(), Flow()
    times = UniformLambda()(linear, 20)
    same = torch.cat([flow.time(linear.lam(times[:-1])), times[-1:]])
    results = []
    for schedule, grid in ((linear, times), (flow, same)):
        compiled = plan(DDIM(), schedule, grid)
        results.append(compiled(m2(schedule), n * schedule.prior_std(grid[0])))
    assert (results[0] - results[1]).abs().max() < 1e-10


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Gaussian(torch.zeros(2), torch.zeros(2), VPLinear()), "PointSet"),
        (
            lambda: GaussianMixture(torch.ones(2), torch.zeros(3, 2), torch.ones(3, 2), VPLinear()),
            r"found \(2,\), \(3, 2\)",
        ),
        (lambda: GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2), VPLinear()), "weights > 0"),
        (lambda: m2(VPLinear(), labels=[0, 1]), "6 whole numbers"),
        (lambda: PointSet(torch.zeros(3), VPLinear()), "points"),
    ],
)
def test_bad_input(make: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()  # type: ignore[operator]
