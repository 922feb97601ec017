"""SA-Solver: its weights are the integrals of the paper, its ends are UniPC and DDPM, its law converges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import g8
from hasten.plan import plan
from hasten.samplers import DDIM, DDPM, UniPC
from hasten.samplers.sa import SASolver
from hasten.schedules import Discrete
from tests.samplers.problems import ALL, F64, FOUR, Basis, between, drive, ends, normals

EVERYWHERE = {"tau_low": 0.0, "tau_high": 1.0}
over_schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))


def same_tables(one: Any, other: Any, rows: slice = slice(None)) -> None:
    for name in ("a", "B", "C"):
        torch.testing.assert_close(getattr(one, name)[rows], getattr(other, name)[rows], rtol=1e-12, atol=1e-12)


@over_schedules
def test_full_noise_of_order_1_is_ddpm(schedule: Any) -> None:
    times = ends(schedule, 9)
    solver = SASolver(1, 0, tau=1.0, **EVERYWHERE)
    same_tables(plan(solver, schedule, times), plan(DDPM("small"), schedule, times))
    same_tables(plan(replace(solver, tau=0.0), schedule, times), plan(DDIM(), schedule, times))


@over_schedules
@pytest.mark.parametrize(
    ("order", "corrector", "other"),
    [(3, 0, UniPC(3, corrector=False)), (4, 0, UniPC(4, corrector=False)), (3, 4, UniPC(3)), (4, 5, UniPC(4))],
)
def test_without_noise_it_is_unipc(order: int, corrector: int, other: Any, schedule: Any) -> None:
    """Row by row once the history is full: in its first steps and its last two UniPC has weights 1/2 of its own."""
    times = ends(schedule, 12)
    ours, theirs = (plan(s, schedule, times) for s in (SASolver(order, corrector, tau=0.0), other))
    assert not ours.stochastic
    same_tables(ours, theirs, slice(order + 2, 12 - 3))


def test_without_noise_it_is_unipc_where_steps_are_many() -> None:
    """All rows, where no weight is 1/2: order 1, and its corrector of one difference under the exact weight."""
    times = ends(FOUR["EDM"], 7)
    same_tables(plan(SASolver(1, 0, 0.0), FOUR["EDM"], times), plan(UniPC(1, corrector=False), FOUR["EDM"], times))


def reference(
    schedule: Any, times: Tensor, tau: float, order: int, corrector: int, x: float, answers: Any, draws: Any
) -> float:
    """The paper's algorithm on one number: every weight an adaptive integral of a Lagrange polynomial."""
    from scipy.integrate import quad

    lams = schedule.lam(times).tolist()
    sigmas, K = schedule.sigma(times).tolist(), len(times) - 1

    def weights(l0: float, l1: float, nodes: list[float]) -> list[float]:
        def term(lam: float, j: int) -> float:
            ell = math.prod((lam - n) / (nodes[j] - n) for i, n in enumerate(nodes) if i != j)
            return (1 + tau**2) * math.exp((1 + tau**2) * (lam - l1)) * math.exp(l1) * ell

        return [quad(term, l0, l1, args=(j,), epsabs=1e-13, epsrel=1e-13)[0] for j in range(len(nodes))]

    def step(z: float, k: int, nodes: list[int], m: dict[int, float], xi: float) -> float:
        h = lams[k + 1] - lams[k]
        b = weights(lams[k], lams[k + 1], [lams[i] for i in nodes])
        out = sigmas[k + 1] / sigmas[k] * math.exp(-(tau**2) * h) * z
        out += sigmas[k + 1] * sum(w * m[i] for w, i in zip(b, nodes))
        return out + sigmas[k + 1] * math.sqrt(-math.expm1(-2 * tau**2 * h)) * xi

    m: dict[int, float] = {}
    z = before = x
    for k in range(K):
        m[k] = answers(z, k)
        if k and corrector:
            old = list(range(k - 1, max(k - corrector, -1), -1))
            z = step(before, k - 1, [k, *old] if corrector > 1 else [k], m, draws[k - 1])
        before = z
        z = step(z, k, list(range(k, max(k - order, -1), -1)), m, draws[k])
    return z


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize(("order", "corrector"), [(1, 1), (1, 2), (2, 0), (2, 2), (3, 4), (4, 5)])
def test_the_weights_are_the_integrals_of_the_paper(order: int, corrector: int, tau: float) -> None:
    schedule = FOUR["VPLinear"]
    times = schedule.time(torch.tensor([-3.0, -2.2, -1.9, -0.7, -0.1, 0.3, 1.6, 2.0], dtype=F64))
    rng = np.random.default_rng(1)
    draws, phases = rng.standard_normal(7).tolist(), rng.standard_normal(7).tolist()
    expected = reference(schedule, times, tau, order, corrector, 0.8, lambda z, k: math.sin(3 * z + phases[k]), draws)
    left, count = iter(draws), iter(phases)
    solver = SASolver(order, corrector, tau, **EVERYWHERE, lower_order_final=False)
    found, _ = drive(
        solver,
        schedule,
        lambda z, t: torch.sin(3 * z + next(count)),
        torch.tensor(0.8, dtype=F64),
        times,
        lambda: torch.tensor(next(left), dtype=F64),
    )
    assert found.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("schedule", FOUR.values(), ids=list(FOUR))
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_every_grid_gets_the_noise_of_the_interval(tau: float, schedule: Any) -> None:
    """What is left of the start where all answers are 0 is exp(-int tau^2 dlam), whether or not the interval's ends
    are nodes."""
    low, high = 0.3, 0.7
    Lam = tau**2 * (schedule.lam(low) - schedule.lam(high))
    for times in ([0.9, 0.7, 0.5, 0.3, 0.1], [0.9, 0.76, 0.41, 0.1], [0.9, 0.5, 0.1], [0.9, 0.1]):
        grid = torch.tensor(times, dtype=F64)
        table = plan(SASolver(2, 0, tau, tau_low=low, tau_high=high), schedule, grid)
        expected = schedule.sigma(grid[-1]) / schedule.sigma(grid[0]) * torch.exp(-Lam)
        torch.testing.assert_close(table.a.prod(), expected, rtol=1e-12, atol=0)
        assert table.stochastic
    outside = plan(SASolver(tau_low=0.3, tau_high=0.4), schedule, torch.tensor([0.9, 0.7, 0.5], dtype=F64))
    assert not outside.stochastic


