"""Optimised steps: the paper's bound and its minima, exact gradients, our own objectives, what is remembered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser, Wrapper
from hasten.errors import BadInput
from hasten.exact import m2
from hasten.plan import plan
from hasten.samplers import DDIM, DEIS, DPMSolver, Heun, UniPC
from hasten.schedules import EDM, Discrete, Flow, Schedule, VPCosine, VPLinear
from hasten.times import CosineAngle, Karras, Quadratic, Trailing, UniformLambda, UniformTime
from hasten.tuning import TuningTask
from hasten.tuning._objective import ErrorBound, Gaps, minimise, orders
from hasten.tuning.optimized_steps import OptimizedSteps

F64 = torch.float64
ONE = ("narrow_angle",)  # few starts, for speed
FIRST, LAST = float(VPLinear().lam(1.0)), float(VPLinear().lam(1e-3))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))


def ripple(N: int, first: float = FIRST, last: float = LAST) -> np.ndarray:
    lam = np.linspace(first, last, N + 1)
    lam[1:-1] += 0.05 * np.sin(np.arange(N - 1))
    return lam


def task(denoiser: nn.Module, sampler: Any, times: Tensor, **options: Any) -> TuningTask:
    return TuningTask(denoiser, sampler, times, options.pop("shape", (2,)), **options)


class Still(nn.Module):
    """A denoiser that is never asked."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule


