"""Fitting a plan: its rows stay consistent whatever its numbers, and the numbers come to fit the model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.exact import g8, m2
from hasten.nets.unet import UNet
from hasten.plan import Plan, plan
from hasten.plan.draw import draw
from hasten.predictions import V
from hasten.samplers import DDIM, DDPM, DEIS, PLMS, DPMSolver, Heun, UniPC
from hasten.sampling import Noise
from hasten.schedules import EDM, Discrete, Flow, Schedule, VPCosine, VPLinear
from hasten.times import UniformLambda, UniformTime
from hasten.tuning import TuningTask
from hasten.tuning._finish import fit_last_row, image_statistics
from hasten.tuning._fit import PlanFit
from hasten.tuning._reference import fine_trajectories
from hasten.tuning._rows import PlanParametrization, difference_grams, run_plan
from hasten.tuning._sweep import fit_rows
from hasten.tuning.fitted_plan import FittedPlan

F64 = torch.float64
SCHEDULES = {
    "VPLinear": VPLinear(),
    "VPCosine0": VPCosine(offset=0.0),
    "Flow": Flow(),
    "EDM": EDM(),
    "Discrete": Discrete.linear(),
}
over_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


def task(model: Any, steps: int, sampler: Any = None, **options: Any) -> TuningTask:
    times = UniformLambda()(model.schedule, steps)
    shape = options.pop("shape", (2,))
    return TuningTask(model, sampler or UniPC(2), times, shape, **{"n": 128, "seed": 1000, **options})


def fitted(model: Any, steps: int, options: dict[str, Any], **about: Any) -> tuple[Plan, dict[str, Any]]:
    tuned = FittedPlan(**{"batch": 256, "fine": 96, **options}).tune(task(model, steps, **about))
    assert tuned.plan is not None
    return tuned.plan, tuned.figures


def assert_consistent(output: Plan, schedule: Schedule, level: Tensor, top: float) -> None:
    """Where every answer is x, state k is alpha(s_k) x + sigma(s_k) eps of the same eps, and the result is x."""
    x, eps = torch.tensor([1.0, -0.7, 0.0], dtype=F64), torch.tensor([0.3, 0.0, 1.0], dtype=F64)
    start = float(schedule.alpha(top)) * x + float(schedule.sigma(top)) * eps
    states, _ = run_plan(output, lambda z, t: x, start)
    for k in range(1, output.nfe + 1):
        expected = schedule.alpha(level[k]) * x + schedule.sigma(level[k]) * eps
        torch.testing.assert_close(states[k], expected, rtol=1e-12, atol=1e-12 * max(1.0, float(schedule.sigma(top))))
    torch.testing.assert_close(
        output(lambda z, t: x, start), x, rtol=0, atol=1e-12 * max(1.0, float(schedule.sigma(top)))
    )


# ---- the rows -----------------------------------------------------------------------------------------------------


@over_schedules
@pytest.mark.parametrize("options", [{}, {"teleport": False}, {"shift": False}, {"answers": 2}])
def test_every_row_is_exact_for_constant_x0_whatever_the_numbers(schedule: Schedule, options: dict[str, Any]) -> None:
    """Sums of the coefficients, to 1e-12, at random numbers; and the step from pure noise and into t = 0 are finite."""
    torch.manual_seed(0)
    top = schedule.t_max
    rows = PlanParametrization(plan(UniPC(3), schedule, UniformLambda()(schedule, 6)), top=top, **options)
    for scale in (0.0, 0.1, 1.0):
        theta = rows.initial + scale * torch.randn(len(rows.initial), dtype=F64)
        theta = torch.minimum(theta.clamp(min=rows.lowest), torch.tensor(rows.highest)) if scale else theta
        output = rows.plan(theta)
        assert_consistent(output, schedule, rows.coefficients(theta).level, top)
        assert output.times[-1] == 0 and output.a[-1] == 0
        if "answers" in options:
            assert not output.B.tril(-2).any()
        if not options.get("teleport", True):
            assert output.times[0] == schedule.t_max and output.start[0] == 1
        if not options.get("shift", True):
            assert torch.equal(output.times[1:], rows.coefficients(theta).level[1:])


@over_schedules
@pytest.mark.parametrize("sampler", [DDIM(), UniPC(3), DPMSolver(2, multistep=False), DEIS(3), PLMS(4, "ramp"), Heun()])
def test_it_begins_as_the_sampler_itself(sampler: Any, schedule: Schedule) -> None:
    """The initial numbers are the base sampler's plan, also where that keeps a history of noise predictions."""
    compiled = plan(sampler, schedule, UniformTime()(schedule, 5))
    rows = PlanParametrization(compiled, teleport=False)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64) * schedule.prior_std(compiled.times[0])
    model = m2(schedule)
    torch.testing.assert_close(rows.plan(rows.initial)(model, x), compiled(model, x), rtol=1e-9, atol=1e-9)