def test_from_pure_noise() -> None:
    """With noise everywhere the step from alpha = 0 forgets the start; with none there it keeps all of it."""
    schedule = FOUR["Flow"]
    times = ends(schedule, 4)
    assert plan(SASolver(**EVERYWHERE), schedule, times).a[0] == 0
    quiet = plan(SASolver(tau_high=0.7), schedule, times)
    torch.testing.assert_close(quiet.a[0], torch.tensor(0.75, dtype=F64), rtol=0, atol=1e-15)
    assert float(quiet.C[0].abs().sum()) == pytest.approx(0, abs=1e-15)
    # the trapezoid: the two answers count alike in the state at the second node, and with the last one also in the third
    table = plan(SASolver(1, 2, 0.0), schedule, times[:3])
    ratio = table.a[1]
    assert ratio.item() == pytest.approx(0.5 / 0.75)
    assert table.B[1, 0].item() == pytest.approx(ratio.item() * (0.5 - 1) * 0.25)


def variance_error(sampler: Any, schedule: Any, steps: int, v: float = 0.25) -> float:
    """Relative error of the variance at the end of a run on N(0, v) from q = 5 to q = .2, equal in lam: exact, since
    the run is linear in its noises."""
    times = between(schedule, 5.0, 0.2, steps)
    basis = Basis(steps + 10)
    a, s = schedule.alpha(times), schedule.sigma(times)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (alpha * v / (alpha**2 * v + sigma**2)) * z

    start = torch.sqrt(a[0] ** 2 * v + s[0] ** 2) * basis()
    z, _ = drive(replace(sampler, lower_order_final=False), schedule, denoise, start, times, basis)
    return (z.pow(2).sum() / (a[-1] ** 2 * v + s[-1] ** 2) - 1).abs().item()


PAIRS = [(1, 0), (1, 1), (3, 1), (1, 2), (2, 0), (2, 2), (2, 3), (3, 0), (3, 4), (4, 0), (4, 5)]


