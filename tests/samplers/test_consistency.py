"""The multistep sampler of consistency models: its table, and the law that it keeps."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.exact import Gaussian
from hasten.pick import pick
from hasten.plan import plan
from hasten.plan.draw import draw
from hasten.samplers import DDIM
from hasten.samplers.consistency import Consistency
from hasten.sampling import Noise, walk
from hasten.schedules import EDM, Flow, Schedule, VPCosine, VPLinear
from hasten.times import CosineAngle
from tests.samplers.problems import F64, ends

SCHEDULES = [VPCosine(offset=0.0), VPLinear(), Flow(), EDM()]


def test_its_name() -> None:
    assert pick("samplers", "consistency") == Consistency()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_table(schedule: Schedule) -> None:
    """A row forgets the state: a = 0, the weight of the newest answer is alpha, that of the fresh noise sigma."""
    times = ends(schedule, 4)
    table = plan(Consistency(), schedule, times)
    assert table.nfe == 4 and table.C.shape[1] == 3
    for k, t in enumerate(times[1:]):
        assert float(table.a[k]) == 0 and float(table.B[k, k]) == float(schedule.alpha(t))
        assert float(table.B[k].abs().sum()) == float(table.B[k, k]) and float(table.A[k].abs().sum()) == 0
        if k < 3:
            assert float(table.C[k, k]) == float(schedule.sigma(t))
    assert float(table.C[3].abs().sum()) == 0


def test_plan_is_the_walk() -> None:
    schedule, sampler = VPCosine(offset=0.0), Consistency()
    model = Gaussian(torch.tensor([0.3, -0.2]), torch.tensor([0.4, 0.1]), schedule)
    for steps in (1, 2, 5):
        times = CosineAngle()(schedule, steps)
        start = Noise([1, 2, 3], (2,), dtype=F64)
        walked = walk(sampler, model, start.initial(), times, start)
        torch.testing.assert_close(draw(model, sampler, times, Noise([1, 2, 3], (2,), dtype=F64)), walked)


class Flowed(torch.nn.Module):
    """The exact consistency function of a Gaussian: the end of the path through z_t."""

    def __init__(self, schedule: Schedule, mean: float, std: float) -> None:
        super().__init__()
        self.schedule = schedule
        self.exact = Gaussian(torch.tensor([mean]), torch.tensor([std**2]), schedule)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.exact.endpoint(x_t, t)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_exact_consistency_function_keeps_the_law(schedule: Schedule, steps: int) -> None:
    """Mean .3 and deviation .6 after any number of steps; the deterministic step from the same answers does not."""
    model, times = Flowed(schedule, 0.3, 0.6), CosineAngle()(schedule, steps)
    # started from what the schedule makes of this law at its end, so that the start adds no error
    alpha, sigma = (float(f(times[0])) for f in (schedule.alpha, schedule.sigma))
    g = torch.Generator().manual_seed(0)
    n = 100_000
    x = alpha * 0.3 + math.hypot(0.6 * alpha, sigma) * torch.randn(n, 1, generator=g, dtype=F64)

    def noise() -> torch.Tensor:
        return torch.randn(n, 1, generator=g, dtype=F64)

    found = walk(Consistency(), model, x, times, noise, schedule=schedule)
    assert abs(float(found.mean()) - 0.3) < 0.008 and abs(float(found.std()) - 0.6) < 0.006
    if steps > 1:
        wrong = walk(DDIM(), model, x, times, noise, schedule=schedule)
        assert float(wrong.std()) > 0.62  # a sample's path extrapolated as if it were straight


def test_fresh_noise_each_time() -> None:
    """The result does not remember the start once there were two steps, but for the answer: x0 = 0 leaves noise."""
    schedule = VPCosine(offset=0.0)
    times = torch.tensor([1.0, 0.5, 0.25], dtype=F64)
    drawn = iter([torch.full((1, 1), 2.0, dtype=F64), torch.full((1, 1), 3.0, dtype=F64)])
    z = walk(
        Consistency(), lambda z, t: 0 * z, torch.ones(1, 1, dtype=F64), times, lambda: next(drawn), schedule=schedule
    )
    assert float(z) == pytest.approx(3 * math.sin(math.pi / 8), rel=1e-12)
