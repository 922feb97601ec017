"""Picard iteration gives what the sequential sampler gives, in few rounds; every sample at its own pace."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.denoiser import Wrapper
from hasten.errors import BadInput, HastenError
from hasten.exact import m2
from hasten.pick import format_spec
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers import DDIM, DDPM
from hasten.samplers.picard import Picard, _variances
from hasten.sampling import Count, Noise, walk
from hasten.schedules import Discrete, VPLinear
from tests.samplers.problems import ALL, F64, ends, mixture

over_schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))
FORMS = [Picard(), Picard(form="recursion"), Picard(form="recursion", data_std=0.0)]
over_forms = pytest.mark.parametrize("sampler", FORMS, ids=["paper", "recursion", "frozen"])


def problem(name: str = "M2") -> tuple[Any, Tensor, Tensor]:
    """A mixture on the linear table, 100 steps uniform in lam and then 0, 32 starts."""
    schedule = Discrete.linear(convention="log_q")
    model = mixture(name, schedule)
    high, low = (schedule.lam(t).item() for t in (1.0, 1e-3))
    times = torch.cat([schedule.time(torch.linspace(high, low, 100, dtype=F64)), torch.zeros(1, dtype=F64)])
    times[0] = 1.0
    start = np.random.default_rng(0).standard_normal((256, len(model.means[0])))[:32]
    return model, torch.from_numpy(start), times


def test_rounds_converge_as_published() -> None:
    """The largest error at the end after 1, 5, 10, 15, 20 rounds: 2.1, 8e-2, 8e-5, 1.7e-9, 2e-15."""
    model, x, times = problem()
    sequential = walk(DDIM(), model, x, times)
    for rounds, expected in ((1, 2.1), (5, 8.3e-2), (10, 8.3e-5), (15, 1.7e-9)):
        counted = Count(model)
        z = walk(Picard(tolerance=0.0, rounds=rounds), counted, x, times)
        assert (z - sequential).abs().max().item() == pytest.approx(expected, rel=0.1)
        assert counted.calls == rounds
    assert (walk(Picard(tolerance=0.0, rounds=20), model, x, times) - sequential).abs().max() < 1e-13


def test_what_an_answer_is_taken_to_follow_counts() -> None:
    """After 10 rounds: with ddim, answers that do not move are worse than the paper's form, and those that move as a
    Gaussian's with s = 1 do are the same; with ddpm, s = .5 is right to .01 where the paper's form is off by more
    than 100."""
    model, x, times = problem()

    def error(base: str, **options: Any) -> float:
        ours = Picard(base, tolerance=0.0, rounds=10, **options)
        pair = [
            walk(sampler, model, x, times, Noise(range(32), (2,), dtype=F64).draw) for sampler in (ours, ours.sampler)
        ]
        return (pair[0] - pair[1]).abs().max().item()

    paper, frozen, unit = error("ddim"), *(error("ddim", form="recursion", data_std=s) for s in (0.0, 1.0))
    assert frozen > 100 * paper and unit == pytest.approx(paper, rel=0.5)
    assert error("ddpm") > 10 and error("ddpm", form="recursion") < 0.02


@over_forms
@over_schedules
def test_without_tolerance_it_is_the_sequential_sampler(schedule: Any, sampler: Picard) -> None:
    """From end to end of every schedule, within as many rounds as there are steps, noise or not, any window."""
    model, times = mixture("M2", schedule), ends(schedule, 9)
    for options in ({}, {"eta": 0.5}, {"base": "ddpm"}, {"window": 4, "eta": 1.0}):
        ours = replace(sampler, tolerance=0.0, **options)
        counted = Count(model)
        z = draw(counted, ours, times, Noise(range(3), (2,), dtype=F64))
        sequential = draw(model, ours.sampler, times, Noise(range(3), (2,), dtype=F64))
        torch.testing.assert_close(z, sequential, rtol=1e-12, atol=1e-11)
        assert counted.calls <= 9


@over_forms
def test_a_window_of_one_is_the_sequential_sampler(sampler: Picard) -> None:
    model, x, times = problem()
    counted = Count(model)
    z = walk(replace(sampler, window=1), counted, x, times)
    torch.testing.assert_close(z, walk(DDIM(), model, x, times), rtol=1e-12, atol=1e-12)
    assert counted.calls == 100 and counted.rows == 3200


@over_forms
@pytest.mark.parametrize("window", [None, 20])
def test_the_error_falls_with_the_tolerance(sampler: Picard, window: int | None) -> None:
    model, x, times = problem()
    sequential, found = walk(DDIM(), model, x, times), []
    for tolerance in (0.3, 0.01, 1e-4):
        counted = Count(model)
        z = walk(replace(sampler, window=window, tolerance=tolerance), counted, x, times)
        found.append(((z - sequential).square().mean().sqrt().item(), counted.calls, counted.rows / 32))
    assert all(a[0] > 3 * b[0] and a[1] < b[1] and a[2] < b[2] for a, b in zip(found, found[1:])), found
    assert found[-1][0] < 1e-3 and found[-1][1] < 30, found  # in less than a third of the 100 sequential rounds
    assert all(evaluations > 100 for _, _, evaluations in found), found


def test_a_smaller_window_saves_evaluations() -> None:
    """At the paper's tolerance, 100 steps: 9 rounds and 309 evaluations a sample with all, 10 and 169 with 20."""
    model, x, times = problem()
    costs = []
    for window in (None, 20):
        counted = Count(model)
        walk(Picard(window=window), counted, x, times)
        costs.append((counted.calls, round(counted.rows / 32)))
    assert costs == [(9, 309), (10, 169)]