@pytest.mark.parametrize(("order", "corrector"), PAIRS)
def test_order_without_noise(order: int, corrector: int) -> None:
    """The slope of the error on the Gaussian G8 from q = 6 to q = .1, after exact starting values."""
    schedule = FOUR["Flow"]
    solver = SASolver(order, corrector, 0.0, lower_order_final=False)
    gaussian = g8(schedule)
    errors = []
    counts = (40, 120) if solver.convergence > 2 else (120, 480)
    for steps in counts:
        times = between(schedule, 6.0, 0.1, steps, warm=12)
        start = (gaussian.mean + normals(16, 8) * torch.sqrt(gaussian.variance + 36.0)) * schedule.alpha(times[0])
        z, _ = drive(solver, schedule, gaussian, start, times)
        errors.append((z - gaussian.endpoint(start, times[0], times[-1])).square().mean().sqrt().item())
    slope = math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])
    assert solver.convergence - 0.3 < slope < solver.convergence + 0.8, (slope, errors)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.5])
@pytest.mark.parametrize(("order", "corrector"), PAIRS)
def test_order_in_law(order: int, corrector: int, tau: float) -> None:
    solver = SASolver(order, corrector, tau, **EVERYWHERE)
    counts = (40, 160) if solver.convergence > 1 else (80, 320)  # the corrector of one answer settles late
    coarse, fine = (variance_error(solver, FOUR["VPCosine"], steps) for steps in counts)
    assert math.log2(coarse / fine) / 2 > solver.convergence - 0.2, (coarse, fine)
    assert solver.convergence <= 2


def final_variance(sampler: Any, K: int) -> float:
    """N(.3, .25) on the linear table, exact denoiser, from the exact marginal at index 999, K steps equal in index."""
    table = Discrete.linear()
    index = torch.linspace(0, 999, K, dtype=F64).round().flip(0)
    times = torch.cat([(index + 1) / 1000, torch.zeros(1, dtype=F64)])
    basis = Basis(K + 2)
    a, s = table.alpha(times[0]), table.sigma(times[0])

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = table.alpha(t), table.sigma(t)
        return alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * z

    z, _ = drive(sampler, table, denoise, torch.sqrt(a**2 * 0.25 + s**2) * basis(), times, basis)
    return z.square().sum().item()


def test_variance_of_a_gaussian_on_the_linear_table() -> None:
    """Order 1 at tau = 1 and 0 has the variances known for DDPM (small) and DDIM; the default is nearer to the truth, .25,
    than either where the steps resolve the schedule's noisy end (with 20 steps equal in index no method of order 2 does).
    """
    known = {100: (0.218981, 0.236041), 20: (0.150507, 0.185283), 10: (0.104222, 0.130759)}
    for K, (ancestral, deterministic) in known.items():
        assert final_variance(SASolver(1, 0, 1.0, **EVERYWHERE), K) == pytest.approx(ancestral, abs=2e-6)
        assert final_variance(SASolver(1, 0, 0.0), K) == pytest.approx(deterministic, abs=2e-6)
    assert abs(final_variance(SASolver(), 100) - 0.25) < 2.6e-3 < abs(known[100][1] - 0.25)


@pytest.mark.parametrize("solver", [SASolver(), SASolver(2, 2, 0.7, **EVERYWHERE)])
@over_schedules
def test_gradients_in_the_times(solver: Any, schedule: Any) -> None:
    draws = [0.3 * (-1) ** k for k in range(12)]

    def run(times: Tensor) -> Tensor:
        noises = iter(draws)
        return drive(
            solver,
            schedule,
            lambda z, t: torch.sin(z),
            torch.ones((), dtype=F64),
            times,
            lambda: torch.tensor(next(noises), dtype=F64),
        )[0]

    times = ends(schedule, 6)
    times[1:-1] -= 3.3e-4  # off the table's entries, where a Discrete schedule has kinks
    times.requires_grad_()
    (gradient,) = torch.autograd.grad(run(times), times)
    assert torch.isfinite(gradient).all()
    step = 1e-6 * torch.eye(7, dtype=F64)
    for k in range(1, 6):
        difference = (run(times.detach() + step[k]) - run(times.detach() - step[k])) / 2e-6
        assert gradient[k].item() == pytest.approx(difference.item(), rel=2e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"order": 5}, "1, 2, 3 or 4"),
        ({"corrector": 6}, "none"),
        ({"tau": -1.0}, "0 or more"),
        ({"tau": math.inf}, "0 or more"),
        ({"tau_low": 0.8, "tau_high": 0.2}, "tau_low < tau_high"),
        ({"tau_high": 1.5}, "tau_low < tau_high"),
    ],
)
def test_bad_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInput, match=word):
        SASolver(**options)
