"""What makes a jump land where small steps land: identities of `_targets`."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.distillers import _targets as targets
from hasten.errors import BadInput
from hasten.predictions import spread
from hasten.schedules import VE, Flow, Schedule, VPCosine, VPLinear
from hasten.times import Trailing
from tests.distillers._toy import mixture, toy

SCHEDULES = [VPCosine(offset=0.0), VPLinear(), Flow(), VE()]


def points(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 2, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_one_step_with_the_target_lands_where_the_small_steps_do(schedule: Schedule, m: int) -> None:
    exact = mixture()
    exact.schedule = schedule
    for n in (1, 2, 4, 8):
        nodes = targets.time_nodes(Trailing(), schedule, n * m)
        i = m * torch.arange(1, n + 1)
        z = points(n) * schedule.sigma(nodes[i])[:, None]
        times = [nodes[i - k] for k in range(m + 1)]
        end, target = targets.ddim_path(exact, schedule, z, times)
        once = targets.ddim_step(schedule, z, target, times[0], times[-1])
        assert torch.allclose(once, end, rtol=1e-11, atol=1e-11)
        assert torch.allclose(target, targets.jump_target(schedule, z, end, times[0], times[-1]), rtol=1e-9, atol=1e-9)


def test_the_mean_is_the_closed_form_in_v() -> None:
    """Two equal steps of an angle d/2: v* = (sin(d/2) z + cos(d/2) v1 + v2) / (2 cos(d/2))."""
    exact, n = mixture(), 4
    schedule = exact.schedule
    nodes = targets.time_nodes(Trailing(), schedule, 2 * n)
    i = 2 * torch.arange(1, n + 1)
    z, times = points(n), [nodes[i - k] for k in range(3)]
    _, target = targets.ddim_path(exact, schedule, z, times)
    v1 = exact.raw(z, times[0])
    middle = targets.ddim_step(schedule, z, exact(z, times[0]), times[0], times[1])
    v2, half = exact.raw(middle, times[1]), -math.pi / 2 / n / 2
    v = (math.sin(half) * z + math.cos(half) * v1 + v2) / (2 * math.cos(half))
    x0 = spread(schedule.alpha(times[0]), z) * z - spread(schedule.sigma(times[0]), z) * v
    assert torch.allclose(target, x0, rtol=0, atol=1e-12)


def test_float32_does_for_thousands_of_steps() -> None:
    """The mean keeps float32's precision where the subtraction loses it: at 8192 steps by a factor of a thousand."""
    exact, n = mixture(), 8192
    schedule = exact.schedule
    nodes = targets.time_nodes(Trailing(), schedule, 2 * n)
    i = 2 * torch.randint(1, n + 1, (512,), generator=torch.Generator().manual_seed(0))
    times = [nodes[i - k] for k in range(3)]
    z = points(512)
    _, truth = targets.ddim_path(exact, schedule, z, times)
    end, single = targets.ddim_path(exact, schedule, z.float(), times)
    v_true, v_single = (targets.raw_target(toy(), z.to(x.dtype), times[0], x) for x in (truth, single))
    apart = targets.jump_target(schedule, z.float(), end, times[0], times[2])
    v_apart = targets.raw_target(toy(), z.float(), times[0], apart)
    inside = (times[0] > 0.05) & (times[0] < 0.95)
    ours, theirs = ((v.double() - v_true)[inside].abs().max().item() for v in (v_single, v_apart))
    assert ours < 2e-5
    assert theirs > 50 * ours


@pytest.mark.parametrize("weight", [weight for weight in targets.WEIGHTS if weight != "auto"])
def test_the_weight_is_one_of_the_squared_error_of_x0(weight: str) -> None:
    student, z = toy().double(), points(5)
    t = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.99], dtype=torch.float64)
    label = torch.zeros(5, dtype=torch.long)
    x0 = points(5) * 0.3
    snr = (student.schedule.alpha(t) / student.schedule.sigma(t)) ** 2
    weights = {"snr+1": 1 + snr, "raw": 1 + snr, "truncated": snr.clamp(min=1), "snr": snr, "x0": torch.ones(5)}
    want = (weights[weight] * (student(z, t, label=label) - x0).square().mean(1)).mean()
    assert targets.prediction_loss(student, z, t, x0, weight, label=label).item() == pytest.approx(
        want.item(), rel=1e-5
    )


def test_an_unknown_weight_names_the_known_ones() -> None:
    t = torch.tensor([0.5], dtype=torch.float64)
    with pytest.raises(BadInput, match="truncated"):
        targets.output_weight(toy(), t, "truncatd")


@pytest.mark.parametrize("schedule", [VPCosine(offset=0.0), Flow()], ids=lambda s: type(s).__name__)
def test_the_finer_path_is_of_second_order_and_its_target_lands_on_it(schedule: Schedule) -> None:
    exact = mixture()
    exact.schedule = schedule
    z = points(256) * schedule.sigma(torch.tensor(1.0, dtype=torch.float64))
    true = exact.ode(z, 1.0)
    errors = []
    for n in (8, 16, 32, 64):
        nodes = targets.time_nodes(Trailing(), schedule, n)
        times = [nodes[k].expand(256) for k in range(n, -1, -1)]
        end, target = targets.midpoint_path(exact, schedule, z, times)
        assert torch.allclose(targets.ddim_step(schedule, z, target, times[0], times[-1]), end, atol=1e-10)
        errors.append((end - true).norm(dim=1).median().item())
        plain = targets.ddim_path(exact, schedule, z, times)[0]
        assert errors[-1] < 0.5 * (plain - true).norm(dim=1).median().item()
    assert errors[0] / errors[-1] > 30  # 8 times as many steps: 64 of second order, 8 of first
