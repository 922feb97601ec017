"""Adaptive SDE steps: the noise that a rejection leaves behind, the cost, the pace of every sample."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.denoiser import Wrapper
from hasten.errors import BadInput, HastenError
from hasten.exact import g8
from hasten.pick import format_spec
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers.adaptive import AdaptiveSDE, _drift, _Path, _Run, integration_interval
from hasten.sampling import Count, Noise, walk
from hasten.schedules import VPLinear
from tests.samplers.problems import ALL, F64, ends, mixture

over_schedules = pytest.mark.parametrize("schedule", ALL.values(), ids=list(ALL))


class Watched(Wrapper):
    """Counts, for each sample, the questions (`asked`) and those at the time of the one before (`again`). A sample is
    known by its label."""

    def __init__(self, inner: Any, count: int) -> None:
        super().__init__(inner)
        self.asked, self.again, self.last = torch.zeros(count), torch.zeros(count), torch.ones(count, dtype=F64) * 2

    def forward(self, x_t: Tensor, t: Any, label: Tensor | None = None, **cond: Any) -> Tensor:
        assert label is not None and len(label) == len(x_t)
        t = torch.as_tensor(t).expand(len(x_t))
        self.asked[label] += 1
        self.again[label] += (self.last[label] == t).float()
        self.last[label] = t
        return self.denoiser(x_t, t)


@cache
def run(sampler: AdaptiveSDE, n: int) -> tuple[Tensor, float, float]:
    """Relative variance errors (8,) on G8 from VPLinear's t = 1 to .001, NFE and the trials a sample."""
    model, g = g8(VPLinear()), torch.Generator().manual_seed(0)
    watched = Watched(model, n)

    def noise() -> Tensor:
        return torch.randn(n, 8, generator=g, dtype=F64)

    times = torch.tensor([1.0, 1e-3, 0.0], dtype=F64)
    z = walk(sampler, watched, noise(), times, noise, label=torch.arange(n))
    nfe = watched.asked.mean().item()
    # after an accepted step the next answer is asked for where the trial's last one was
    trials = nfe - watched.again.mean().item() - 1
    if sampler.retry == "bridge" and sampler.e_rel < 1:
        assert ((z.mean(0) - model.mean) / model.variance.sqrt()).abs().max() < 4 / math.sqrt(n)
    return z.var(0) / model.variance - 1, nfe, trials


@pytest.mark.parametrize(("e_rel", "published"), [(0.02, 373), (0.05, 219), (0.1, 131)])
def test_variance_and_cost_on_a_gaussian(e_rel: float, published: int) -> None:
    """With the bridge the variance errs by less than 4 % on average (sampling error 2.6 % a dimension) at two
    evaluations a trial of 373, 219, 131; keeping the first answer makes that 307, 182, 110."""
    errors, nfe, trials = run(AdaptiveSDE(e_rel), 3000)
    assert errors.abs().mean() < 0.04 and errors.mean().abs() < 0.03, errors
    assert 2 * trials == pytest.approx(published, rel=0.05)
    assert nfe < 0.87 * published


def test_a_finer_tolerance_costs_more_and_errs_less() -> None:
    coarse, nfe, _ = run(AdaptiveSDE(2.0, e_abs=0.3), 3000)
    assert nfe < 30 and coarse.abs().mean() > 0.08
    assert run(AdaptiveSDE(0.1), 3000)[0].abs().mean() < 0.04
    costs = [2 * run(AdaptiveSDE(0.01), 200)[2], *(2 * run(AdaptiveSDE(e), 3000)[2] for e in (0.02, 0.05, 0.1)), nfe]
    assert costs == sorted(costs, reverse=True) and costs[0] == pytest.approx(459, rel=0.05)


def test_redrawn_noise_inflates_the_variance() -> None:
    """A redraw prefers small increments where a trial began large: several percent of the variance; the bridge has
    none of it."""
    redrawn, bridged = (run(AdaptiveSDE(0.1, retry=retry), 3000)[0] for retry in ("redraw", "bridge"))
    assert redrawn.mean() > 0.06 and redrawn.max() < 0.3, redrawn
    assert redrawn.mean() > bridged.mean() + 0.06