@over_forms
def test_a_sample_keeps_its_own_pace(sampler: Picard) -> None:
    """Rows that have settled are not asked about, conditions follow the rows, and company changes nothing."""
    labels = torch.tensor([4, 0, 3, 1, 5, 2])
    seen: list[tuple[list[int], Tensor]] = []

    class Watched(Wrapper):
        def forward(self, x_t: Tensor, t: Any, label: Tensor | None = None, **cond: Any) -> Tensor:
            assert label is not None and len(label) == len(x_t) == len(t)
            seen.append((label.tolist(), t))
            return self.denoiser(x_t, t, label=label)

    schedule = ALL["VPCosine0"]
    model, times = Watched(m2(schedule, labels=range(6))), ends(schedule, 40)
    ours = replace(sampler, eta=0.5, window=12, tolerance=0.03)
    batch = draw(model, ours, times, Noise(range(6), (2,), dtype=F64), label=labels)
    assert len(seen[0][0]) == 12 * 6 and seen[0][0] == 12 * labels.tolist()  # all samples at a place of the window
    torch.testing.assert_close(seen[0][1], times[:12].repeat_interleave(6))
    asked = {k: sum(rows.count(k) for rows, _ in seen) for k in labels.tolist()}
    assert len(set(asked.values())) > 1
    for k, label in enumerate(labels.tolist()):
        seen.clear()
        alone = draw(model, ours, times, Noise([k], (2,), dtype=F64), label=labels[k : k + 1])
        torch.testing.assert_close(batch[k], alone[0], rtol=1e-11, atol=1e-11)
        assert sum(len(rows) for rows, _ in seen) == asked[label]


def test_the_variance_is_that_of_ddpm() -> None:
    schedule = VPLinear()
    V = _variances(schedule, ends(schedule, 6))
    torch.testing.assert_close(V[1:-1], torch.diagonal(plan(DDPM(), schedule, ends(schedule, 6)).C) ** 2)
    assert V[0] == V[-1] == 0
    assert _variances(ALL["Flow"], ends(ALL["Flow"], 4))[1] == pytest.approx(0.75**2)  # from alpha = 0


@over_schedules
def test_the_base_is_a_table_of_single_steps(schedule: Any) -> None:
    """What it reads off the base: no step uses an earlier state, answer or draw."""
    for sampler in (DDIM(), DDIM(eta=0.3), DDPM()):
        table = plan(sampler, schedule, ends(schedule, 7))
        assert table.nfe == 7 and not table.A.any() and not torch.tril(table.B, -1).any()
        assert (table.C != 0).sum(0).max() <= 1 if table.C.shape[1] else True


def test_images_keep_their_dtype() -> None:
    z = draw(mixture("M2", ALL["EDM"]), Picard(window=6), ends(ALL["EDM"], 12), Noise([0, 1], (2,)))
    assert z.dtype == torch.float32 and bool(torch.isfinite(z).all())


def test_it_says_why_it_is_not_a_table() -> None:
    with pytest.raises(HastenError, match="picard cannot be compiled to a plan: the number of evaluations of a step"):
        plan(Picard(), VPLinear(), ends(VPLinear(), 4))
    assert Picard().nfe(10) is None
    assert format_spec(Picard("ddpm", window=20, form="recursion")) == "picard:base=ddpm,window=20,form=recursion"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"base": "ddmp"}, "did you mean"),
        ({"form": "papr"}, "did you mean 'paper'"),
        ({"base": "ddpm", "eta": 1.0}, "eta belongs to ddim"),
        ({"eta": 2.0}, r"\[0, 1\]"),
        ({"window": 0}, "1 or more"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
    ],
)
def test_bad_options(options: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        Picard(**options)
