"""Grids on tables that end in almost pure noise begin their levels where the image begins to show."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hasten.errors import BadInput
from hasten.exact import m2
from hasten.plan import plan
from hasten.samplers import DDIM, DEIS, DPMSolver, FastDPM, UniPC
from hasten.sampling import Noise
from hasten.schedules import EDM, VE, Discrete, Flow, VPCosine, VPLinear
from hasten.times import Karras, UniformLambda

F64 = torch.float64
COSINE = Discrete.cosine(convention="log_q")


@pytest.mark.parametrize("grid", [UniformLambda, Karras])
def test_the_levels_of_a_cosine_table_begin_at_150(grid: Any) -> None:
    """The law from q = 150 on, while the first time stays that of the table; `clip` says otherwise."""
    t150 = float(COSINE.time(torch.tensor(-math.log(150.0), dtype=F64)))
    for given in (grid(), grid(start=1.0), grid(clip=150.0)):
        times = given(COSINE, 8)
        assert times[0] == 1 and torch.allclose(times[1:], grid(start=t150)(COSINE, 8)[1:], atol=1e-12)
    free = grid(clip=math.inf)(COSINE, 8)
    assert float(COSINE.q(free[0])) > 2e4 and int((COSINE.q(free) > 150).sum()) >= 3
    assert int((COSINE.q(grid()(COSINE, 8)) > 150).sum()) == 1
    assert float(COSINE.q(grid(clip=20.0)(COSINE, 5)[1])) < 20
    late = grid(start=0.999)(COSINE, 4)  # a start of one's own is kept
    assert float(COSINE.q(late[0])) > 300 and float(COSINE.q(late[1])) > float(COSINE.q(grid()(COSINE, 4)[1]))


def test_other_schedules_keep_their_levels() -> None:
    """Those that end below q = 300, and those whose sigma grows: their largest sigma is what the user says."""
    for schedule in (
        VPLinear(),
        VPCosine(),
        EDM(),
        VE(),
        VE(sigma_max=1e4),
        Discrete.linear(),
        Discrete.scaled_linear(),
    ):
        lam = schedule.lam(UniformLambda()(schedule, 6)[:6])
        assert (lam.diff() - lam.diff()[0]).abs().max() < 1e-9, schedule
    assert torch.equal(UniformLambda()(Flow(), 5), UniformLambda(clip=150.0)(Flow(), 5))
    with pytest.raises(BadInput, match="finite"):
        UniformLambda(clip=math.inf)(Flow(), 5)
    with pytest.raises(BadInput, match="clip"):
        UniformLambda(clip=-1.0)


@pytest.mark.parametrize("sampler", [UniPC(3), DPMSolver(2), DEIS(3), DDIM()], ids=str)
def test_it_pays(sampler: Any) -> None:
    """On an exact mixture; by how much, see the head of times.py, and the two cases where it does not."""
    exact = m2(COSINE)
    x = Noise(range(64), (2,), F64).initial()
    end = exact.ode(x, 1.0, 0.0)

    def error(clip: float | None, steps: int) -> float:
        return float((plan(sampler, COSINE, UniformLambda(clip=clip)(COSINE, steps))(exact, x) - end).square().mean())

    for steps in (8, 10, 15):
        assert error(None, steps) < error(math.inf, steps) / 1.2**2


def test_fast_dpm_counts_the_same_noise_the_same() -> None:
    times = UniformLambda()(COSINE, 12)
    made = plan(FastDPM(), COSINE, times).times
    assert float(COSINE.q(made[1])) < 150 and made[0] == 1