# ---- the paper's bound ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("N", "J"), [(5, 239.726483), (6, 167.195764), (8, 52.215623), (10, 30.167728), (15, 13.641034)]
)
def test_values_of_the_bound(N: int, J: float) -> None:
    assert ErrorBound(orders(N, 3), p=2, trunc=3)(ripple(N))[0] == pytest.approx(J, abs=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("N", [4, 9, 40])
def test_weights_are_the_integrals(order: int, N: int) -> None:
    """Against 40 Gauss points; and they sum to the integral of e^lam. N = 40 has steps so short that the moments by
    parts would cancel."""
    lam, (points, mass) = ripple(N), np.polynomial.legendre.leggauss(40)
    recorded = 0
    assert orders(6, 3) == [1, 2, 3, 3, 2, 1] and orders(4, 2, lower_order_final=False) == [1, 2, 2, 2]
    for nodes, ends, w, _ in ErrorBound(orders(N, order)).weights(lam):
        for row, end, result in zip(nodes, ends, w):
            a, b = lam[row[0]], lam[end]
            x, at = a + (b - a) * (points + 1) / 2, lam[row]
            basis = [
                np.prod([(x - o) / (at[j] - o) for i, o in enumerate(at) if i != j], axis=0) for j in range(len(row))
            ]
            exact = [(np.exp(x) * (l * np.ones_like(x))) @ mass * (b - a) / 2 for l in basis]
            assert result == pytest.approx(exact, rel=1e-12, abs=1e-12 * np.exp(b))
            assert abs(result.sum() / (np.exp(b) - np.exp(a)) - 1) < 1e-13 * max(1, np.abs(result).sum() / result.sum())
            recorded += 1
    assert recorded == N


def traced(sampler: Any, schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """From the table that the library runs: lam, and per step and answer what is added to z / sigma at the end. The
    table is run on unit vectors for it."""
    table = plan(sampler, schedule, times)
    sigma = schedule.sigma(times)
    K = table.nfe
    rows, state = [], torch.zeros(K, dtype=F64)
    for n in range(K):
        assert not table.A[n].any()
        new = table.a[n] * state + torch.stack([table.B[n, j] * torch.eye(K, dtype=F64)[j] for j in range(K)]).sum(0)
        rows.append(new / sigma[n + 1] - state / sigma[n])
        state = new
    return schedule.lam(times), torch.stack(rows)


def traced_J(lam: Tensor, rows: Tensor, order: int, p: float, trunc: int) -> Tensor:
    s, a = torch.rsqrt(1 + torch.exp(2 * lam[:-1])), torch.rsqrt(1 + torch.exp(-2 * lam[:-1]))
    e, total, sums = s**p / a, torch.zeros((), dtype=F64), torch.zeros(len(rows), dtype=F64)
    for n, k in enumerate(orders(len(rows), order)):
        if k == 1:
            total = total + e[n] * rows[n, n].abs()
        elif n < trunc:
            total = total + (e * rows[n]).square().sum().sqrt()
        else:
            sums = sums + rows[n]
    return total + (e * sums.abs()).sum()


@pytest.mark.parametrize("schedule", [VPLinear(), EDM(), Flow(), Discrete.linear()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "sampler",
    [DPMSolver(1), DPMSolver(2, variant="taylor"), DPMSolver(3, variant="taylor"), UniPC(1, corrector=False)],
    ids=["dpm1", "dpm2", "dpm3", "unipc1"],
)
@pytest.mark.parametrize("trunc", [0, 3])
def test_the_closed_form_is_the_traced_plan(sampler: Any, schedule: Schedule, trunc: int) -> None:
    """Weights step by step, J, and its gradient by automatic differentiation through the traced table."""
    N = 7
    start = 0.97 if schedule.zero_snr else 1.0
    ends = [float(schedule.lam(start)), float(schedule.lam(schedule.t_min * 2))]
    times = schedule.time(torch.from_numpy(ripple(N, *ends)))
    times.requires_grad_()
    lam, rows = traced(sampler, schedule, times)
    bound = ErrorBound(orders(N, sampler.order), p=2, trunc=trunc)
    numbers = lam.detach().numpy()
    for nodes, ends_, w, _ in bound.weights(numbers):
        for row, end, result in zip(nodes, ends_, w):
            expected = np.zeros(N)
            expected[row] = result
            assert rows[end - 1].detach().numpy() == pytest.approx(expected, abs=1e-12 * np.exp(numbers[end]))
    J = traced_J(lam, rows, sampler.order, 2, trunc)
    value, gradient = bound(numbers)
    assert J.item() == pytest.approx(value, rel=1e-11)
    (by_time,) = torch.autograd.grad(J, times)
    (through_lam,) = torch.autograd.grad((schedule.lam(times) * torch.from_numpy(gradient)).sum(), times)
    torch.testing.assert_close(by_time, through_lam, rtol=1e-8, atol=1e-8 * float(through_lam.abs().max()))


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("trunc", [0, 3])
def test_gradients_are_difference_quotients(order: int, trunc: int) -> None:
    """Of the bound in the nodes, and of the nodes in the numbers that the search moves."""
    N = 9
    bound, gaps = ErrorBound(orders(N, order), p=1, trunc=trunc), Gaps(FIRST, LAST)
    d = 0.3 * np.random.default_rng(0).standard_normal(N - 1)
    lam, by_d = gaps(d)
    gradient = bound(lam)[1] @ by_d
    assert Gaps.params(lam) == pytest.approx(d, abs=1e-12)
    for i, step in enumerate(1e-6 * np.eye(N - 1)):
        difference = (bound(gaps(d + step)[0])[0] - bound(gaps(d - step)[0])[0]) / 2e-6
        assert gradient[i] == pytest.approx(difference, rel=1e-6, abs=1e-6 * np.abs(gradient).max())


@pytest.mark.parametrize(
    ("schedule", "p", "N", "J", "inside"),
    [
        (VPLinear(), 2, 5, 49.9048, [-2.182, -1.216, -0.258, 1.065]),
        (VPLinear(), 2, 6, 38.3477, [-2.545, -1.423, -0.811, 0.100, 1.257]),
        (VPLinear(), 2, 7, 25.798, None),
        (VPLinear(), 2, 8, 17.542, None),
        (VPLinear(), 2, 10, 10.832, None),
        (Discrete.linear(), 1, 5, 73.466, [-2.075, -1.096, -0.081, 1.344]),
        (Discrete.linear(), 1, 6, 58.380, [-2.417, -1.241, -0.600, 0.398, 1.639]),
    ],
)
def test_minima(schedule: Schedule, p: float, N: int, J: float, inside: list[float] | None) -> None:
    """The least values known, and where they lie, from the schedule's own start to its t_min."""
    times = UniformLambda(end=schedule.t_min)(schedule, N)
    tuned = OptimizedSteps(p=p, trunc=3).tune(task(Still(schedule), UniPC(3), times))
    assert tuned.figures["J"] < J + 6e-4
    assert tuned.figures["J"] < min(tuned.figures["J_lambda"], tuned.figures["J_uniform"])
    assert tuned.plan is not None and tuned.plan.times[0] == times[0] and tuned.plan.times[-1] == times[-1]
    lam = schedule.lam(tuned.plan.times)
    assert bool((lam.diff() > 0).all())
    assert ErrorBound(orders(N, 3), p, 3)(lam.numpy())[0] == pytest.approx(tuned.figures["J"], rel=1e-9)
    if inside is not None:
        assert lam[1:-1].tolist() == pytest.approx(inside, abs=1e-3)


def test_the_full_problem_takes_less_than_two_seconds() -> None:
    """Processor seconds of one core, over the numbers of steps that the paper has."""
    taken = {}
    for N in (4, 8, 10, 12, 15):
        begin = time.process_time()
        OptimizedSteps().tune(task(Still(VPLinear()), UniPC(3), UniformLambda()(VPLinear(), N)))
        taken[N] = time.process_time() - begin
    assert max(taken.values()) < 2, taken


def test_steps_that_cancel_are_avoided() -> None:
    """Without truncation J has its least value where two long first steps cancel; `growth` keeps gaps alike."""
    N = 8
    bound, start = ErrorBound(orders(N, 3), 1, 0), [np.linspace(FIRST, LAST, N + 1)]
    free = minimise(bound, FIRST, LAST, start, 50.0)
    saved = minimise(bound, FIRST, LAST, start, 1.6)
    assert free[0] < saved[0] < bound(start[0])[0]
    assert np.diff(free[1]).max() / np.diff(free[1]).mean() > 3
    ratio = np.exp(np.abs(np.diff(np.log(np.diff(saved[1]))))).max()
    assert ratio <= 1.6 * (1 + 1e-9)


# ---- grids ----------------------------------------------------------------------------------------------------------

SCHEDULES = [VPLinear(), VPCosine(), VPCosine(offset=0.0), EDM(), Flow(), Discrete.linear()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{type(s).__name__}{getattr(s, 'offset', '')}")
@pytest.mark.parametrize("end", [0.0, 0.05])
@pytest.mark.parametrize("steps", [1, 2, 6, 9])
def test_times_of_every_schedule(schedule: Schedule, end: float, steps: int) -> None:
    """Both ends exactly; from pure noise (alpha = 0) as well."""
    if end == 0 and steps == 1:
        times = torch.tensor([schedule.t_max, 0.0], dtype=F64)
    else:
        times = UniformLambda(end=end)(schedule, steps)
    for sampler in (DPMSolver(3), UniPC(2)):
        tuned = OptimizedSteps(restarts=0, starts=("lambda",)).tune(task(Still(schedule), sampler, times))
        assert tuned.plan is not None and tuned.plan.nfe == steps
        result = tuned.plan.times
        assert result[0] == times[0] and result[-1] == end and bool((result.diff() < 0).all())
        if steps > 2:
            assert tuned.figures["J"] < tuned.figures["J_lambda"]


@pytest.mark.parametrize(
    ("sampler", "objective", "words"),
    [
        (DEIS(), "bound", "objective=local"),
        (DPMSolver(2, multistep=False), "bound", "multistep"),
        (UniPC(3, predict="eps"), "bound", "predict x0"),
        (DDIM(eta=1.0), "local", "deterministic samplers"),
        (DPMSolver(2, sde=True), "bound", "deterministic samplers"),
    ],
)
def test_samplers_that_it_is_not_for(sampler: Any, objective: Any, words: str) -> None:
    times = UniformLambda()(VPLinear(), 5)
    with pytest.raises(BadInput, match=words):
        OptimizedSteps(objective=objective).tune(task(Still(VPLinear()), sampler, times))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "bond"}, "bound, local, trajectory"),
        ({"starts": ("linear",)}, "lambda, uniform"),
        ({"growth": 1.0}, "greater than 1"),
        ({"std": 0.0}, "positive"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        OptimizedSteps(**options)


# ---- our own objectives ---------------------------------------------------------------------------------------------


def error(model: Any, sampler: Any, times: Tensor, x: Tensor, exact: Tensor) -> float:
    table = plan(sampler, model.schedule, times)
    return (table(model, x * model.schedule.prior_std(times[0]), None) - exact).square().mean().sqrt().item()


def fixed(schedule: Schedule, steps: int) -> Iterator[Tensor]:
    grids = (UniformLambda(), UniformTime(), Quadratic(), Karras(), Trailing(), CosineAngle(), CosineAngle(scale=0.5))
    for grid in grids:
        yield grid(schedule, steps)


@pytest.mark.parametrize(("sampler", "steps"), [(UniPC(2), 5), (DPMSolver(3), 8)], ids=["unipc2", "dpm3"])
def test_steps_tuned_on_random_mixtures_are_good_on_others(sampler: Any, steps: int) -> None:
    """Network-free: on M2, which the random mixtures are not, better than the best of seven fixed grids."""
    schedule = Discrete.linear()
    model, x = m2(schedule), torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
    exact = model.ode(x * schedule.prior_std(1.0), 1.0, rtol=1e-8, atol=1e-9)
    tuner = OptimizedSteps(objective="local", iterations=16)
    tuned = tuner.tune(task(Still(schedule), sampler, UniformLambda()(schedule, steps)))
    assert tuned.plan is not None
    best = min(error(model, sampler, times, x, exact) for times in fixed(schedule, steps))
    assert error(model, sampler, tuned.plan.times, x, exact) < 0.9 * best


def test_local_serves_any_deterministic_sampler() -> None:
    for sampler, schedule in ((Heun(), EDM()), (DEIS(), Flow())):
        times = UniformLambda()(schedule, 4)
        with torch.no_grad():
            tuned = OptimizedSteps("local", iterations=4, starts=("lambda", "narrow_angle")).tune(
                task(Still(schedule), sampler, times)
            )
        assert tuned.plan is not None and tuned.plan.nfe == sampler.nfe(4)
        assert tuned.figures["error"] < min(v for k, v in tuned.figures.items() if k.startswith("error_"))


def test_std_is_that_of_the_images() -> None:
    def images(n: int) -> tuple[Tensor, None]:
        return 0.3 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0)), None

    times = UniformLambda()(VPLinear(), 4)
    tuner = OptimizedSteps(objective="local", iterations=1, starts=ONE)
    inputs = tuner.tune(task(Still(VPLinear()), UniPC(2), times, images=images))
    assert inputs.figures["std"] == pytest.approx(0.3, abs=0.02)
    assert tuner.tune(task(Still(VPLinear()), UniPC(2), times)).figures["std"] == 0.5


def test_steps_tuned_on_the_models_own_trajectories() -> None:
    """On noises that were not used, less than half the error of the times given, and progress to the end."""
    schedule = VPCosine(offset=0.0)
    model, sampler, record = m2(schedule), UniPC(2), []
    times = UniformLambda()(schedule, 5)
    inputs = task(model, sampler, times, n=48, tick=lambda *what: record.append(what))
    tuned = OptimizedSteps(objective="trajectory", iterations=8, searches=2, chunk=48, starts=ONE).tune(inputs)
    assert tuned.plan is not None
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 2)))
    exact = model.ode(x * schedule.prior_std(1.0), 1.0, rtol=1e-8, atol=1e-9)
    assert error(model, sampler, tuned.plan.times, x, exact) < 0.5 * error(model, sampler, times, x, exact)
    assert tuned.figures["held_out"] < tuned.figures["held_out_given"]
    kinds = list(dict.fromkeys(what for what, *_ in record))
    assert kinds == ["fine trajectory", "starts", "trajectory"]
    for kind in kinds:
        done = [(done, total) for what, done, total, _ in record if what == kind]
        assert done[-1][0] == done[-1][1] and all(a[0] <= b[0] for a, b in pairwise(done))


