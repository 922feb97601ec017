"""DDIM and its inversion."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.errors import BadInput
from hasten.exact import Gaussian
from hasten.samplers import DDIM, invert
from hasten.samplers._exponential import make_node
from hasten.schedules import Discrete, Flow, Schedule, VPCosine, VPLinear
from tests.samplers.problems import F64, drive, ends, rms


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