@over_schedules
def test_the_gradient_is_the_difference_quotient(schedule: Schedule) -> None:
    """With respect to every free number, those of coefficients that are 0 included, and after whitening."""
    rows = PlanParametrization(
        plan(UniPC(2), schedule, UniformLambda(start=0.9, low=0.05)(schedule, 4)), top=schedule.t_max
    )
    model = m2(schedule)
    fit = PlanFit(FittedPlan(held_out=2, fine=12, warm=0), task(model, 4, n=6))
    x, _, _ = fit.fine.select(fit.calibration)
    outputs = run_plan(rows.plan(rows.initial), model, x)[1]
    theta = rows.whiten(rows.initial, difference_grams(outputs)) + 0.01
    _, gradient = fit.gradient(rows, theta.clone())
    for k in range(len(theta)):
        step = torch.zeros_like(theta)
        step[k] = 1e-5
        up, down = (fit.loss(rows.plan(theta + s), fit.calibration) for s in (step, -step))
        assert float(gradient[k]) == pytest.approx((up - down) / 2e-5, rel=2e-4, abs=1e-7)


def test_whitening_keeps_the_plan_and_measures_in_states() -> None:
    """One unit of a weight moves the next state by one RMS unit, and no two weights of a row move it alike."""
    model = m2(VPLinear())
    rows = PlanParametrization(plan(UniPC(2), model.schedule, UniformLambda(low=0.02)(model.schedule, 5)))
    x = Noise(range(500), (2,), dtype=F64).initial()
    states, outputs = run_plan(rows.plan(rows.initial), model, x)
    theta = rows.whiten(rows.initial, difference_grams(outputs))
    torch.testing.assert_close(run_plan(rows.plan(theta), model, x)[0][-1], states[-1])
    weights = len(theta) - rows.sizes["D"]
    moved = []
    for k in range(3):  # the three weights of row 3, after 1 of row 1 and 2 of row 2
        step = theta.clone()
        step[weights + 3 + k] += 1e-3
        moved.append(((run_plan(rows.plan(step), model, x)[0][4] - states[4]) / 1e-3).flatten())
    gram = torch.stack(moved) @ torch.stack(moved).T / x.numel()
    torch.testing.assert_close(gram[:2, :2], torch.eye(2, dtype=F64), rtol=0, atol=5e-2)
    # answers that are almost collinear are measured less finely, so that their numbers stay small
    assert bool((gram.diagonal() < 1.02).all())


def test_fine_trajectories_can_be_read_in_between() -> None:
    model = g8(VPCosine(offset=0.0))
    x = Noise(range(16), (8,), dtype=F64).initial()
    fine = fine_trajectories(
        model, x, {}, start=1.0, low=0.01, end=0.0, steps=64, batch=8, keep=True, tick=lambda *_: None
    )
    for t in (0.98, 0.7, 0.333, 0.05):
        read = fine.at(torch.tensor(t, dtype=F64), slice(0, 16))
        torch.testing.assert_close(read, model.endpoint(x, 1.0, t), rtol=0, atol=2e-4)
    torch.testing.assert_close(fine.end, model.endpoint(x, 1.0), rtol=0, atol=3e-3)