class Small(nn.Module):
    """A network with classes that knows its time."""

    null_label = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 4))
        self.label = nn.Embedding(4, 3)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return self.body(torch.cat([x, self.label(label), time[:, None]], 1))


def test_gradients_go_through_the_network() -> None:
    """float32, labels, several chunks; the weights collect no gradient."""
    denoiser = Denoiser(Small(), VPCosine(offset=0.0), "v")
    times = UniformTime()(denoiser.schedule, 4)
    inputs = task(denoiser, UniPC(2), times, shape=(4,), n=12, labels=lambda n: torch.arange(n) % 3)
    tuned = OptimizedSteps(objective="trajectory", iterations=6, chunk=5, fine=20, starts=ONE).tune(inputs)
    assert tuned.figures["held_out"] < tuned.figures["held_out_given"]
    assert all(p.grad is None for p in denoiser.parameters())


class Louder(Wrapper):
    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        return 1.01 * self.denoiser(x_t, t, **cond)


# ---- what is remembered ---------------------------------------------------------------------------------------------


def test_the_cache_returns_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Flow()
    times = UniformLambda()(schedule, 5)
    small = {"iterations": 1, "starts": ONE, "fine": 16}
    still, model = task(Still(schedule), UniPC(3), times), task(m2(schedule), UniPC(3), times, n=4, identity="m2")
    cases = [(OptimizedSteps(), still), (OptimizedSteps("local", **small), still)]
    cases += [(OptimizedSteps("trajectory", **small), model)]
    first = [tuner.tune(inputs) for tuner, inputs in cases]

    def fail(*_: Any) -> Any:
        raise AssertionError("solved again")

    monkeypatch.setattr(OptimizedSteps, "_solve", fail)
    for (tuner, inputs), before in zip(cases, first):
        again = tuner.tune(inputs)
        assert again.plan is not None and before.plan is not None
        assert torch.equal(again.plan.times, before.plan.times) and again.figures == before.figures
        assert again.plan.to_json() == before.plan.to_json()
    # what the result depends on: another schedule, sampler, number of steps, option
    for other in (
        (OptimizedSteps(p=2), task(Still(schedule), UniPC(3), times)),
        (OptimizedSteps(), task(Still(Flow(shift=2.0)), UniPC(3), times)),
        (OptimizedSteps(), task(Still(schedule), UniPC(2), times)),
        (OptimizedSteps(), task(Still(schedule), UniPC(3), UniformLambda()(schedule, 6))),
        # other answers of the same weights, as under a guide; a model that cannot be told from another
        (cases[2][0], task(Louder(m2(schedule)), UniPC(3), times, n=4, identity="m2")),
        (cases[2][0], task(m2(schedule), UniPC(3), times, n=4)),
    ):
        with pytest.raises(AssertionError, match="solved again"):
            other[0].tune(other[1])


def test_a_plan_of_one_step_has_no_free_node() -> None:
    times = torch.tensor([1.0, 0.0], dtype=F64)
    tuned = OptimizedSteps("local").tune(task(Still(VPLinear()), UniPC(2), times))
    assert tuned.plan is not None and torch.equal(tuned.plan.times, times)
