"""Conditional transport and the diffusion normalizing flow: their published figures, in closed form where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.nets.transport import Navigator, TransportFeatures
from hasten.train.diff_flow import DiffFlow
from hasten.train.transport import TransportLoss, conditional_transport, cosine_cost


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y[None]).square().sum(-1)


def test_transport_rises_with_the_shift_between_two_samples_of_one_law() -> None:
    """Two batches of N(0, I) in the plane, d = c = |x - y|^2: .89 without shift (4/9 a dimension, as x | y is
    N(2y/3, I/3)), and the published .90, .98, 1.19, 2.31 within the noise of batches."""
    g = torch.Generator().manual_seed(0)
    losses = []
    for shift in (0.0, 0.5, 1.0, 2.0):
        values = []
        for _ in range(20):
            x, y = torch.randn(2, 128, 2, generator=g, dtype=torch.float64)
            d = squared(x, y + shift)
            values.append(float(conditional_transport(d, d)))
        losses.append(sum(values) / 20)
    assert losses == sorted(losses)
    assert abs(losses[0] - 8 / 9) < 0.03
    assert all(abs(a - b) < 0.12 * b for a, b in zip(losses, (0.90, 0.98, 1.19, 2.31)))


def test_transport_of_a_batch_does_not_depend_on_its_order() -> None:
    torch.manual_seed(0)
    loss = TransportLoss(TransportFeatures((1, 8, 8), 16), Navigator(16, 8))
    x, y, label = torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8), torch.tensor([0, 0, 1, 1, 2, 2])
    value = loss(x, y, label).detach()
    p = torch.tensor([1, 0, 3, 2, 5, 4])
    assert torch.allclose(loss(x[p], y, label), value, atol=1e-6)
    assert torch.allclose(loss(x, y[p], label), value, atol=1e-6)
    assert 0 <= float(value) <= 2
    # of equal labels only: the mean of three separate transports, but for exp(-apart)
    far = TransportLoss(loss.features, loss.navigator, apart=60.0)
    alone = sum(float(loss(x[k : k + 2], y[k : k + 2]).detach()) for k in (0, 2, 4)) / 3
    assert abs(float(far(x, y, label).detach()) - alone) < 1e-5


def test_the_cost_is_one_minus_the_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert torch.allclose(
        cosine_cost(x, torch.tensor([[3.0, 0.0], [-1.0, 0.0]])), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    )


# ---- the diffusion normalizing flow ----

VARIANCE, ENTROPY = 0.3, 0.5 * math.log(2 * math.pi * math.e * 0.3)


def drift(z: Tensor, t: Tensor) -> Tensor:
    return -z / 2


def score(z: Tensor, t: Tensor) -> Tensor:
    return -z / (1 + (VARIANCE - 1) * torch.exp(-t))[:, None]


def exact_loss(flow: DiffFlow) -> float:
    """The mean of the loss for Gaussian data of this variance: every term is quadratic in two Gaussian states."""
    dt, v, total = flow.horizon / flow.steps, VARIANCE, 0.0
    for t in flow.times[1:].tolist():
        after = (1 - dt / 2) ** 2 * v + dt
        keep = 1 - (1 / (1 + (VARIANCE - 1) * math.exp(-t)) - 0.5) * dt
        total += 0.5 * ((v - 2 * keep * (1 - dt / 2) * v + keep**2 * after) / dt - 1)
        v = after
    return total + 0.5 * (math.log(2 * math.pi) + v)


@pytest.mark.parametrize("steps, published", [(10, 0.9397), (50, 0.8400), (250, 0.8188)])
def test_the_loss_falls_to_the_entropy_from_above(steps: int, published: float) -> None:
    """f = -z/2 and the exact score. The published figures are means over samples: .003 is their noise."""
    flow = DiffFlow(steps)
    exact = exact_loss(flow)
    assert exact > ENTROPY and abs(exact - published) < 0.003
    g = torch.Generator().manual_seed(0)
    n = 40_000 if steps < 250 else 4_000
    z = math.sqrt(VARIANCE) * torch.randn(n, 1, generator=g, dtype=torch.float64)
    values = flow.loss(z, drift, score, g)
    assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / math.sqrt(n)


def test_the_reverse_chain_takes_the_forward_steps_back() -> None:
    """With the noise b of the loss in place of its own, `sample` retraces the states."""
    flow, g = DiffFlow(4, horizon=1.0, diffusion=0.7), torch.Generator().manual_seed(1)
    dt, scale = 0.25, 0.7 * math.sqrt(0.25)
    z = [torch.randn(3, 2, generator=g, dtype=torch.float64)]
    for _ in range(4):
        z.append(
            z[-1] + drift(z[-1], torch.zeros(3)) * dt + scale * torch.randn(3, 2, generator=g, dtype=torch.float64)
        )
    back = z[-1]
    for i in (4, 3, 2, 1):
        t = flow.times[i]
        reverse = flow._reverse_drift(z[i], t, drift, score)
        b = (z[i - 1] - z[i] + reverse * dt) / scale
        back = back - flow._reverse_drift(back, t, drift, score) * dt + scale * b
    assert (back - z[0]).abs().max() < 1e-12


def test_samples_of_the_flow_have_the_variance_of_its_euler_steps() -> None:
    flow, g, v = DiffFlow(100), torch.Generator().manual_seed(0), 1.0
    x = flow.sample(torch.randn(20_000, 1, generator=g, dtype=torch.float64), drift, score, g)
    for t in flow.times[1:].flip(0).tolist():
        v = (1 - (1 / (1 + (VARIANCE - 1) * math.exp(-t)) - 0.5) * 0.04) ** 2 * v + 0.04
    assert abs(v - VARIANCE) < 0.03
    assert abs(float(x.var()) - v) < 5 * v * math.sqrt(2 / len(x))
    with pytest.raises(BadInput, match="above 0"):
        DiffFlow(horizon=0.0)


def test_the_drift_is_trained_through_the_chain() -> None:
    """The gradient of the loss in a weight of the drift, against differences."""
    flow, z = DiffFlow(5), torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(w: Tensor) -> Tensor:
        return flow.loss(z, lambda z, t: w * z, score, torch.Generator().manual_seed(1)).mean()

    w = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(w), w)
    difference = (loss(w.detach() + 1e-5) - loss(w.detach() - 1e-5)) / 2e-5
    assert abs(float(gradient - difference)) < 1e-6