def test_least_squares_rows_are_the_least_squares() -> None:
    """With the answers of the rows before it, no other weights of sum 1 bring the next state closer."""
    model = m2(VPLinear())
    fit = PlanFit(FittedPlan(gradient="frozen", held_out=8, fine=48), task(model, 4, n=64))
    rows = fit.rows(plan(UniPC(2), model.schedule, UniformLambda(start=0.9, low=0.02)(model.schedule, 4)))
    numbers, result = fit_rows(rows, rows.coefficients(rows.initial), fit.fine, fit.calibration, model, 64, 0.0)
    output = rows.compose(numbers)
    start, end, _ = fit.fine.select(fit.calibration)
    torch.testing.assert_close(run_plan(output, model, start)[0][-1], result)
    for k in range(1, 4):
        aim = end if k == 3 else fit.fine.at(numbers.level[k + 1], fit.calibration)
        best = (run_plan(output, model, start)[0][k + 1] - aim).square().mean()
        for j, sign in itertools.product(range(k), (1, -1)):
            D = numbers.D.clone()
            D[k, j] += sign * 1e-3
            other = rows.compose(numbers._replace(D=D))
            assert (run_plan(other, model, start)[0][k + 1] - aim).square().mean() > best


def test_rows_in_a_basis_are_exact_for_constant_x0_and_least_squares() -> None:
    """Coefficients for each group of directions: rows stay exact, groups are apart, and each is fitted by itself."""
    model = m2(VPLinear())
    fit = PlanFit(FittedPlan(held_out=8, fine=48, directions=2), task(model, 4, n=64))
    assert fit.basis is not None and fit.basis.groups == 2 and not fit.basis._centred
    compiled = plan(UniPC(2), model.schedule, UniformLambda(start=0.9, low=0.02)(model.schedule, 4))
    rows, plain = fit.rows(compiled), PlanParametrization(compiled, top=1.0)
    start = fit.fine.select(fit.calibration)[0]
    torch.testing.assert_close(rows.plan(rows.initial)(model, start), plain.plan(plain.initial)(model, start))
    theta = rows.initial + 0.1 * torch.randn(len(rows.initial), generator=torch.Generator().manual_seed(0), dtype=F64)
    x = torch.tensor([[1.0, -0.7]], dtype=F64)
    torch.testing.assert_close(rows.plan(theta)(lambda z, t: x, x), x, rtol=0, atol=1e-12)
    states, outputs = run_plan(rows.plan(theta), model, start)
    torch.testing.assert_close(rows.plan(theta)(model, start), states[-1])
    whitened = rows.whiten(theta, difference_grams(outputs, fit.basis))
    torch.testing.assert_close(run_plan(rows.plan(whitened), model, start)[0][-1], states[-1])
    numbers, result = fit.least_squares(rows, rows.coefficients(rows.initial))
    torch.testing.assert_close(run_plan(rows.compose(numbers), model, start)[0][-1], result)
    n, end = fit.calibration.stop, fit.fine.end[fit.calibration]

    def last_row(D: Tensor) -> float:
        return float((run_plan(rows.compose(numbers._replace(D=D)), model, start)[0][-1] - end).square().sum()) / n

    for j, g, sign in itertools.product(range(3), range(2), (1, -1)):
        D = numbers.D.clone()
        D[3, j, g] += sign * 1e-3
        assert last_row(D) > last_row(numbers.D) - 1e-9
    assert Plan.from_json(rows.compose(numbers).to_json()).basis == fit.basis


