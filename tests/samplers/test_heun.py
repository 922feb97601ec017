"""Heun's method: churn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.samplers import Heun
from hasten.schedules import EDM, VE, Discrete, Schedule, VPLinear
from tests.samplers.problems import ALL, Basis, between, drive

F64 = torch.float64


def test_churn_keeps_the_marginal_of_a_gaussian() -> None:
    """However much is stirred, many steps end at the data's variance; without churn_noise = 1 they do not."""

    def variance(sampler: Heun, steps: int) -> float:
        schedule, v, basis = ALL["EDM"], 0.25, Basis()
        times = between(schedule, 40.0, 0.05, steps)

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            return v / (v + schedule.sigma(t) ** 2) * z

        z, _ = drive(sampler, schedule, denoise, math.sqrt(40.0**2 + v) * basis(), times, basis)
        return z.pow(2).sum().item() / (v + 0.05**2) - 1

    assert abs(variance(Heun(churn=40.0), 300)) < 3e-3
    assert variance(Heun(churn=40.0, churn_noise=1.1), 300) > 0.05


def at_levels(schedule: Schedule, levels: Tensor) -> Tensor:
    return schedule.time(-torch.log(levels))


def evaluated_levels(sampler: Any, schedule: Schedule, times: Tensor) -> Tensor:
    """q at every evaluation."""
    zero = torch.zeros((), dtype=F64)
    _, found = drive(sampler, schedule, lambda z, t: 0 * z, zero, times, lambda: zero)
    return torch.stack([schedule.q(t) for t in found])


@pytest.mark.parametrize("schedule", [VE(), EDM(), VPLinear(), Discrete.linear()], ids=lambda s: type(s).__name__)
def test_churn_stops_at_the_noisiest_level(schedule: Schedule) -> None:
    """q^ = min(q (1 + gamma), q(t_max)): no network was trained on more noise than its schedule has (2206.00364)."""
    top = float(schedule.q(schedule.t_max))
    times = torch.cat([at_levels(schedule, top * torch.tensor([0.9, 0.3, 0.05], dtype=F64)), torch.zeros(1, dtype=F64)])
    found = evaluated_levels(Heun(churn=100.0), schedule, times)
    gamma = 1 + (math.sqrt(2) - 1)
    assert torch.allclose(found[::2], top * torch.tensor([1.0, 0.3 * gamma, 0.05 * gamma], dtype=F64), rtol=1e-9)


def test_churn_is_for_the_levels_between_its_ends() -> None:
    """Noise only where churn_min <= q <= churn_max."""
    levels = torch.tensor([40.0, 10.0, 2.0, 0.5, 0.1], dtype=F64)
    times = torch.cat([at_levels(EDM(), levels), torch.zeros(1, dtype=F64)])
    found = evaluated_levels(Heun(churn=0.5, churn_min=0.3, churn_max=5.0), EDM(), times)
    assert torch.allclose(found[::2], levels * torch.tensor([1, 1, 1.1, 1.1, 1], dtype=F64), rtol=1e-9)
