"""Identities from the papers, as statements about plans: no network, no sampling, float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import Gaussian, g8
from hasten.plan import Plan, plan
from hasten.samplers import DDIM, DDPM, DEIS, PLMS, DPMSolver, Heun, UniPC, invert
from hasten.samplers._exponential import Known, advance, g, make_node
from hasten.schedules import Discrete, Flow, Schedule, VPCosine, VPLinear
from hasten.times import UniformLambda
from tests.samplers.problems import ALL, F64, Basis, between, drive, ends, mixture, normals, rms

over_schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))


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


@over_schedules
@pytest.mark.parametrize("twins", TWINS, ids=[f"{type(a).__name__}-{type(b).__name__}-{a.order}" for a, b in TWINS])
def test_two_names_for_one_table(twins: tuple[Any, Any], schedule: Schedule) -> None:
    one, two = (plan(s, schedule, ends(schedule, 8)) for s in twins)
    same(one, two)


def test_bh1_and_bh2_differ_only_where_one_difference_is_used() -> None:
    """So, from order 3 on, in the first three rows only (warm-up, and the corrections that look back at it)."""
    times = between(VPLinear(), 20.0, 0.05, 9)
    for order in (3, 4):
        one, two = (plan(UniPC(order, v, lower_order_final=False), VPLinear(), times) for v in ("bh1", "bh2"))
        same(one, two, first=3)
        assert (one.B - two.B)[:3].abs().max() > 1e-3


def test_third_order_matters_only_in_third_order_steps() -> None:
    times = between(VPLinear(), 20.0, 0.05, 6)
    true, compat = (plan(DPMSolver(3, third=k), VPLinear(), times) for k in ("true", "compat"))
    difference = (true.B - compat.B).abs().amax(1)
    assert (difference[[0, 1, 4, 5]] == 0).all() and (difference[[2, 3]] > 1e-4).all()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("predict", ["x0", "eps"])
@pytest.mark.parametrize("h", [1e-5, 0.3, 2.5])
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


@pytest.mark.parametrize("variable", ["t", "rho"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_weights_integrate_polynomials_exactly(order: int, variable: str) -> None:
    """sum_j w_j p(node j) = int p dq for polynomials p of degree < order in the variable, over wide steps."""
    import numpy as np

    schedule, times = VPLinear(), torch.tensor([0.9, 0.85, 0.7, 0.6, 0.35], dtype=F64)
    past = [Known(make_node(schedule, t), None, None) for t in times[4 - order : 4].flip(0)]
    weights = DEIS(order, variable)._weights(schedule, past, make_node(schedule, times[-1]))
    points, gauss = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(100))
    if variable == "t":
        low, high = times[3], times[4]
        at = (low + (high - low) * (points + 1) / 2).requires_grad_()
        (rate,) = torch.autograd.grad((schedule.sigma(at) / schedule.alpha(at)).sum(), at)  # dq/dt
        place = [k.node.t for k in past]
    else:
        low, high = schedule.q(times[3]), schedule.q(times[4])
        at, rate, place = low + (high - low) * (points + 1) / 2, torch.ones_like(points), [k.node.q for k in past]
    for degree in range(order):
        exact = (gauss * rate * at.detach() ** degree).sum() * (high - low) / 2
        found = sum(w * p**degree for w, p in zip(weights, place))
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


def test_singlestep_is_the_papers_formula() -> None:
    """2S with its node at 1/2 and 3S with nodes at 1/3 and 2/3 in lam, as DPM-Solver++ writes them."""
    schedule, lam0, h = VPLinear(), -0.6, 0.8
    z, answers = torch.tensor(0.7, dtype=F64), [torch.tensor(v, dtype=F64) for v in (0.3, -0.2, 0.5)]

    def run(sampler: Any, fractions: list[float]) -> Tensor:
        replies = iter(answers)
        times = schedule.time(lam0 + h * torch.tensor([0.0, *fractions, 1.0], dtype=F64))
        return drive(sampler, schedule, lambda z, t: next(replies), z, times)[0]

    def base(r: float) -> tuple[Tensor, Tensor]:  # alpha, and the first-order step, at lam0 + r h
        (a, s), s0 = (
            (f(schedule.time(lam0 + r * h)) for f in (schedule.alpha, schedule.sigma)),
            schedule.sigma(schedule.time(lam0)),
        )
        return a, s / s0 * z - a * math.expm1(-r * h) * answers[0]

    (alpha, first), (m0, m1, m2) = base(1.0), answers
    two = first - alpha * math.expm1(-h) * (m1 - m0)
    torch.testing.assert_close(run(DPMSolver(2, multistep=False), [0.5]), two, rtol=1e-12, atol=0)
    three = first + alpha * (math.expm1(-h) / h + 1) * (m2 - m0) * 3 / 2
    replies = run_groups_of_three(schedule, lam0, h, z, answers)
    torch.testing.assert_close(replies, three, rtol=1e-12, atol=0)


def run_groups_of_three(schedule: Schedule, lam0: float, h: float, z: Tensor, answers: list[Tensor]) -> Tensor:
    """The state after the first group of a 5-step grid, whose groups are 3 and 2."""
    times = schedule.time(lam0 + h * torch.tensor([0.0, 1 / 3, 2 / 3, 1.0, 1.2, 1.4], dtype=F64))
    coroutine = DPMSolver(3, multistep=False).steps(schedule, z, times, lambda: z)
    next(coroutine)
    return [coroutine.send(answer) for answer in answers][-1].x


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


def plan_variances(table: Plan, schedule: Schedule, v: float) -> Tensor:
    """Variance at every node of N(0, v) data under the plan with the exact linear denoiser, from the table alone."""
    K, M = len(table.a), table.C.shape[1]
    state = torch.zeros(1 + M, dtype=F64)
    state[0] = torch.sqrt(schedule.alpha(table.times[0]) ** 2 * v + schedule.sigma(table.times[0]) ** 2)
    states, answers, variances = [state], [], []
    for k in range(K):
        alpha, sigma = schedule.alpha(table.times[k]), schedule.sigma(table.times[k])
        answers.append(alpha * v / (alpha**2 * v + sigma**2) * states[k])
        draws = torch.cat([torch.zeros(1, dtype=F64), table.C[k]])
        old = sum((table.A[k, j] * states[j] for j in range(k)), torch.zeros(1 + M, dtype=F64))
        states.append(table.a[k] * states[k] + old + sum(table.B[k, j] * answers[j] for j in range(k + 1)) + draws)
        variances.append(states[-1].pow(2).sum())
    return torch.stack(variances)


@pytest.mark.parametrize(
    ("count", "large", "small", "deterministic"),
    [(100, 0.258652, 0.218981, 0.236041), (20, 0.298455, 0.150507, 0.185283), (10, 0.358521, 0.104222, 0.130759),
     (5, 0.558423, 0.043970, 0.050644)],
)  # fmt: skip
def test_ddpm_variance_on_a_gaussian(count: int, large: float, small: float, deterministic: float) -> None:
    """On N(.3, .25): known values at the end, and at every node the closed recursion of the variance."""
    schedule, v = Discrete.linear(), 0.25
    index = torch.linspace(999, 0, count, dtype=F64).round()
    times = torch.cat([(index + 1) / 1000, torch.zeros(1, dtype=F64)])
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    for sampler, final in ((DDPM("large"), large), (DDPM(), small), (DDIM(), deterministic), (DDIM(eta=1.0), small)):
        found = plan_variances(plan(sampler, schedule, times), schedule, v)
        assert found[-1].item() == pytest.approx(final, abs=1.5e-6)
        if not isinstance(sampler, DDPM):
            continue
        expected, now = [], alpha[0] ** 2 * v + sigma[0] ** 2
        for r in range(count):
            s, gain = r + 1, alpha[r] * v / (alpha[r] ** 2 * v + sigma[r] ** 2)
            beta = sigma[r] ** 2 - (alpha[r] / alpha[s] * sigma[s]) ** 2
            mean = alpha[r] / alpha[s] * sigma[s] ** 2 / sigma[r] ** 2 + alpha[s] * beta / sigma[r] ** 2 * gain
            added = beta if sampler.variance == "large" else beta * sigma[s] ** 2 / sigma[r] ** 2
            now = mean**2 * now + (0 if s == count else added)
            expected.append(now)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=0)


def test_churn_keeps_the_marginal_of_a_gaussian() -> None:
    """However much is stirred, many steps end at the data's variance; without churn_noise = 1 they do not."""

    def variance(sampler: Heun, steps: int) -> float:
        schedule, v, basis = ALL["EDM"], 0.25, Basis()
        times = between(schedule, 40.0, 0.05, steps)

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            return v / (v + schedule.sigma(t) ** 2) * z

        z, _ = drive(sampler, schedule, denoise, math.sqrt(40.0**2 + v) * basis(), times, basis)
        return z.pow(2).sum().item() / (v + 0.05**2) - 1

    assert abs(variance(Heun(churn=40.0), 300)) < 3e-3
    assert variance(Heun(churn=40.0, churn_noise=1.1), 300) > 0.05


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