def test_the_path_is_brownian_motion() -> None:
    """Increments over whatever pieces, revealed in whatever order, have the covariance min(s, t); no draw is lost."""
    n, g = 20000, torch.Generator().manual_seed(1)
    path = _Path(torch.zeros(n, 1, dtype=F64), lambda: torch.randn(n, 1, generator=g, dtype=F64), store=True)
    rows = torch.arange(n)

    def reveal(h: float) -> Tensor:
        return path.reveal(rows, torch.full((n,), h, dtype=F64))

    seen = {1.0: reveal(1.0), 0.4: reveal(0.4), 0.1: reveal(0.1)}
    torch.testing.assert_close(reveal(0.4), seen[0.4], rtol=0, atol=0)
    path.advance(rows, torch.full((n,), 0.1, dtype=F64))
    torch.testing.assert_close(seen[0.1] + reveal(0.4 - 0.1), seen[0.4], rtol=0, atol=1e-12)
    seen[0.25], seen[1.5] = seen[0.1] + reveal(0.15), seen[0.1] + reveal(1.4)
    at = torch.tensor(sorted(seen), dtype=F64)
    W = torch.cat([seen[t] for t in sorted(seen)], 1)
    torch.testing.assert_close(W.T @ W / n, torch.minimum(at[:, None], at), rtol=0, atol=0.045)


@over_schedules
def test_both_ends_of_every_schedule(schedule: Any) -> None:
    """On every schedule the same process: G8 comes out, at nearly the same cost, from however high it starts."""
    noise, times = Noise(range(200), (8,)), torch.tensor([schedule.t_max, schedule.t_min, 0.0], dtype=F64)
    counted = Count(g8(schedule))
    z = draw(counted, AdaptiveSDE(0.1), times, noise)
    model = counted.denoiser
    assert z.dtype == torch.float32
    assert (z.var(0) / model.variance - 1).abs().mean() < 0.16  # of 8 dimensions, each known to 10 %
    assert ((z.mean(0) - model.mean) / model.variance.sqrt()).abs().max() < 0.25
    assert 85 < counted.rows / 200 < 130


def test_a_schedule_is_only_its_noise_levels() -> None:
    """Between the same levels of sigma / alpha, with the same draws, all schedules give the same image."""
    levels = torch.tensor([30.0, 0.05], dtype=F64)
    results = []
    for schedule in ALL.values():
        times = torch.cat([schedule.time(-levels.log()), torch.zeros(1, dtype=F64)])
        results.append(draw(mixture("M2", schedule), AdaptiveSDE(0.1), times, Noise(range(3), (2,), dtype=F64)))
    for z in results[1:]:
        torch.testing.assert_close(z, results[0], rtol=0, atol=1e-5)


def test_a_grid_that_ends_above_zero_gives_the_state_there() -> None:
    schedule = ALL["EDM"]
    model, times = g8(schedule), torch.stack([torch.tensor(1.0, dtype=F64), schedule.time(-math.log(0.5))])
    z = draw(model, AdaptiveSDE(0.05), times, Noise(range(1500), (8,), dtype=F64))
    assert (z.var(0) / (model.variance + 0.25) - 1).abs().max() < 0.13


def test_where_it_begins_and_stops() -> None:
    schedule = VPLinear()
    for grid, expected in {
        (1.0, 0.5, 0.02, 0.0): (1.0, 0.02),
        (1.0, 0.0): (1.0, 1e-3),
        (5e-4, 0.0): (5e-4, 5e-4),
        (0.9, 0.4): (0.9, 0.4),
    }.items():
        assert tuple(map(float, integration_interval(schedule, torch.tensor(grid, dtype=F64)))) == expected
    # nothing to integrate: the answer itself
    times, x = torch.tensor([5e-4, 0.0], dtype=F64), torch.ones(2, 8, dtype=F64)
    counted = Count(g8(schedule))
    torch.testing.assert_close(walk(AdaptiveSDE(), counted, x, times), counted.denoiser(x, 5e-4))
    assert counted.calls == 1