# ---- the fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["network", "frozen"])
def test_a_gaussian_is_solved(gradient: str) -> None:
    """G8 has a closed form: with 5 evaluations the fitted plan is 30 times closer to it than its sampler, on the
    samples it was fitted on and, since every eigen-direction has its own exact factor, on any others."""
    model = g8(VPLinear())
    output, _ = fitted(model, 5, {"gradient": gradient, "held_out": 32}, shape=(8,), n=64)
    x = Noise(range(200), (8,), dtype=F64).initial()
    exact = model.endpoint(x, 1.0)
    plain = draw(model, UniPC(2), UniformLambda()(model.schedule, 5), Noise(range(200), (8,), dtype=F64))
    after, before = ((result - exact).square().mean().sqrt() for result in (output(model, x), plain))
    assert after < before / 30, (float(after), float(before))
    _, variances = output.marginals(model.mean, model.variance, (torch.zeros(8, dtype=F64), torch.ones(8, dtype=F64)))
    torch.testing.assert_close(variances[-1].sqrt(), model.variance.sqrt(), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("gradient", "schedule", "times"),
    [("network", VPLinear(), 8), ("frozen", VPLinear(), 8), ("frozen", VPCosine(offset=0.0), 8), ("frozen", EDM(), 8)],
)
def test_a_mixture_on_other_noises(gradient: str, schedule: Schedule, times: int) -> None:
    """Five evaluations on M2: closer to the true end than the sampler on its grid, by this factor at least; the rows
    are consistent to 1e-12 after the fit, and the plan survives JSON."""
    model = m2(schedule)
    output, figures = fitted(model, 5, {"gradient": gradient, "held_out": 64, "iterations": 40})
    test = Noise(range(128), (2,), dtype=F64)
    exact = model.ode(test.initial() * schedule.prior_std(schedule.t_max), schedule.t_max, rtol=1e-7, atol=1e-8)
    plain = draw(model, UniPC(2), UniformLambda()(schedule, 5), test)
    after, before = (
        (end - exact).square().mean().sqrt() for end in (draw(model, None, None, test, plan=output), plain)
    )
    assert after < before / times, (float(after), float(before))
    assert figures["held_out_rms"] < figures["held_out_rms_of_start"] < figures["held_out_rms_of_sampler"]
    back = Plan.from_json(output.to_json())
    assert back.sampler.startswith("fitted:") and back.to_json() == output.to_json() and back.nfe == 5
    assert torch.equal(draw(model, None, None, test, plan=back), draw(model, None, None, test, plan=output))


def test_rows_are_consistent_after_a_fit() -> None:
    schedule = VPCosine(offset=0.0)
    output, _ = fitted(m2(schedule), 4, {"held_out": 16, "iterations": 10, "fine": 32}, n=32)
    alpha = torch.cat([torch.zeros(1, dtype=F64), schedule.alpha(output.times[1:])])
    # levels from the noise part alone: sigma(s_k) is what is left of the start
    left = torch.cumprod(torch.cat([output.start, output.a]), 0)
    level = schedule.time(0.5 * torch.log1p(-(left**2)) - torch.log(left))
    level[0], level[-1] = 1.0, 0.0
    assert len(alpha) == len(level) and bool((level[1:] < level[:-1]).all())
    assert_consistent(output, schedule, level, 1.0)


def test_the_held_out_samples_stop_it() -> None:
    """Two samples to fit on: the calibration loss falls on and on, the held-out one does not, and the fit stops long
    before its last iteration and gives the best that the held-out samples saw."""
    model, recorded = m2(VPLinear()), []
    options = FittedPlan(held_out=64, iterations=400, check=2, patience=3, fine=32, batch=256, warm=0)
    about = task(model, 6, n=2, tick=lambda what, done, total, value: recorded.append((what, done, value)))
    tuned = options.tune(about)
    plans = [(done, value) for what, done, value in recorded if what == "plan"]
    assert 0 < tuned.figures["iterations"] < 200 and tuned.figures["iterations"] == plans[-1][0]
    # tau is set twice, so that values of the two halves are compared with their own best only
    assert plans[-1][1] > min(value for _, value in plans)
    assert tuned.figures["held_out_rms"] <= tuned.figures["held_out_rms_of_start"] * (1 + 1e-9)
    assert tuned.figures["calibration_rms"] < tuned.figures["held_out_rms"]


