"""Identities from the papers, as statements about plans: no network, no sampling, float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.exact import g8
from hasten.plan import Plan, plan
from hasten.samplers import DDIM, DDPM, DEIS, PLMS, DPMSolver, Heun, UniPC
from hasten.samplers._exponential import Known, advance, g, make_node
from hasten.schedules import Flow, Schedule, VPLinear
from tests.samplers.problems import ENDS, F64, between, drive, ends, mixture, normals

over_ends = pytest.mark.parametrize("schedule", ENDS.values(), ids=list(ENDS))


def same(one: Plan, two: Plan, first: int = 0) -> None:
    """Row by row, from row `first` on."""
    for name in ("a", "A", "B", "C"):
        torch.testing.assert_close(getattr(one, name)[first:], getattr(two, name)[first:], rtol=1e-12, atol=1e-12)


TWINS = [
    (UniPC(1, corrector=False), DDIM()),
    (DPMSolver(1), DDIM()),
    (DPMSolver(1, multistep=False), DDIM()),
    (DEIS(1), DDIM()),
    (PLMS(1), DDIM()),
    (DDPM("small"), DDIM(eta=1.0)),
    (DPMSolver(1, sde=True), DDPM("small")),
    (UniPC(2, corrector=False), DPMSolver(2)),
    (UniPC(3, corrector=False), DPMSolver(3)),
    (DEIS(3, "log_rho"), DPMSolver(3, predict="eps", variant="taylor")),
]


@over_ends
@pytest.mark.parametrize("twins", TWINS, ids=[f"{type(a).__name__}-{type(b).__name__}-{a.order}" for a, b in TWINS])
def test_two_names_for_one_table(twins: tuple[Any, Any], schedule: Schedule) -> None:
    one, two = (plan(s, schedule, ends(schedule, 8)) for s in twins)
    same(one, two)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("h", [1e-5, 2.5])
def test_a_step_integrates_polynomials_exactly(order: int, sde: bool, predict: str, h: float) -> None:
    """z_t - base z_0 is the kernel's integral of m(lam) for polynomials of degree < order, by 40-point Gauss
    quadrature.

    (The third-order stochastic step in common use has -1/2 where the integral has +1/2, and fails this.)
    """
    import numpy as np

    schedule, lam0 = VPLinear(), -0.4
    known = [make_node(schedule, schedule.time(lam0 - k * 0.7 * h)) for k in range(order)]
    end = make_node(schedule, schedule.time(lam0 + h))
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(40))
    lam = known[0].lam + (end.lam - known[0].lam) * (points + 1) / 2
    weights = weights * (end.lam - known[0].lam) / 2
    if predict == "x0":  # z/sigma e^(lam if sde) grows by (2 if sde) e^{(2 if sde) lam} x0 dlam
        p = 2 if sde else 1
        kernel = p * end.alpha * torch.exp(p * (lam - end.lam))
    else:
        kernel = -(2 if sde else 1) * end.sigma * torch.exp(end.lam - lam)
    for degree in range(order):
        answers = []
        for n in known:
            m, zero = ((n.lam - lam0) / h) ** degree, torch.zeros((), dtype=F64)
            answers.append(Known(n, zero, m) if predict == "x0" else Known(n, n.sigma * m, zero))
        zero = torch.zeros((), dtype=F64)
        got = advance(zero, answers, end, predict=predict, sde=sde, noise=zero)
        exact = (weights * kernel * ((lam - lam0) / h) ** degree).sum()
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-11 * h)


def test_the_first_step_from_pure_noise_is_a_trapezoid() -> None:
    """From alpha = 0: z_t = sigma_t/sigma_0 z + alpha_t (x0_0 + x0_t)/2 in Heun, and by UniPC's first correction and PLMS's
    repeated step; its local error is of third order."""
    schedule, answers = Flow(), [torch.tensor(v, dtype=F64) for v in (0.3, -0.2, -0.2)]
    z, times = torch.tensor(1.3, dtype=F64), torch.tensor([1.0, 0.7, 0.4], dtype=F64)

    def run(sampler: Any, times: Tensor) -> Tensor:
        replies = iter(answers)
        return drive(sampler, schedule, lambda z, t: next(replies), z, times)[0]

    first = 0.7 * z + 0.3 * (answers[0] + answers[1]) / 2
    torch.testing.assert_close(run(Heun(), times[:2]), first, rtol=1e-14, atol=0)
    then = 0.4 / 0.7 * first + (0.6 - 0.4 / 0.7 * 0.3) * answers[1]
    for sampler in (UniPC(1), UniPC(1, "bh1")):
        torch.testing.assert_close(run(sampler, times), then, rtol=1e-12, atol=0)
    coroutine = PLMS().steps(schedule, z, times, lambda: z)
    next(coroutine)
    torch.testing.assert_close([coroutine.send(a) for a in answers[:2]][-1].x, first, rtol=1e-14, atol=0)
    model, errors = g8(schedule), []
    for h in (0.04, 0.02):
        step = torch.tensor([1.0, 1 - h], dtype=F64)
        wrong = drive(Heun(), schedule, model, normals(16, 8), step)[0] - model.endpoint(normals(16, 8), 1.0, 1 - h)
        errors.append(wrong.norm().item())
    assert math.log2(errors[0] / errors[1]) > 2.8


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_g_is_accurate_for_small_and_large_steps(k: int) -> None:
    """Against the series in rational arithmetic: the recursion loses all digits of g_4 at |H| = 1e-5."""
    from fractions import Fraction

    for H in (-6.0, -1.0, -0.9, -1e-3, -1e-5, 1e-5, 0.5, 1.0, 4.0):
        exact = sum(Fraction(H) ** j / math.factorial(j + k - 1) for j in range(1, 80))
        assert g(k, torch.tensor(H, dtype=F64)).item() == pytest.approx(float(exact), rel=1e-13)


@pytest.mark.parametrize(
    "sampler", [UniPC(3), DPMSolver(3, predict="eps"), DEIS(3)], ids=["UniPC", "DPMSolver", "DEIS"]
)
def test_a_plan_is_differentiable_in_its_times(sampler: Any) -> None:
    """Every coefficient, from pure noise to the clean end, against difference quotients."""
    first, last = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)

    def tables(inner: Tensor) -> tuple[Tensor, ...]:
        found = plan(sampler, Flow(), torch.cat([first, inner, last]))
        return found.a, found.A, found.B

    inner = torch.tensor([0.9, 0.75, 0.55, 0.3, 0.12], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(tables, (inner,))
    times = ends(Flow(), 6).requires_grad_()
    (gradient,) = torch.autograd.grad(plan(sampler, Flow(), times).B.square().sum(), times)
    assert torch.isfinite(gradient).all() and gradient[1:-1].abs().min() > 1e-3


# ---- the law of the stochastic samplers ---------------------------------------------------------------------------


# ---- solvers see only q = sigma/alpha -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler", [DDIM(), Heun(), DPMSolver(3), DPMSolver(3, multistep=False), UniPC(3), DEIS(3, "rho"), PLMS()]
)
def test_only_the_noise_level_counts(sampler: Any) -> None:
    """The same list of q on a variance-preserving and on a straight path gives the same y = z/alpha."""
    results = []
    for schedule in (VPLinear(), Flow()):
        times = torch.cat([between(schedule, 100.0, 0.02, 9), torch.zeros(1, dtype=F64)])
        start = 100.0 * normals(8, 2) * schedule.alpha(times[0])
        results.append(drive(sampler, schedule, mixture("M2", schedule), start, times)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


# ---- inversion ----------------------------------------------------------------------------------------------------
