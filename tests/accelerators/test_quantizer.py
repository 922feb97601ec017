"""The quantiser: codes, ranges, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.accelerators._quantization.quantizer import (
    ACTS,
    WEIGHTS,
    codes,
    fake_quantize,
    fit_range,
    quantization_error,
    search_range,
)

GRIDS = [WEIGHTS[8], WEIGHTS[4], ACTS[8]]


def heavy(rows: int, n: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Rows of values with long tails."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    return x * x.abs() + shift


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shift", [0.0, 9.0, -9.0])
def test_codes_stay_on_the_grid_and_zero_is_exact(grid: Any, shift: float) -> None:
    x = heavy(5, 400, shift=shift)
    scale, zero = fit_range(x.amin(1), x.amax(1), grid)
    q = codes(x, scale[:, None], zero[:, None], grid)
    assert q.min() >= grid.low and q.max() <= grid.high and torch.equal(zero, zero.round())
    assert not grid.symmetric or (zero == 0).all()
    assert torch.equal(fake_quantize(torch.zeros(5, 1), scale[:, None], zero[:, None], grid), torch.zeros(5, 1))
    errors = (x - fake_quantize(x, scale[:, None], zero[:, None], grid)).abs()
    # half a step, and as much again at one end of the range, which moves when the zero is rounded
    assert (errors <= (0.5 if grid.symmetric else 1.0) * scale[:, None] * (1 + 1e-4)).all()


def test_a_symmetric_grid_keeps_both_signs() -> None:
    """A signed range with as many codes below zero as above: nothing negative is lost."""
    x = torch.linspace(-3, 3, 601)[None]
    for scale, zero in (fit_range(x.amin(1), x.amax(1), WEIGHTS[8]), search_range(x, WEIGHTS[8])):
        q = codes(x, scale, zero, WEIGHTS[8])
        assert torch.equal(q, -q.flip(1)) and q.min() == -127 and q.max() == 127


@pytest.mark.parametrize("grid", GRIDS)
def test_a_searched_range_is_never_worse_in_its_own_metric(grid: Any) -> None:
    x = torch.cat([heavy(20, 500), torch.rand(20, 500), torch.zeros(1, 500)])
    result = quantization_error(x, *search_range(x, grid), grid)
    full = quantization_error(x, *fit_range(x.amin(1), x.amax(1), grid), grid)
    assert (result <= full).all() and torch.isfinite(result).all()
    if grid is WEIGHTS[4]:
        assert result[:20].mean() < 0.9 * full[:20].mean()  # measured: .83


def test_gradients_pass_the_rounding() -> None:
    grid, s, z = ACTS[8], torch.tensor(0.1, requires_grad=True), torch.tensor(100.0)
    x = torch.tensor([-20.0, -3.14, 0.02, 4.44, 30.0], requires_grad=True)  # the first and the last outside
    y = fake_quantize(x, s, z, grid)
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    inside = sum(round(v / 0.1) - v / 0.1 for v in (-3.14, 0.02, 4.44))
    assert float(s.grad) == pytest.approx((0 - 100) + inside + (255 - 100), abs=1e-3)