@pytest.mark.parametrize("gradient", ["frozen", pytest.param("network", marks=pytest.mark.slow)])
def test_a_small_network(gradient: str) -> None:
    """A random float32 U-Net with classes: closer to its own fine trajectories on noises that were not fitted on; its
    weights and their gradients are left alone."""
    torch.manual_seed(0)
    net = UNet(channels=1, widths=(8, 8), classes=3, embedding=16)
    for p in net.parameters():
        p.data += 0.15 * torch.randn_like(p)
    model = Denoiser(net, VPCosine(offset=0.0), V())
    about = TuningTask(
        model,
        UniPC(2),
        UniformLambda(low=0.05)(model.schedule, 4),
        (1, 8, 8),
        n=12,
        labels=lambda n: torch.arange(n) % 3,
    )
    before = [p.clone() for p in net.parameters()]
    tuned = FittedPlan(
        gradient=gradient, held_out=12, fine=16, iterations=6, warm=1, check=2, batch=8, search="sampler"
    ).tune(about)
    assert tuned.figures["held_out_rms"] < 0.7 * tuned.figures["held_out_rms_of_sampler"]
    assert tuned.plan is not None and not tuned.plan.a.requires_grad
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_the_finish_gives_results_the_contrast_of_real_images() -> None:
    """Answers that are real images ever more blurred: the last row, which took the blurred ones, sharpens them until
    the statistics are mostly right, with coefficients of the same sum; a heavy weight leaves it where it was."""
    torch.manual_seed(0)
    real = (F.avg_pool2d(torch.randn(300, 1, 18, 18), 3, 1) * 1.5).clamp(-1, 1)
    blurred = [real]
    for _ in range(3):
        blurred.append(F.avg_pool2d(F.pad(blurred[-1], (1, 1, 1, 1), mode="replicate"), 3, 1))
    answers = torch.stack(blurred[:0:-1])
    last = torch.tensor([0.0, 0.3, 0.7], dtype=F64)
    free = torch.ones(2, dtype=torch.bool)

    def off(row: Tensor) -> float:
        result = torch.einsum("j,j...->...", row.float(), answers)
        return float((image_statistics(result) - image_statistics(real)).square().sum())

    row = fit_last_row(answers, last, free, real, 0.1)
    assert float(row.sum()) == pytest.approx(1.0, abs=1e-12) and off(row) < off(last) / 10
    torch.testing.assert_close(fit_last_row(answers, last, free, real, 1e9), last, rtol=0, atol=1e-3)


def test_the_finish_keeps_the_plan_consistent() -> None:
    torch.manual_seed(0)
    net = UNet(channels=1, widths=(8, 8), embedding=16)
    model = Denoiser(net, VPCosine(offset=0.0), V())
    real = torch.rand(64, 1, 8, 8) * 2 - 1
    about = TuningTask(
        model, UniPC(2), UniformLambda(low=0.05)(model.schedule, 3), (1, 8, 8), n=4, images=lambda n: (real, None)
    )
    options = {"gradient": "frozen", "held_out": 4, "fine": 8, "iterations": 1, "batch": 250, "search": "sampler"}
    plain, done = (FittedPlan(**options, **more).tune(about).plan for more in ({}, {"finish": 3.0}))
    assert plain is not None and done is not None
    assert torch.equal(plain.B[:-1], done.B[:-1]) and not torch.equal(plain.B[-1], done.B[-1])
    assert float(done.B[-1].sum()) == pytest.approx(1.0, abs=1e-12) and done.begin == plain.begin == 1.0


