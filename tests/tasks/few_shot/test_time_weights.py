"""Time-step weights: the paper's numbers, no underflow, monotone; the size of what tells classes apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.schedules import Flow, VPCosine
from hasten.schedules.base import Schedule
from hasten.schedules.discrete import Discrete
from hasten.tasks.few_shot import attribute_size, time_step_weights
from hasten.tasks.few_shot.time_weights import evaluation_times, log_loss_degree, time_of_loss

LINEAR = Discrete.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
SCALED = Discrete.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)


def entry(*numbers: int) -> Tensor:
    return (torch.tensor(numbers, dtype=torch.float64) + 1) / 1000


def test_the_published_values_on_linear_betas() -> None:
    w = time_step_weights(LINEAR, entry(100, 200, 300, 500, 900), 4.0)
    torch.testing.assert_close(w, torch.tensor([0.9999, 0.907, 0.619, 0.209, 0.0104]).double(), atol=5e-4, rtol=0)


def test_the_models_own_schedule_counts() -> None:
    """At 500 of Stable Diffusion's own betas the weight is more than twice that of the linear ones."""
    own, linear = (float(time_step_weights(s, entry(500), 4.0)) for s in (SCALED, LINEAR))
    assert own == pytest.approx(0.476, abs=5e-3) and own > 2.2 * linear


@pytest.mark.parametrize("schedule", [LINEAR, SCALED, VPCosine(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("size", [0.0, 0.5, 4.0, 40.0])
def test_weights_fall_and_lie_in_the_unit_interval(schedule: Schedule, size: float) -> None:
    t = torch.linspace(1e-3, schedule.t_max, 500, dtype=torch.float64)
    w = time_step_weights(schedule, t, size)
    assert bool(((w >= 0) & (w <= 1)).all()) and bool(torch.isfinite(w).all())
    top = int(w.argmax())
    assert bool((w[top:].diff() <= 1e-12).all())
    assert float(w[0]) > 0.99 and float(w[-1]) < 0.5  # size 8 at small t underflows in the published code


def test_the_logarithm_is_that_of_the_complementary_error_function() -> None:
    t = torch.tensor([0.3, 0.6, 0.9]).double()
    s = torch.exp(VPCosine().lam(t)) / (2 * math.sqrt(2))
    expected = torch.log(torch.special.erfc(2.0 * s))
    torch.testing.assert_close(log_loss_degree(VPCosine(), t, 2.0), expected)
    far = log_loss_degree(VPCosine(), torch.tensor([0.01]).double(), 8.0)
    z = 8.0 * float(torch.exp(VPCosine().lam(0.01))) / (2 * math.sqrt(2))
    assert float(far) == pytest.approx(-(z**2) - math.log(z * math.sqrt(math.pi)), rel=1e-5)  # where 1 - erf is 0


def test_the_time_of_loss_has_the_degree_of_loss() -> None:
    for size in (2.0, 8.0):
        t = time_of_loss(VPCosine(), size, 1e-6)
        assert float(log_loss_degree(VPCosine(), torch.tensor(t), size)) == pytest.approx(math.log(1e-6), rel=1e-6)
    assert time_of_loss(VPCosine(), 0.0, 1e-6) == VPCosine().t_min


def test_the_size_is_that_of_what_differs_always() -> None:
    """Two classes that differ by a mark of distance 3, and in half of the pairs by much more elsewhere."""
    x = torch.zeros(4, 3, 4, 4)
    x[2:, :, 1, 1] = math.sqrt(3.0)
    x[[1, 3], :, 3, 3] = 100.0
    assert attribute_size(x, torch.tensor([0, 0, 1, 1])) == pytest.approx(3.0)
    assert attribute_size(x, torch.tensor([0, 0, 1, 1]), 1.0) > 100
    values = torch.randn(5, 2, 3, 3)
    labels = torch.tensor([0, 0, 1, 1, 2])
    pairs = [(i, j) for i in range(5) for j in range(i) if labels[i] != labels[j]]
    squares = torch.stack([(values[i] - values[j]).double().square().sum(0) for i, j in pairs])
    expected = math.sqrt(float(torch.quantile(squares, 0.3, dim=0).sum()))
    assert attribute_size(values, labels, 0.3) == pytest.approx(expected)
    with pytest.raises(BadInput, match="two classes"):
        attribute_size(x, torch.zeros(4))


def test_weighted_times_are_quantiles_of_the_density() -> None:
    middles = 0.1 + (torch.arange(2000) + 0.5) / 2000 * (VPCosine().t_max - 0.1)
    t = evaluation_times(VPCosine(), 2000, 0.1, time_step_weights(VPCosine(), middles, 2.0))
    w = time_step_weights(VPCosine(), middles.double(), 2.0)
    for edge in (0.3, 0.5, 0.7):
        assert float((t < edge).double().mean()) == pytest.approx(float(w[middles < edge].sum() / w.sum()), abs=2e-3)
    assert bool((evaluation_times(LINEAR, 7, 0.05) * 1000 % 1 < 1e-9).all())