def test_singlestep_evaluates_inside_its_groups() -> None:
    """Every node of the grid is evaluated once, and none in a group but the first enters the next group's table row."""
    schedule = VPLinear()
    times = UniformLambda()(schedule, 8)
    table = plan(DPMSolver(3, multistep=False), schedule, times)  # groups 3, 3, 1, 1
    torch.testing.assert_close(table.times[:8], times[:8], rtol=0, atol=0)
    assert (table.B[5, :3] == 0).all() and (table.B[2, :3].abs() > 0).sum() >= 2


# ---- inversion ----------------------------------------------------------------------------------------------------


def test_inversion() -> None:
    """Up and down again on N(.3, .25): the naive way is off by O(1/steps), the fixed point by rounding."""
    schedule = Discrete.linear()
    model = Gaussian(torch.full((1,), 0.3, dtype=F64), torch.full((1,), 0.25, dtype=F64), schedule)
    x0 = torch.tensor([[-1.0], [0.1], [0.9]], dtype=F64)
    naive = []
    for steps in (25, 50, 100):
        times = torch.linspace(1.0, 1e-3, steps + 1, dtype=F64)
        back = {n: drive(DDIM(), schedule, model, invert(model, x0, times, n), times)[0] for n in (0, 60)}
        assert rms(back[60], x0) < 1e-7
        naive.append(rms(back[0], x0))
    assert naive[2] > 1e-3 and 0.8 < math.log2(naive[1] / naive[2]) < 1.2


@pytest.mark.parametrize("schedule", [Flow(), VPCosine(offset=0.0), VPLinear()], ids=["Flow", "VPCosine0", "VPLinear"])
def test_inversion_from_clean_to_pure_noise(schedule: Schedule) -> None:
    model = Gaussian(torch.full((1,), 0.3, dtype=F64), torch.full((1,), 0.25, dtype=F64), schedule)
    x0, times = torch.tensor([[-0.4], [0.9]], dtype=F64), ends(schedule, 12)
    assert torch.isfinite(invert(model, x0, times)).all()
    if schedule.alpha(times[-2]) > 0.5:  # the step into sigma = 0 forgets z, so go back to the node before it
        z = invert(model, x0, times, iterations=200)
        target = drive(DDIM(), schedule, model, z, times[:-1])[0]
        last = make_node(schedule, times[-2])
        gain = last.alpha * 0.25 / (last.alpha**2 * 0.25 + last.sigma**2)
        answer = 0.3 + gain * (target - last.alpha * 0.3)
        torch.testing.assert_close(answer, x0, rtol=0, atol=1e-7)
    with pytest.raises(BadInput):
        invert(model, x0, times, iterations=-1)
