"""Classifier-free guidance: the formula, the interval, the rescale, and what each of them costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.exact import m2
from hasten.guides import CFG
from hasten.plan.draw import draw
from hasten.predictions import prediction_from, spread
from hasten.samplers import UniPC
from hasten.sampling import Count, Noise
from hasten.schedules import Flow, VPCosine, VPLinear
from hasten.times import UniformLambda

LABELS = [0, 0, 1, 1, 2, 2]


class Net(nn.Module):
    """A small class-conditional network; `null_label` is its last class."""

    null_label = 4

    def __init__(self, D: int = 6) -> None:
        super().__init__()
        self.classes = nn.Embedding(5, D)
        self.line = nn.Linear(D, D)

    def forward(self, x: Tensor, time: Tensor, label: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return torch.tanh(self.line(x) + self.classes(label) + time[:, None]) * scale


def setting(prediction: str = "v", B: int = 5) -> tuple[Denoiser, Tensor, Tensor]:
    torch.manual_seed(0)
    denoiser = Denoiser(Net().double(), VPCosine(offset=0.0), prediction).requires_grad_(False)
    return denoiser, torch.randn(B, 6, dtype=torch.float64), torch.arange(B) % 4


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])])
def test_formula(t: Any) -> None:
    denoiser, x, label = setting()
    cond, uncond = denoiser(x, t, label=label), denoiser(x, t, label=torch.full((5,), 4))
    for scale in (0.0, 0.5, 3.0, -1.0):
        guided = CFG(scale=scale).wrap(denoiser)(x, t, label=label)
        assert (guided - (uncond + scale * (cond - uncond))).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["eps", "v", "flow", "edm"])
def test_guiding_any_output_is_the_same(name: str) -> None:
    """Guidance of the raw output, converted, equals guidance of x0 to 1e-12."""
    denoiser, x, label = setting(name)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    raw_cond, raw_uncond = (denoiser.raw(x, t, label=c) for c in (label, torch.full((5,), 4)))
    raw = raw_uncond + 2.5 * (raw_cond - raw_uncond)
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    _, skip, out = prediction_from(name).coefficients(alpha, sigma)
    expected = spread(skip, x) * x + spread(out, x) * raw
    assert (CFG(scale=2.5).wrap(denoiser)(x, t, label=label) - expected).abs().max() < 1e-12


def test_scale_one_is_the_denoiser_itself() -> None:
    denoiser = setting()[0]
    assert CFG().wrap(denoiser) is denoiser and CFG(scale=1, rescale=0.7).wrap(denoiser) is denoiser


def test_one_batch_of_two_branches_and_conditions_doubled() -> None:
    denoiser, x, label = setting()
    counted = Count(denoiser)
    guided = CFG(scale=2.0).wrap(counted)
    per_sample = torch.rand(5, 1, dtype=torch.float64)
    found = guided(x, 0.4, label=label, scale=per_sample)
    assert (counted.calls, counted.rows) == (1, 10)
    cond = denoiser(x, 0.4, label=label, scale=per_sample)
    uncond = denoiser(x, 0.4, label=torch.full((5,), 4), scale=per_sample)
    assert (found - (2 * cond - uncond)).abs().max() < 1e-12
    assert guided.schedule == denoiser.schedule and guided.null_label == 4 and guided.prediction.name == "v"


def test_interval_everywhere_is_plain_guidance_bit_by_bit() -> None:
    schedule = Flow()  # from pure noise, q = inf, to q = 0
    model, label = m2(schedule, labels=LABELS), torch.tensor([0, 1, 2, 1])
    results = []
    for guide in (CFG(scale=2.0), CFG(scale=2.0, interval=(0.0, float("inf")))):
        counted = Count(model)
        results.append(draw(guide.wrap(counted), UniPC(), UniformLambda(), Noise(range(4), (2,)), steps=8, label=label))
        assert (counted.calls, counted.rows) == (8, 64)
    assert torch.equal(*results)


def test_interval_skips_the_second_branch_outside() -> None:
    schedule, label = VPLinear(), torch.tensor([0, 1, 2, 1])
    times = UniformLambda()(schedule, 16)
    q = schedule.q(times[:-1])
    low, high = float(q[10]), float(q[3])  # (low, high]: the node at high is inside, the one at low is not
    counted = Count(m2(schedule, labels=LABELS))
    guided = CFG(scale=3.0, interval=(low * (1 + 1e-12), high * (1 + 1e-12))).wrap(counted)
    draw(guided, UniPC(), times, Noise(range(4), (2,)), label=label)
    inside = int(((q > low * (1 + 1e-12)) & (q <= high * (1 + 1e-12))).sum())
    assert inside == 7 and counted.calls == 16 and counted.rows == 4 * (16 + inside)


def test_interval_per_sample() -> None:
    denoiser, x, label = setting()
    t = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
    guide = CFG(scale=2.0, interval=(0.3, 3.0))
    found = guide.wrap(denoiser)(x, t, label=label)
    everywhere, nowhere = CFG(scale=2.0).wrap(denoiser)(x, t, label=label), denoiser(x, t, label=label)
    inside = (denoiser.schedule.q(t) > 0.3) & (denoiser.schedule.q(t) <= 3.0)
    assert inside.tolist() == [False, True, True, True, False]
    assert torch.equal(found[inside], everywhere[inside]) and torch.equal(found[~inside], nowhere[~inside])
    single = torch.stack([guide.wrap(denoiser)(x[i : i + 1], t[i], label=label[i : i + 1])[0] for i in range(5)])
    assert (found - single).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["eps", "x0", "v", "flow", "edm"])
def test_rescale_one_restores_the_deviation_of_the_output(name: str) -> None:
    denoiser, x, label = setting(name)
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    _, skip, out = (
        spread(c, x) for c in prediction_from(name).coefficients(denoiser.schedule.alpha(t), denoiser.schedule.sigma(t))
    )
    plain, full, half = (CFG(scale=4.0, rescale=r).wrap(denoiser)(x, t, label=label) for r in (0.0, 1.0, 0.5))
    cond = denoiser.raw(x, t, label=label).std(1)
    assert (((full - skip * x) / out).std(1) - cond).abs().max() < 1e-10
    assert (((plain - skip * x) / out).std(1) - cond).abs().min() > 1e-3
    assert (half - (plain + full) / 2).abs().max() < 1e-10
    model = m2(VPLinear(), labels=LABELS)  # no network output: x0 itself
    z, label = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0, 1, 2])
    found = CFG(scale=4.0, rescale=1.0).wrap(model)(z, 0.5, label=label)
    assert (found.std(1) - model(z, 0.5, label=label).std(1)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: CFG(scale=float("nan")), "finite scale"),
        (lambda: CFG(scale=2, interval=(2.0, 1.0)), "q_lo < q_hi"),
        (lambda: CFG(scale=2, rescale=1.5), "rescale"),
        (lambda: CFG(scale=2).wrap(m2(VPLinear())), "null label"),
        (lambda: CFG(scale=2).wrap(setting()[0])(torch.randn(1, 6), 0.5), "needs label="),
    ],
)
def test_bad_input(make: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()  # type: ignore[operator]


def test_the_raw_output_under_guidance_is_the_one_behind_the_guided_x0() -> None:
    """The same answer by the network's own quantity: raw guided, then read as x0."""
    net, x, label = setting()
    guided, t = CFG(3.0).wrap(net), torch.tensor([0.1, 0.2, 0.5, 0.7, 1.0], dtype=torch.float64)
    alpha, sigma = spread(net.schedule.alpha(t), x), spread(net.schedule.sigma(t), x)
    raw = guided.raw(x, t, label=label)
    torch.testing.assert_close(alpha * x - sigma * raw, guided(x, t, label=label), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(raw, net.raw(x, t, label=label), atol=1e-2)
    with pytest.raises(BadInput, match="rescale"):
        CFG(3.0, rescale=0.5).wrap(net).raw(x, t, label=label)
