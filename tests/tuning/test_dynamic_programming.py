"""Dynamic programming: the sheet's optimum, brute force, and no grid on the same candidates has a better bound."""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.exact import m2
from hasten.pick import pick
from hasten.samplers import DDPM, UniPC
from hasten.schedules import EDM, Discrete, Flow, Schedule, VPCosine, VPLinear
from hasten.times import Karras, Quadratic, UniformLambda, UniformTime
from hasten.tuning import TuningTask
from hasten.tuning._bound import edge_costs, variational_bound
from hasten.tuning.dynamic_programming import DynamicProgramming, candidate_times, shortest_paths

F64 = torch.float64
SCHEDULES = {"VPLinear": VPLinear(), "VPCosine0": VPCosine(offset=0.0), "EDM": EDM(), "Flow": Flow()}
over_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))


def posterior_variance(schedule: Schedule, times: Tensor, v: float = 0.25) -> Tensor:
    a, s = schedule.alpha(times), schedule.sigma(times)
    return v * s**2 / (a**2 * v + s**2)


def sixteen() -> tuple[Schedule, Tensor, Tensor]:
    schedule = Discrete.from_betas(torch.linspace(1e-3, 0.5, 16, dtype=F64))
    times = torch.arange(17, dtype=F64) / 16
    return schedule, times, posterior_variance(schedule, times)


def test_the_optimum_of_sixteen_steps() -> None:
    """Gaussian data of variance .25, decoder of deviation .05: values and paths."""
    schedule, times, mse = sixteen()
    paths = shortest_paths(edge_costs(schedule, times, mse, decoder=0.05, width=0.0), 6)
    expected = {
        2: (7.712060, [0, 2, 16]),
        3: (6.124050, [0, 2, 3, 16]),
        4: (5.820066, [0, 2, 3, 5, 16]),
        6: (5.701729, [0, 2, 3, 4, 5, 7, 16]),
    }
    for K, (value, path) in expected.items():
        assert paths.cost[K, -1].item() == pytest.approx(value, abs=5e-7)
        assert paths.nodes(K) == path


@pytest.mark.parametrize("seed", range(5))
def test_it_is_brute_force(seed: int) -> None:
    """On random costs, some edges missing: the cheapest of all paths with exactly K edges, to every node."""
    T = 9
    costs = torch.rand(T + 1, T + 1, generator=torch.Generator().manual_seed(seed), dtype=F64)
    costs[torch.rand(T + 1, T + 1, generator=torch.Generator().manual_seed(seed + 99)) < 0.15] = math.inf
    costs = torch.where(torch.ones_like(costs).triu(1).bool(), costs, math.inf)
    paths = shortest_paths(costs, T + 1)
    for end in range(1, T + 1):
        for K in range(1, T + 2):
            methods = [(0, *inner, end) for inner in combinations(range(1, end), K - 1)]
            priced = [(sum(costs[s, r].item() for s, r in zip(method, method[1:])), list(method)) for method in methods]
            value, best = min(priced, default=(math.inf, []))
            assert paths.cost[K, end].item() == pytest.approx(value, rel=1e-14)
            if math.isfinite(value):
                assert paths.nodes(K, end) == best
            else:
                with pytest.raises(BadInput, match="no path"):
                    paths.nodes(K, end)


@pytest.mark.parametrize("variance", ["small", "large", "analytic"])
@over_schedules
def test_it_is_brute_force_on_the_bound(variance: str, schedule: Schedule) -> None:
    grid = candidate_times(schedule, schedule.t_max, 11)
    costs = edge_costs(schedule, grid, posterior_variance(schedule, grid), variance)
    paths = shortest_paths(costs, 5)
    for K in range(1, 6):
        methods = [(0, *inner, 11) for inner in combinations(range(1, 11), K - 1)]
        prices = [sum(costs[s, r].item() for s, r in zip(method, method[1:])) for method in methods]
        assert paths.cost[K, -1].item() == pytest.approx(min(prices), rel=1e-12)
        path = paths.nodes(K)
        assert sum(costs[s, r].item() for s, r in zip(path, path[1:])) == pytest.approx(min(prices), rel=1e-12)


@over_schedules
def test_of_a_gaussian_with_the_optimal_variance_all_chains_are_as_good(schedule: Schedule) -> None:
    """The chain's bound is then the entropy, and so it is for every path: the search has nothing to gain."""
    grid = candidate_times(schedule, schedule.t_max, 40)
    costs = edge_costs(schedule, grid, posterior_variance(schedule, grid), "analytic", width=0.0)
    paths = shortest_paths(costs, 40)
    torch.testing.assert_close(paths.cost[2:, -1], paths.cost[1, -1].expand(39), rtol=1e-9, atol=1e-9)


def mixture_task(schedule: Schedule, steps: int, n: int = 1000) -> TuningTask:
    model = m2(schedule)

    def images(count: int) -> tuple[Tensor, None]:
        return model.sample(count, torch.Generator().manual_seed(0)), None

    times = UniformTime()(schedule, steps)
    return TuningTask(denoiser=model, sampler=DDPM(), times=times, shape=(2,), images=images, n=n)


@cache
def measured(name: str) -> dict[str, Tensor]:
    """The squared error of the exact denoiser of M2, measured by the tuner itself."""
    return DynamicProgramming(levels=0, points=40).tune(mixture_task(SCHEDULES[name], 4)).statistics


