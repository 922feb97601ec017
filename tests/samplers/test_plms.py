"""PLMS: its Adams-Bashforth weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.samplers import PLMS
from hasten.schedules import Schedule
from tests.samplers.problems import VE_WIDE, drive

F64 = torch.float64


def at_levels(schedule: Schedule, levels: Tensor) -> Tensor:
    return schedule.time(-torch.log(levels))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plms_integrates_polynomials_in_q(order: int) -> None:
    """Adams-Bashforth of order p: with nodes uniform in q every step is exact for eps of degree p - 1 (2202.09778)."""
    q = torch.linspace(9.0, 1.0, 9, dtype=F64)
    coefficients = [0.7, -0.3, 0.11, 0.05][:order]

    def integral(a: Tensor, b: Tensor) -> Tensor:
        return sum(c * (b ** (k + 1) - a ** (k + 1)) / (k + 1) for k, c in enumerate(coefficients))

    states: list[Tensor] = []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        states.append(z)
        level = VE_WIDE.sigma(t)
        return z - level * sum(c * level**k for k, c in enumerate(coefficients))

    end, _ = drive(PLMS(order, "ramp"), VE_WIDE, denoise, torch.tensor(1.0, dtype=F64), at_levels(VE_WIDE, q))
    path = torch.stack([*states, end])
    moved, expected = path.diff(), torch.stack([integral(a, b) for a, b in zip(q, q[1:])])
    assert (moved[order - 1 :] - expected[order - 1 :]).abs().max() < 1e-9
    assert order == 1 or (moved[0] - expected[0]).abs() > 1e-3
