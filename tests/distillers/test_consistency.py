"""Consistency models: the boundary, the curricula, the solvers' order on a Gaussian, and what is learnt."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.distillers._consistency import (
    doubling_count,
    ect_lower,
    euler_step,
    grid_levels,
    heun_step,
    lognormal_probabilities,
    pair_distance,
    root_count,
    root_momentum,
)
from hasten.distillers._ema_target import EMATarget, StepCounter
from hasten.distillers._targets import noised
from hasten.distillers.consistency import Consistency, anchored, same_dropout
from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.pick import pick
from hasten.predictions import X0, Anchored
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from tests.distillers import _toy as toy
from tests.distillers.test_tract import assert_resumes_exactly

F64 = torch.float64
SCHEDULES = [VPCosine(offset=0.0), VPCosine(), VPLinear(), Flow(), EDM()]


# ---- the boundary ----


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("prediction", ["v", "flow", "edm", "eps", "x0"])
def test_at_the_clean_end_the_student_returns_its_input(prediction: str, schedule: Schedule) -> None:
    """f(x, 0) == x to the last bit, for random weights and every prediction."""
    torch.manual_seed(0)
    student = anchored(Denoiser(toy.Small(), schedule, prediction))
    x = torch.randn(64, 2)
    for t in (torch.zeros((), dtype=F64), torch.zeros(64, dtype=F64)):
        assert torch.equal(student(x, t, label=torch.zeros(64, dtype=torch.long)), x)
    away = student(x, torch.full((64,), 0.5, dtype=F64))
    assert not torch.allclose(away, x, atol=0.1)


def test_an_anchored_network_keeps_what_it_said() -> None:
    """Weights of an x0 network mean the same above the anchor's width; its output and its target are inverses."""
    schedule = VPCosine(offset=0.0)
    plain = Denoiser(toy.Small(), schedule, "x0")
    student = anchored(plain)
    assert isinstance(plain.prediction, X0) and isinstance(student.prediction, Anchored) and student.net is plain.net
    z, t = torch.randn(3, 2, dtype=F64), torch.tensor([0.2, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(student(z, t), plain(z, t), rtol=0, atol=2e-3)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x, eps = torch.randn(2, 3, 2, dtype=F64)
    _, c_skip, c_out = Anchored(0.3).coefficients(alpha, sigma)
    raw = Anchored(0.3).target(x, eps, alpha, sigma)
    seen = alpha[:, None] * x + sigma[:, None] * eps
    torch.testing.assert_close(c_skip[:, None] * seen + c_out[:, None] * raw, x)
    v = toy.toy()
    assert anchored(v) is v


# ---- grids, curricula ----


def test_the_pairs_lie_on_the_grid_of_karras() -> None:
    """(eps^(1/7) + (i - 1)/(N - 1) (80^(1/7) - eps^(1/7)))^7, rising, and the clean end below."""
    times, levels = grid_levels("karras", EDM(), 18)
    u = torch.arange(18, dtype=F64) / 17
    wanted = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    torch.testing.assert_close(levels[1:], wanted, rtol=1e-9, atol=0)
    assert float(levels[0]) == 0 and float(times[0]) == 0 and float(times[-1]) == 1
    for law in ("karras", "angle"):
        times, levels = grid_levels(law, VPCosine(offset=0.0), 10)
        assert float(times[-1]) == 1.0 and float(levels[-1]) == 150 and bool((levels.diff() > 0).all())


def test_curricula() -> None:
    K = 800_000
    assert [root_count(k / K, 2, 150) for k in (0, K // 8, K // 2, K)] == [2, 54, 107, 151]
    assert root_momentum(2, 2, 0.9) == pytest.approx(0.9) and root_momentum(151, 2, 0.9) == pytest.approx(
        0.9 ** (2 / 151)
    )
    K = 400_000
    counts = [doubling_count(k, K, 10, 1280) for k in range(0, K, 50_000)]
    assert counts == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert doubling_count(49_999, K, 10, 1280) == 11 and doubling_count(K - 1, K, 10, 1280) == 1281
    assert doubling_count(5, 6, 10, 1280) == 321  # a run shorter than the number of doublings
    q = torch.tensor([0.1, 1.0, math.log(7), 10.0], dtype=F64)
    first = ect_lower(q, 0)
    assert first[:3].abs().max() < 1e-12 and 0 < float(first[3]) < 10
    assert float(ect_lower(q, 9)[1]) == pytest.approx(1 - (1 + 8 / (1 + math.e)) / 1024)
    method = Consistency(mode="training", curriculum="root", first=2, nodes=150, momentum=0.9)
    assert method.momentum_at(0, 100) == pytest.approx(0.9) and method.node_count(99, 100) == 151


def test_lognormal_shares() -> None:
    """Over 1281 nodes: they sum to 1, and 71 % of the pairs lie below a level of 1."""
    u = torch.linspace(0, 1, 1281, dtype=F64)
    levels = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    shares = lognormal_probabilities(levels, -1.1, 2.0)
    assert len(shares) == 1280 and float(shares.sum()) == pytest.approx(1, abs=1e-12) and bool((shares > 0).all())
    assert float(shares[levels[1:] < 1].sum()) == pytest.approx(0.71, abs=0.005)
    assert torch.isfinite(lognormal_probabilities(grid_levels("karras", VPCosine(offset=0.0), 30)[1], -1.1, 2.0)).all()


def test_distances() -> None:
    a, b = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    norm, c = (a - b).flatten(1).norm(dim=1), 0.03 * math.sqrt(48)
    torch.testing.assert_close(pair_distance(a, b, "huber", 0.03), torch.sqrt(norm**2 + c**2) - c)
    torch.testing.assert_close(pair_distance(a, b, "huber", 0.0), norm)
    torch.testing.assert_close(pair_distance(a, b, "l2"), norm**2 / 48)
    torch.testing.assert_close(pair_distance(a, b, "l1"), (a - b).abs().flatten(1).mean(1))
    small = pair_distance(a, a + 1e-6, "huber", 0.03)  # in float32 the difference of the roots would be 0
    torch.testing.assert_close(small, torch.full((5,), 48e-12 / (2 * c)), rtol=0.02, atol=0)


# ---- the order of a pair, on a Gaussian ----

MEAN, STD, EPS = 0.3, 0.6, 0.002


def flowed(y: Tensor, q: Tensor) -> Tensor:
    """The exact consistency function of N(mean, std^2) down to the level EPS."""
    return MEAN + (y - MEAN) * torch.sqrt((EPS**2 + STD**2) / (q**2 + STD**2))[:, None]


def residual(kind: str, count: int) -> float:
    """Root mean square of f(z_t, t) - f(z_s, s) over the pairs of a grid, exact: all is linear in x and eps."""
    schedule = EDM()
    times, levels = (v[1:] for v in grid_levels("karras", schedule, count))
    t, s, q, r = times[1:], times[:-1], levels[1:], levels[:-1]
    if kind == "training":
        square = torch.zeros(count - 1, dtype=F64)
        for x, eps in ((MEAN + STD, 0.0), (MEAN, 1.0)):
            x0, noise = (torch.full((count - 1, 1), v, dtype=F64) for v in (x, eps))
            square += (flowed(noised(schedule, x0, t, noise), q) - flowed(noised(schedule, x0, s, noise), r))[:, 0] ** 2
        return float(square.mean().sqrt())
    teacher = Gaussian(torch.tensor([MEAN]), torch.tensor([STD**2]), schedule)
    z = MEAN + torch.sqrt(STD**2 + q**2)[:, None]
    below = {"euler": euler_step, "heun": heun_step}[kind](teacher, schedule, z, t, s)
    return float((flowed(z, q) - flowed(below, r)).square().mean().sqrt())


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("euler", (0.0107, 0.00258, 0.00063)),
        ("heun", (0.00374, 0.00041, 0.000049)),
        ("training", (0.083, 0.040, 0.020)),
    ],
)
def test_residuals_of_the_exact_consistency_function(kind: str, values: tuple[float, ...]) -> None:
    """At 18, 36 and 72 nodes: they fall by 4 with Euler's step, by 8 with Heun's, by 2 where the noise is shared."""
    for count, value in zip((18, 36, 72), values):
        assert residual(kind, count) == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_heun_at_both_ends(schedule: Schedule) -> None:
    """From pure noise or the noisiest time it is far closer to the flow than Euler's step; into the clean end, equal."""
    exact = Gaussian(torch.tensor([0.3, -0.4]), torch.tensor([0.36, 0.1]), schedule)
    times, _ = grid_levels("angle", schedule, 24)
    z = float(schedule.prior_std(times[-1])) * torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t, s = (times[-k].expand(8) for k in (1, 2))
    off = [(solver(exact, schedule, z, t, s) - exact.endpoint(z, t, s)).norm() for solver in (euler_step, heun_step)]
    assert float(off[1]) < 0.25 * float(off[0])
    t, s = (times[k].expand(8) for k in (1, 0))
    torch.testing.assert_close(heun_step(exact, schedule, z, t, s), euler_step(exact, schedule, z, t, s))


# ---- the loss ----


def test_pairs_of_training_share_their_noise(tmp_path: Path) -> None:
    """The inputs of the student above and of f- below have the same x and eps, at neighbours, all pairs in turn."""
    task = toy.task(tmp_path)
    method = Consistency(mode="training", nodes=6, metric="l2", momentum=0.0)
    evaluated: list[tuple[Tensor, Tensor]] = []

    class Spy(torch.nn.Module):
        schedule, prediction = task.schedule, task.denoiser.prediction

        def forward(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
            evaluated.append((z, t))
            return z

    counter = StepCounter(Spy())  # type: ignore[arg-type]
    torch.manual_seed(0)
    batch = task.batches[0]
    method.loss_fn(task, counter)(batch)
    (z, t), (below, s) = evaluated
    times, _ = grid_levels("karras", task.schedule, 6)
    at = [torch.searchsorted(times, v) for v in (t, s)]
    assert torch.equal(at[0], at[1] + 1) and at[0].unique().tolist() == [1, 2, 3, 4, 5, 6]
    eps = [
        (v - task.schedule.alpha(k)[:, None] * batch["x"]) / task.schedule.sigma(k)[:, None].clamp_min(1e-9)
        for v, k in ((z, t), (below, s))
    ]
    inner = s > 0
    torch.testing.assert_close(eps[0][inner], eps[1][inner], rtol=0, atol=1e-3)
    torch.testing.assert_close(below[~inner].float(), batch["x"][~inner])
    assert int(counter.count) == 1


def test_the_exact_function_has_next_to_no_loss(tmp_path: Path) -> None:
    """Distillation from the exact denoiser: the flow to the end is far below a denoiser's own mean in loss."""
    schedule = VPCosine(offset=0.0)
    exact = Gaussian(torch.tensor([0.3, -0.4]), torch.tensor([0.36, 0.1]), schedule)
    task = toy.task(tmp_path, teacher=exact)
    x = {"x": exact.sample(256, torch.Generator().manual_seed(0)).float()}
    losses = []

    class Said(torch.nn.Module):
        prediction = task.denoiser.prediction

        def __init__(self, ends: bool) -> None:
            super().__init__()
            self.ends, self.schedule = ends, schedule

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return exact.endpoint(z, t) if self.ends else exact(z, t)

    for ends in (True, False):
        torch.manual_seed(0)
        losses.append(float(Consistency(nodes=36, metric="l2", momentum=0.0).loss_fn(task, StepCounter(Said(ends)))(x)))  # type: ignore[arg-type]
    assert losses[0] < 1e-5 < 1e-4 < losses[1], losses


def test_the_same_dropout_on_both_sides() -> None:
    drop, x = torch.nn.Dropout(0.5), torch.ones(100)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with same_dropout(5):
        one = drop(x)
    with same_dropout(5):
        two = drop(x)
    assert torch.equal(one, two) and torch.equal(state, torch.get_rng_state())
    with same_dropout(None):
        assert not torch.equal(one, drop(x))


# ---- training ----


@pytest.mark.parametrize(
    "method",
    [
        Consistency("training", "doubling", 16, 2, levels="lognormal", weight="gap", momentum=0.0),
        Consistency(momentum=0.5, nodes=8),
    ],
    ids=["doubling", "momentum"],
)
def test_a_stopped_run_ends_as_an_undisturbed_one(method: Consistency, tmp_path: Path) -> None:
    assert_resumes_exactly(method, tmp_path)


@pytest.mark.parametrize(
    ("method", "bars"),
    [
        (Consistency(), {1: 0.02, 2: 0.006}),
        (Consistency("training", "doubling", 80, weight="gap", levels="lognormal", momentum=0.0), {2: 0.02}),
    ],
    ids=["distillation", "training"],
)
def test_the_student_is_far_better_than_its_teacher_at_its_steps(
    method: Consistency, bars: dict[int, float], tmp_path: Path
) -> None:
    saved: list[str] = []
    student = method.distill(toy.task(tmp_path, 250, save_student=lambda name, result: saved.append(name)))
    assert saved == ["consistency"] and student.steps == 2
    assert student.guidance == ((1.0, 1.0) if method.mode == "training" else None)
    true = toy.truth(2000)
    teacher = dataclasses.replace(student, denoiser=toy.toy(), sampler="ddim", times="trailing")
    for steps, bar in bars.items():
        distance, plain = (toy.energy(toy.sample(s, steps=steps), true) for s in (student, teacher))
        assert distance < bar < plain / 1.5, (steps, distance, plain)


@pytest.mark.parametrize("curriculum", ["root", "ect"])
def test_other_curricula_run(curriculum: str, tmp_path: Path) -> None:
    """A few steps, and the weights are finite and have moved; a dry run has no number of steps."""
    method = Consistency("training", curriculum, 8, 2, momentum=0.9 if curriculum == "root" else 0.0)
    student = method.distill(toy.task(tmp_path, 5)).denoiser.net.out.weight
    assert bool(torch.isfinite(student).all()) and not torch.equal(student, toy.toy().net.out.weight)
    task = toy.task(tmp_path, {})
    assert torch.isfinite(method.loss_fn(task, EMATarget(task.student()))(task.batches[0]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("consistency", Consistency()),
        ("consistency:nodes=40,momentum=.95", Consistency(nodes=40, momentum=0.95)),
        (
            "consistency:mode=training,curriculum=doubling,nodes=1280,weight=gap,levels=lognormal,momentum=0",
            Consistency("training", "doubling", 1280, 10, weight="gap", levels="lognormal", momentum=0.0),
        ),
        (
            "consistency:mode=training,curriculum=ect,weight=gap,momentum=0",
            Consistency("training", "ect", weight="gap", momentum=0.0),
        ),
    ],
)
def test_as_it_is_spelled(text: str, wanted: Consistency) -> None:
    assert pick("distillers", text) == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "destillation"}, "distillation"),
        ({"metric": "hubert"}, "huber"),
        ({"curriculum": "ect"}, "mode=training"),
        ({"curriculum": "doubling", "first": 20}, "first=20"),
        ({"momentum": 1.0}, "momentum"),
        ({"grid": "karas"}, "karras"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Consistency(**options)
