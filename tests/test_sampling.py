"""Noise, the two ways to run a sampler, and what they tell a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Wrapper
from hasten.errors import BadInput, HastenError
from hasten.exact import g8, m2
from hasten.pick import format_spec
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers import DDIM, DDPM, Heun, UniPC
from hasten.sampling import Count, Noise, Query, walk
from hasten.schedules import Flow, VPLinear
from hasten.times import Explicit, Karras, UniformLambda, UniformTime


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_noise_of_a_sample_does_not_depend_on_its_batch(batch: int) -> None:
    shape, seeds = (3, 8, 8), list(range(100, 164))
    whole = Noise(seeds, shape)
    expected = [whole.initial(), whole.draw(), whole(), whole.draw()]
    for start in range(0, 64, batch):
        part = Noise(seeds[start : start + batch], shape)
        found = [part.initial(), part.draw(), part.draw(), part()]
        for e, f in zip(expected, found):
            assert torch.equal(e[start : start + batch], f)


def test_noise_depends_on_seed_and_draw_alone() -> None:
    a, b = Noise([5, 6], (4, 4)), Noise([6, 5], (4, 4))
    first = [b.draw(), b.draw()]  # without asking for the start
    start, later = a.initial(), [a.draw(), a.draw()]
    assert torch.equal(a.initial(), start) and torch.equal(b.initial(), start.flip(0))
    assert all(torch.equal(x.flip(0), y) for x, y in zip(first, later))
    values = torch.stack([start, *later]).flatten(1)
    assert len({tuple(row) for row in values.tolist()}) == 3, "each draw is new"
    g = torch.Generator().manual_seed(5)
    assert torch.equal(start[0], torch.randn(4, 4, generator=g)) and torch.equal(
        later[0][0], torch.randn(4, 4, generator=g)
    )


def test_noise_is_standard_normal_and_cast_after_drawing() -> None:
    noise = Noise(range(400), (3, 16, 16))
    x = torch.stack([noise.initial(), noise.draw()])
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x[0] * x[1]).mean()) < 0.01 and abs((x[0, 1:] * x[0, :-1]).mean()) < 0.01
    double = Noise(range(400), (3, 16, 16), dtype=torch.float64).initial()
    assert double.dtype == torch.float64 and torch.equal(double.float(), x[0])


def test_rows_start_from_the_beginning() -> None:
    noise = Noise(range(10), (5,))
    first = noise.draw()
    part = noise.rows(slice(3, 6))
    assert part.seeds == (3, 4, 5) and len(part) == 3 and torch.equal(part.draw(), first[3:6])
    with pytest.raises(BadInput, match="at least one seed"):
        noise.rows(slice(0, 0))


@dataclass(frozen=True)
class Clipped:
    """DDIM on answers clipped to [-1, 1]: it looks at values, so it has no plan."""

    linear: ClassVar[bool] = False
    order: ClassVar[int] = 1

    def nfe(self, steps: int) -> int:
        return steps

    def steps(self, schedule: Any, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        for t, s in zip(times, times[1:]):
            x0 = (yield Query(x, t)).clamp(-1, 1)
            ratio = schedule.sigma(s) / schedule.sigma(t)
            x = ratio * x + (schedule.alpha(s) - ratio * schedule.alpha(t)) * x0
        return x


class Spy(Wrapper):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.resets, self.seen = 0, []

    def reset(self) -> None:
        self.resets += 1

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.seen.append((t, cond))
        return self.denoiser(x_t, t, **cond)


@pytest.mark.parametrize("sampler", [UniPC(), Clipped()])
def test_a_run_resets_once_asks_as_declared_and_passes_conditions_on(sampler: Any) -> None:
    schedule = VPLinear()
    spy = Spy(m2(schedule, labels=[0, 0, 1, 1, 2, 2]))
    outer = Wrapper(spy)
    ticks: list[tuple[int, int]] = []
    label = torch.tensor([0, 1, 3, 2])
    x = draw(
        outer,
        sampler,
        UniformLambda(),
        Noise(range(4), (2,)),
        steps=6,
        label=label,
        progress=lambda done, total: ticks.append((done, total)),
    )
    assert x.shape == (4, 2) and spy.resets == 1 and len(spy.seen) == 6
    assert ticks == [(k, 6) for k in range(1, 7)]
    for t, cond in spy.seen:
        assert t.shape == () and t.dtype == torch.float64 and cond["label"] is label
    assert [float(t) for t, _ in spy.seen] == UniformLambda()(schedule, 6)[:-1].tolist()


def test_draw_starts_from_the_prior() -> None:
    schedule, times = VPLinear(), UniformTime()(VPLinear(), 5)
    noise = Noise(range(3), (2,), torch.float64)
    model = m2(schedule)
    start = noise.initial() * schedule.prior_std(times[0])
    expected = walk(DDIM(), model, start, times)
    for answer in (
        draw(model, DDIM(), UniformTime(), noise, steps=5),
        draw(model, DDIM(), times, noise),
        draw(model, DDIM(), Explicit(tuple(times.tolist())), noise),
        draw(model, None, times, noise, plan=plan(DDIM(), schedule, times)),
        draw(model, DDIM(), times, noise, x=start),
    ):
        assert (answer - expected).abs().max() < 1e-12
    with pytest.raises(BadInput, match="a sampler or a plan"):
        draw(model, None, times, noise)
    with pytest.raises(BadInput, match="has no schedule"):
        draw(nn.Identity(), DDIM(), times, noise)


@pytest.mark.parametrize("sampler", [DDPM(), Clipped(), UniPC()])
def test_the_same_seed_gives_the_same_sample_in_any_batch(sampler: Any) -> None:
    model, times = m2(VPLinear()), UniformLambda()(VPLinear(), 12)

    def run(seeds: range) -> Tensor:
        return draw(model, sampler, times, Noise(seeds, (2,)))

    whole = run(range(64))
    assert torch.equal(whole, run(range(64)))
    for batch in (1, 7):
        parts = torch.cat([run(range(k, min(k + batch, 64))) for k in range(0, 64, batch)])
        assert (parts - whole).abs().max() < 1e-4


def test_walk_needs_noise_only_where_it_is_drawn() -> None:
    model, times, x = g8(VPLinear()), UniformTime()(VPLinear(), 4), torch.randn(2, 8)
    walk(DDIM(), model, x, times)
    for run in (lambda: walk(DDPM(), model, x, times), lambda: plan(DDPM(), VPLinear(), times)(model, x)):
        with pytest.raises(HastenError, match="draws noise"):
            run()


def test_gradients_are_recorded_where_they_are_wanted() -> None:
    model, times = g8(Flow()), UniformTime()(Flow(), 4)
    x = torch.randn(2, 8, dtype=torch.float64)
    compiled = plan(DDIM(), Flow(), times)
    for run in (lambda x, **k: walk(DDIM(), model, x, times, **k), lambda x, **k: compiled(model, x, **k)):
        assert not run(x).requires_grad
        wanted = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(wanted).sum(), wanted)
        small = 1e-6 * torch.ones_like(x)
        numeric = (run(x + small) - run(x - small)) / 2e-6
        assert (gradient - numeric).abs().max() < 1e-7
        assert not run(wanted, grad=False).requires_grad
        with torch.no_grad():
            assert not run(wanted).requires_grad


def test_count_counts_calls_and_rows() -> None:
    counted = Count(g8(VPLinear()))
    draw(counted, Heun(), UniformTime(), Noise(range(3), (8,)), steps=5)
    assert counted.calls == Heun().nfe(5) == 9 and counted.rows == 27


def test_spell() -> None:
    assert format_spec(Heun()) == "heun" and format_spec(Heun(churn=0.1)) == "heun:churn=0.1"
    assert format_spec(DDPM(variance="large")) == "ddpm:variance=large"
    assert format_spec(UniPC(order=3, corrector=False)) == "unipc:order=3,corrector=false"
    assert (
        format_spec(Karras(rho=5.0)) == "karras:rho=5"
        and format_spec(Explicit((1.0, 0.25, 0.0))) == "explicit:values=(1,0.25,0)"
    )


# ---- queries about some of the samples, about many states at once, and for moments ----------------------------------


class Labelled(nn.Module):
    """x0 = label: an answer tells for whom it was asked."""

    schedule = Flow()

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor, note: str = "") -> Tensor:
        assert len(label) == len(x) and note == "kept"
        return label[:, None].to(x.dtype).expand_as(x)

    def moments(self, x: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        return self(x, t, **cond), torch.full_like(x, 0.5)


@dataclass(frozen=True)
class Asks:
    """Sends one query and returns the answer."""

    query: Callable[[Tensor], Query]
    linear: ClassVar[bool] = False
    why: ClassVar[str] = "it only asks"

    def nfe(self, steps: int) -> int | None:
        return None

    def steps(self, schedule: Any, x: Tensor, times: Tensor, noise: Any) -> Generator[Query, Any, Any]:
        return (yield self.query(x))


def ask(query: Callable[[Tensor], Query], denoiser: nn.Module | None = None) -> Any:
    label = torch.tensor([3, 4, 5])
    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return walk(Asks(query), denoiser or Labelled(), torch.zeros(3, 2), times, label=label, note="kept")


def test_a_query_about_some_samples_gets_their_conditions() -> None:
    rows = torch.tensor([2, 0])
    assert ask(lambda x: Query(x[rows], torch.tensor([0.5, 0.2]), rows))[:, 0].tolist() == [5, 3]


def test_a_query_of_many_states_repeats_the_conditions() -> None:
    t = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    assert ask(lambda x: Query(x.repeat(2, 1), t))[:, 0].tolist() == [3, 4, 5, 3, 4, 5]


def test_a_query_for_moments_gets_both() -> None:
    x0, second = ask(lambda x: Query(x, torch.tensor(0.5), moments=True))
    assert x0[:, 0].tolist() == [3, 4, 5] and bool((second == 0.5).all())
    with pytest.raises(HastenError, match="no second moments"):
        ask(lambda x: Query(x, torch.tensor(0.5), moments=True), g8(Flow()))


def test_a_sampler_that_is_driven_from_outside_is_asked_to_solve() -> None:
    @dataclass(frozen=True)
    class Driven:
        linear: ClassVar[bool] = False

        def nfe(self, steps: int) -> int | None:
            return None

        def solve(self, ask: Any, schedule: Any, x: Tensor, times: Tensor, noise: Any) -> Tensor:
            return ask(x, times[0]) + ask(x[1:2], times[0], torch.tensor([1]))

    seen: list[tuple[int, int]] = []
    found = walk(
        Driven(),
        Labelled(),
        torch.zeros(3, 2),
        torch.tensor([1.0, 0.0]),
        label=torch.tensor([3, 4, 5]),
        note="kept",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert found[:, 0].tolist() == [7, 8, 9] and seen == [(1, 1), (2, 2)]


def test_a_plan_is_refused_with_the_reason() -> None:
    with pytest.raises(HastenError, match="it only asks"):
        plan(Asks(lambda x: Query(x, torch.tensor(0.5))), Flow(), torch.tensor([1.0, 0.0]))