def test_it_is_never_behind_a_fixed_grid_by_the_figure_that_is_named() -> None:
    """Whatever the fit gives, here after no useful iteration: the best of the fixed grids is kept, by that figure."""
    model = m2(VPLinear())
    about, candidates = task(model, 6, n=32), []
    for figure, quantile in (("mean", None), ("q90", 0.9)):
        options = FittedPlan(figure=figure, held_out=64, fine=24, iterations=1, warm=0, batch=256)
        fit = PlanFit(options, about)
        candidates = candidates or list(options.candidates(fit, about))
        assert len(candidates) > 30 and len({name.split(" ")[0] for name, _ in candidates}) == 5
        tuned = fit.run(candidates, options.baseline(about))
        assert tuned.plan is not None
        squares = (run_plan(tuned.plan, model, fit.fine.start)[0][-1] - fit.fine.end)[32:].square().mean(1)
        value = float((squares.mean() if quantile is None else squares.quantile(quantile)).sqrt())
        assert tuned.figures[f"held_out_{figure}"] == pytest.approx(value)
        starts = fit.starts(candidates[:6], fit.calibration)
        assert value <= min(fit.figure(rows.plan(rows.initial)) for _, rows in starts) + 1e-12


def test_hard_starts_are_half_of_the_calibration_and_weigh_as_the_pool() -> None:
    """Means over the chosen samples are those over the pool; half of them are those with the largest errors."""
    model = m2(VPLinear())
    options = FittedPlan(held_out=8, fine=32, pool=400, batch=512)
    about = task(model, 4, n=40)
    fit, whole = PlanFit(options, about), PlanFit(replace(options, pool=0), replace(about, n=400))
    rows = whole.rows(plan(UniPC(2), model.schedule, about.times))
    squares = (run_plan(rows.plan(rows.initial), model, whole.fine.start)[0][-1] - whole.fine.end).square().mean(1)
    fit.draw_hard_starts(rows)
    chosen = (run_plan(rows.plan(rows.initial), model, fit.fine.start)[0][-1] - fit.fine.end).square().mean(1)[:40]
    assert float(fit.weight.sum()) == pytest.approx(40)
    hardest = squares[:400].sort(descending=True).values[:20]
    torch.testing.assert_close(chosen.sort(descending=True).values[:20], hardest)
    hard = chosen >= hardest[-1]
    torch.testing.assert_close(fit.weight, torch.where(hard, 40 / 400, 380 / 20 * 40 / 400).double())
    torch.testing.assert_close(fit.fine.end[40:], whole.fine.end[400:])


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_evaluations(steps: int) -> None:
    output, figures = fitted(m2(VPLinear()), steps, {"held_out": 16, "fine": 32, "iterations": 10}, n=32)
    assert output.nfe == steps and figures["held_out_rms"] < figures["held_out_rms_of_sampler"]


def test_an_end_above_zero_is_kept() -> None:
    model = m2(VPLinear())
    about = TuningTask(model, UniPC(2), UniformLambda(end=0.2)(model.schedule, 4), (2,), n=32)
    tuned = FittedPlan(held_out=16, fine=48, iterations=20).tune(about)
    assert tuned.plan is not None and tuned.plan.times[-1] == 0.2 and tuned.plan.a[-1] > 0
    assert tuned.figures["held_out_rms"] < 0.5 * tuned.figures["held_out_rms_of_sampler"]


@pytest.mark.parametrize(
    ("options", "sampler", "words"),
    [
        ({"gradient": "frosen"}, UniPC(), "did you mean 'frozen'"),
        ({"held_out": 0}, UniPC(), "at least 1"),
        ({"answers": 0}, UniPC(), "at least 1"),
        ({"finish": 3.0}, UniPC(), "real images"),
        ({"finish": 0.0}, UniPC(), "positive"),
        ({"figure": "q"}, UniPC(), "mean, median or a quantile"),
        ({"search": "al"}, UniPC(), "did you mean 'all'"),
        ({"directions": 2, "finish": 1.0}, UniPC(), "no finish together with directions"),
        ({}, DDPM(), "deterministic"),
    ],
)
def test_bad_input(options: dict[str, Any], sampler: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        FittedPlan(**{"fine": 8, "held_out": 2, **options}).tune(task(m2(VPLinear()), 3, sampler, n=2))