@pytest.mark.parametrize("retry", ["bridge", "redraw"])
def test_a_sample_keeps_its_own_pace(retry: str) -> None:
    """Alone or among others with other steps and rejections: the same image, for as many evaluations."""
    schedule, n = ALL["VPCosine0"], 6
    sampler = AdaptiveSDE(0.1, retry=retry)
    times = torch.tensor([1.0, 0.01, 0.0], dtype=F64)
    watched = Watched(mixture("M64", schedule), n)
    together = draw(watched, sampler, times, Noise(range(n), (64,), dtype=F64), label=torch.arange(n))
    assert len(watched.asked.unique()) > 1
    for k in (0, 3, 5):
        one = Watched(mixture("M64", schedule), 1)
        alone = draw(one, sampler, times, Noise([k], (64,), dtype=F64), label=torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(together[k], alone[0], rtol=1e-9, atol=1e-9)
        assert one.asked[0] == watched.asked[k] and one.again[0] == watched.again[k]


def test_draws_are_dropped_when_all_have_used_them() -> None:
    drawn = iter(torch.arange(100, dtype=F64)[:, None].expand(100, 3))
    path = _Path(torch.zeros(3, dtype=F64), lambda: next(drawn), store=False)
    one = torch.ones(3, dtype=F64)
    path.reveal(torch.tensor([0, 2]), one[:2])
    assert path.reveal(torch.tensor([0]), one[:1]).item() == 1.0
    assert path.reveal(torch.tensor([0, 1, 2]), one).tolist() == [2.0, 0.0, 1.0]
    assert len(path.draws) == 2 and path.dropped == 1
    path.release(torch.tensor([1]))
    path.reveal(torch.tensor([2]), one[:1])
    assert len(path.draws) == 0 and path.dropped == 3


def test_it_stops_when_the_network_breaks() -> None:
    class Broken(Wrapper):
        def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
            return self.denoiser(x_t, t) * (math.nan if float(torch.as_tensor(t).min()) < 0.5 else 1.0)

    with pytest.raises(HastenError, match="not finite"):
        draw(Broken(g8(VPLinear())), AdaptiveSDE(0.1), ends(VPLinear(), 4), Noise([0], (8,)))


def test_it_says_why_it_is_not_a_table() -> None:
    with pytest.raises(HastenError, match="adaptive cannot be compiled to a plan: the length of its next step follows"):
        plan(AdaptiveSDE(), VPLinear(), ends(VPLinear(), 4))
    assert AdaptiveSDE().nfe(10) is None and format_spec(AdaptiveSDE(0.1)) == "adaptive:e_rel=0.1"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"e_rel": 0.0, "e_abs": 0.0}, "one of them positive"),
        ({"retry": "redrw"}, "did you mean 'redraw'"),
        ({"first_step": 0.0}, "first_step"),
        ({"power": 1.5}, "power"),
    ],
)
def test_bad_options(options: Any, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        AdaptiveSDE(**options)


def test_the_tolerance_of_the_adaptive_step_remembers_the_first_order_state() -> None:
    """2105.14080, algorithm 1: delta = max(e_abs, e_rel max(|x'|, |x'_prev|)), x'_prev the Euler state, not x''."""
    g = torch.Generator().manual_seed(0)
    run = _Run(
        AdaptiveSDE(e_rel=0.5),
        torch.randn(3, 8, generator=g, dtype=F64),
        0.8,
        lambda: torch.randn(3, 8, generator=g, dtype=F64),
    )
    rows, u_end = torch.arange(3), 1e-3

    def drift(x: Tensor, u: Tensor) -> Tensor:
        return _drift(x, 0.3 * x, u)

    run.begin(rows, drift(run.x, run.u), u_end)
    first = run.predicted.clone()
    run.finish(rows, drift(run.predicted, run.u - run.h), u_end)
    assert bool((~run.trying).all()), "the step is accepted"
    assert torch.equal(run.before, first) and not torch.allclose(run.x, first)
