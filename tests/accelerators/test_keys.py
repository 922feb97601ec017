"""Key sets, the shortest path over groups, and what an error does to the final sample."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hasten.accelerators._caching.keys import (
    PAPER,
    cheapest_key_steps,
    check_key_steps,
    key_step_count,
    key_steps_around,
    paper_key_steps,
    resolve_key_steps,
    uniform_key_steps,
)
from hasten.accelerators._caching.search import error_gains, main_directions, reuse_costs
from hasten.errors import BadInput
from hasten.plan import plan
from hasten.samplers import DDIM
from hasten.schedules import VPCosine, VPLinear
from hasten.times import UniformTime


def test_the_papers_key_steps_in_proportion() -> None:
    assert paper_key_steps(50) == PAPER == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert paper_key_steps(20) == (0, 1, 2, 4, 6, 10, 14)
    assert paper_key_steps(100) == (0, 2, 4, 6, 10, 20, 30, 50, 70)
    for n in range(9, 300):
        assert check_key_steps(paper_key_steps(n), n, "x") == paper_key_steps(n)


def test_uniform_and_centered_key_steps() -> None:
    assert uniform_key_steps(10, 4) == (0, 4, 8)
    assert key_steps_around(50, 10, 0, 1.0) == tuple(range(0, 50, 5))
    keys = key_steps_around(50, 10, 15, 1.4)
    gaps = [b - a for a, b in itertools.pairwise(keys)]
    assert keys[0] == 0 and len(keys) == 10 and keys[-1] < 50
    nearest_gap = min(range(len(gaps)), key=lambda k: abs((keys[k] + keys[k + 1]) / 2 - 15))
    assert gaps[nearest_gap] == min(gaps) < max(gaps)
    assert len(key_steps_around(20, 15, 10, 3.0)) >= 15  # the power gives way
    with pytest.raises(BadInput, match="center from 0 to 19"):
        key_steps_around(20, 5, 20, 1.4)


def test_budget_is_a_number_or_a_fraction() -> None:
    assert key_step_count(9, 50) == 9 and key_step_count(0.18, 50) == 9 and key_step_count(0.5, 9) == 4
    for wrong in (0, -1, 51, 2.5):
        with pytest.raises(BadInput, match="budget"):
            key_step_count(wrong, 50)


def test_invalid_key_steps_raise() -> None:
    assert check_key_steps((4, 0, 7, 4), 9, "x") == (0, 4, 7)
    for keys in ((), (1, 2), (0, 9), (-1, 0)):
        with pytest.raises(BadInput, match="x: key steps are numbers from 0"):
            check_key_steps(keys, 9, "x")
    with pytest.raises(BadInput, match="9 model evaluations or more, found 8"):
        check_key_steps(range(8), 8, "x")
    with pytest.raises(BadInput, match="11 of 20 model evaluations would depend on key step 4"):
        check_key_steps((0, 4, 15), 20, "x")
    with pytest.raises(BadInput, match="did you mean 'paper'"):
        resolve_key_steps("papr", 20, ("paper", "uniform", "found"))


def test_cheapest_key_steps_are_those_of_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 4):
        N = 9
        cost = torch.rand(N, N + 1, generator=generator, dtype=torch.float64)
        if count > 1:
            cost[torch.arange(N + 1) > torch.arange(N)[:, None] + 5] = math.inf  # groups of 5 at most
        cost[torch.arange(N + 1) <= torch.arange(N)[:, None]] = math.inf

        def total(keys: tuple[int, ...], cost: Tensor = cost, N: int = N) -> float:
            return sum(float(cost[i, e]) for i, e in zip(keys, (*keys[1:], N)))

        every = [(0, *rest) for rest in itertools.combinations(range(1, N), count - 1)]
        assert cheapest_key_steps(cost, count) == min(every, key=total)
    with pytest.raises(BadInput, match="1 key steps cannot cover 9 model evaluations"):
        cheapest_key_steps(cost, 1)


@pytest.mark.parametrize("schedule", [VPCosine(), VPLinear()])
def test_gain_is_the_derivative_of_the_final_ddim_sample(schedule: object) -> None:
    """On Gaussian data, where the network is linear: move one answer and look at the result."""
    times = UniformTime()(schedule, 12)
    compiled = plan(DDIM(), schedule, times)
    x = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for v in (0.01, 1.0, 30.0):

        def ends(moved: int | None, v: float = v) -> Tensor:
            requested = iter(range(12))

            def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
                a, s = schedule.alpha(t), schedule.sigma(t)
                return a * v / (a * a * v + s * s) * x_t + (0.5 if next(requested) == moved else 0.0)

            return compiled(denoiser, x)

        result = torch.stack([((ends(j) - ends(None)) / 0.5).mean() for j in range(12)])
        torch.testing.assert_close(result, error_gains(times[:-1].tolist(), schedule, v), rtol=1e-6, atol=1e-9)


def test_evaluations_at_one_time_divide_the_gain() -> None:
    once = error_gains([1.0, 0.6, 0.3], VPCosine(), 1.0)
    twice = error_gains([1.0, 0.6, 0.6, 0.3], VPCosine(), 1.0)
    torch.testing.assert_close(twice[1] + twice[2], once[1])
    torch.testing.assert_close(twice[[0, 3]], once[[0, 2]])


def test_main_directions_of_a_batch() -> None:
    x = torch.zeros(4, 1, 2, 2)
    x[:, 0, 0, 0] = torch.tensor([3.0, -3.0, 3.0, -3.0])
    x[:, 0, 1, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    directions, variance, left = main_directions(x)
    torch.testing.assert_close(directions.abs(), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    torch.testing.assert_close(variance, torch.tensor([9.0, 1.0]))
    assert left == pytest.approx(1e-4)


def test_costs_add_errors_of_a_group_as_vectors() -> None:
    """One pixel, one sample: no main directions, so the weights are those of the smallest variance."""
    N, count = 10, 3
    times = torch.linspace(1, 0.1, N).tolist()
    error = torch.randn(N, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    requested = []

    def key(j: int) -> tuple[int, Tensor]:
        return j, torch.full((1, 1), 0.1 * j, dtype=torch.float64)

    def reuse(saved: int, j: int) -> Tensor:
        requested.append((saved, j))
        return torch.full((1, 1), 0.1 * j, dtype=torch.float64) + error[saved, j]

    cost = reuse_costs(count, times, VPCosine(), key, reuse)
    share = error_gains(times, VPCosine(), 1e-4)
    longest = 5  # half of the evaluations is the limit here
    assert set(requested) == {(i, j) for i in range(N) for j in range(i + 1, min(i + longest, N))}
    for i, e in itertools.product(range(N), range(N + 1)):
        if i < e <= i + longest:
            expected = float(sum(share[j] * error[i, j] for j in range(i + 1, e))) ** 2
            assert float(cost[i, e]) == pytest.approx(expected, rel=1e-5, abs=1e-12)
        else:
            assert cost[i, e] == math.inf