def snapped(grid: Tensor, times: Tensor) -> list[int]:
    """Distinct nodes of the grid near these ascending times, the first and the last its own."""
    path = [0]
    for k, t in enumerate(times[1:-1].tolist()):
        nearest = int((grid - t).abs().argmin())
        path.append(min(max(nearest, path[-1] + 1), len(grid) - 1 - (len(times) - 2 - k)))
    return [*path, len(grid) - 1]


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_more_steps_are_never_worse(name: str) -> None:
    """With the optimal variance and a density (no bins); up to the error of the measured MSE."""
    schedule = SCHEDULES[name]
    tuner = DynamicProgramming("analytic", levels=0).bind(measured(name), {})
    grid = candidate_times(schedule, schedule.t_max, 60)
    best = shortest_paths(tuner.costs(schedule, grid, tuner.errors(schedule)), 40).cost[1:, -1]
    assert bool((best[1:] <= best[:-1] + 1e-4).all()) and best[7] < best[0] - 0.01


@pytest.mark.parametrize("variance", ["small", "large", "analytic"])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_no_grid_on_the_same_candidates_has_a_better_bound(name: str, variance: str) -> None:
    """On the mixture M2, for 1 to 24 steps."""
    schedule = SCHEDULES[name]
    tuner = DynamicProgramming(variance, candidates=200, levels=0).bind(measured(name), {})
    task = mixture_task(schedule, 24)
    mse = tuner.errors(schedule)
    grid = candidate_times(schedule, schedule.t_max, 200)
    costs = tuner.costs(schedule, grid, mse)
    paths = shortest_paths(costs, 24)
    for N in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 24):
        for spacing in (UniformTime(), Quadratic(), Karras(), UniformLambda(), UniformLambda(low=0.03)):
            path = snapped(grid, spacing(schedule, N).flip(0))
            assert len(set(path)) == N + 1
            price = sum(costs[s, r].item() for s, r in zip(path, path[1:]))
            assert paths.cost[N, -1].item() <= price + 1e-12, (N, spacing)
    result = tuner.tune(task)
    assert result.plan is not None
    torch.testing.assert_close(result.plan.times, grid[paths.nodes(24)].flip(0), rtol=0, atol=0)
    others = [v for k, v in result.figures.items() if k.startswith("bits_per_dimension_")]
    assert len(others) == 5 and result.figures["bits_per_dimension"] < min(others)


def test_the_tuner_measures_once_and_saves_the_measurement() -> None:
    schedule = SCHEDULES["VPCosine0"]
    first = DynamicProgramming(levels=0, points=20).tune(mixture_task(schedule, 8))
    assert sorted(first.statistics) == ["mse", "mse_times"] and first.plan is not None
    assert first.plan.sampler == "ddpm" and first.plan.nfe == 8
    assert first.plan.times[0] == 1 and first.plan.times[-1] == 0
    blind = mixture_task(schedule, 8)
    blind.images = None
    bound = DynamicProgramming(levels=0).bind(first.statistics, {})
    again = bound.tune(blind)
    assert again.plan is not None and again.statistics == {} and again.figures == first.figures
    torch.testing.assert_close(again.plan.times, first.plan.times, rtol=0, atol=0)
    # the figure is the bound of the plan's own times
    errors = bound.errors(schedule)(schedule.lam(again.plan.times[:-1]))
    total = variational_bound(schedule, again.plan.times, errors, width=0.0).total
    assert again.figures["bits_per_dimension"] == pytest.approx(total, rel=1e-5)


def test_the_measured_error_is_the_error() -> None:
    """Of the mixture far out it is that of a Gaussian with the data's moments; near the image, sigma^2."""
    schedule = SCHEDULES["EDM"]
    mse = DynamicProgramming(levels=0).bind(measured("EDM"), {}).errors(schedule)
    x = m2(schedule).sample(200_000, torch.Generator().manual_seed(1))
    assert float(mse(torch.tensor(-4.0, dtype=F64))) == pytest.approx(float(x.var(0).mean()), rel=0.03)
    assert float(mse(torch.tensor(5.0, dtype=F64))) == pytest.approx(math.exp(-10), rel=0.05)


def test_any_sampler_of_the_task_gets_the_grid() -> None:
    task = mixture_task(SCHEDULES["Flow"], 6)
    task.sampler = UniPC(3)
    result = DynamicProgramming("analytic", levels=0).bind(measured("Flow"), {}).tune(task)
    assert result.plan is not None and result.plan.sampler == "unipc:order=3"


def test_it_is_spelled() -> None:
    assert pick("tuning", "dynamic_programming:variance=large,decoder=0.05,levels=0") == DynamicProgramming(
        "large", decoder=0.05, levels=0
    )


def test_refusals() -> None:
    schedule = SCHEDULES["Flow"]
    task = mixture_task(schedule, 8)
    task.images = None
    with pytest.raises(BadInput, match="--data"):
        DynamicProgramming().tune(task)
    with pytest.raises(BadInput, match="raise candidates"):
        DynamicProgramming(candidates=7).tune(task)
    task.times = UniformTime(end=0.1)(schedule, 8)
    with pytest.raises(BadInput, match="ends at t = 0"):
        DynamicProgramming().tune(task)
    with pytest.raises(BadInput, match="'small'"):
        DynamicProgramming("smal")
    with pytest.raises(BadInput, match="square"):
        shortest_paths(torch.zeros(3, 4), 2)
