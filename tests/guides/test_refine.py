"""Guides that refine guidance, and the threshold: interval, rescale, dynamic_threshold."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.errors import BadInput
from hasten.exact import Gaussian, m2, m64
from hasten.guides import CFG, DynamicThreshold, Interval, Rescale
from hasten.guides.cfg import GuidedDenoiser
from hasten.pick import format_spec, method_names, pick
from hasten.plan.draw import draw
from hasten.samplers import UniPC
from hasten.sampling import Count, Noise
from hasten.schedules import VPCosine, VPLinear
from hasten.times import UniformLambda

LABELS = [0, 0, 1, 1, 2, 2]
LABEL = torch.tensor([0, 1, 2, 1])


def test_interval_replaces_that_of_the_guidance() -> None:
    model = m2(VPLinear(), labels=LABELS)
    z = torch.randn(4, 2, dtype=torch.float64)
    guided = Interval(low=0.3, high=2.0).wrap(CFG(3.0, interval=(0.0, 1.0), rescale=0.5).wrap(model))
    direct = CFG(3.0, interval=(0.3, 2.0), rescale=0.5).wrap(model)
    for t in (0.05, 0.3, 0.5, 0.9):
        assert torch.equal(guided(z, t, label=LABEL), direct(z, t, label=LABEL))


def test_interval_everywhere_is_plain_and_inside_it_counts() -> None:
    """CHECK 15: (0, inf] is plain guidance bit by bit; two branches only in the steps that lie inside."""
    schedule = VPLinear()
    times = UniformLambda()(schedule, 12)
    q = schedule.q(times[:-1])
    low, high = float(q[9]) * 1.0001, float(q[4]) * 1.0001
    inside = int(((q > low) & (q <= high)).sum())
    assert inside == 5
    results = {}
    for name, guide, expected in (
        ("plain", None, 24),
        ("everywhere", Interval(), 24),
        ("some", Interval(low, high), 12 + inside),
    ):
        counted = Count(m2(schedule, labels=LABELS))
        guided = CFG(2.0).wrap(counted)
        guided = guided if guide is None else guide.wrap(guided)
        results[name] = draw(guided, UniPC(), times, Noise(range(4), (2,)), label=LABEL)
        assert (counted.calls, counted.rows) == (12, 4 * expected)
    assert torch.equal(results["plain"], results["everywhere"])
    assert not torch.equal(results["plain"], results["some"])


def test_rescale_replaces_that_of_the_guidance() -> None:
    """CHECK 15: with amount 1 the standard deviation is that of the conditional model exactly."""
    model = m64(VPLinear(), labels=[0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    z = torch.randn(4, 64, dtype=torch.float64)
    cond = model(z, 0.5, label=LABEL)
    full = Rescale(1.0).wrap(CFG(5.0).wrap(model))(z, 0.5, label=LABEL)
    assert (full.std(1) - cond.std(1)).abs().max() < 1e-12
    assert torch.equal(
        Rescale(0.7).wrap(CFG(5.0).wrap(model))(z, 0.5, label=LABEL),
        CFG(5.0, rescale=0.7).wrap(model)(z, 0.5, label=LABEL),
    )


def test_they_find_guidance_under_other_wrappers_and_leave_the_original_alone() -> None:
    model = m2(VPLinear(), labels=LABELS)
    z = torch.randn(4, 2, dtype=torch.float64)
    inner = CFG(3.0).wrap(model)
    outer = DynamicThreshold(0.9, 0.5).wrap(inner)
    before = outer(z, 0.4, label=LABEL)
    both = Rescale(0.5).wrap(Interval(0.1, 2.0).wrap(outer))
    expected = DynamicThreshold(0.9, 0.5).wrap(CFG(3.0, (0.1, 2.0), 0.5).wrap(model))
    assert torch.equal(both(z, 0.4, label=LABEL), expected(z, 0.4, label=LABEL))
    assert torch.equal(outer(z, 0.4, label=LABEL), before) and outer.denoiser is inner
    assert isinstance(inner, GuidedDenoiser) and inner.guide == CFG(3.0)


@pytest.mark.parametrize("least", [1.0, 0.25])
def test_threshold_formula(least: float) -> None:
    torch.manual_seed(0)
    scale = torch.tensor([0.05, 0.3, 1.0, 4.0])
    # a Gaussian at t = 0: the denoiser answers what it is asked
    model = Gaussian(torch.zeros(1, 20, 20), torch.ones(1, 20, 20), VPCosine(offset=0.0))
    x = torch.randn(4, 1, 20, 20, dtype=torch.float64) * scale.view(4, 1, 1, 1)
    found = DynamicThreshold(0.9, least).wrap(model)(x, 0.0)
    for image, before in zip(found, x):
        S = max(float(before.abs().flatten().sort().values.quantile(0.9)), least)
        assert (image - before.clamp(-S, S) * least / S).abs().max() < 1e-12
        assert image.abs().max() <= least * (1 + 1e-12)
        # the share that saturates is the share above the quantile, for samples that were scaled
        saturated = float((image.abs() > least * (1 - 1e-9)).double().mean())
        assert saturated == pytest.approx(0.1, abs=0.01) if S > least else saturated <= 0.1
    inside = x[:1] / x[:1].abs().max() * least * 0.99
    assert torch.equal(DynamicThreshold(0.9, least).wrap(model)(inside, 0.0), model(inside, 0.0))


def test_threshold_per_sample() -> None:
    model = Gaussian(torch.zeros(30), torch.ones(30), VPCosine(offset=0.0))
    x = torch.randn(3, 30) * torch.tensor([[0.5], [2.0], [5.0]])
    guided = DynamicThreshold(0.8).wrap(model)
    alone = torch.cat([guided(x[k : k + 1], 0.1) for k in range(3)])
    assert torch.equal(guided(x, 0.1), alone)
    assert guided(x.half(), 0.1).dtype == torch.float16


def test_threshold_keeps_strong_guidance_in_range() -> None:
    """Guidance 12 on the mixture leaves [-1.2, 1.2] far behind; thresholded it cannot."""
    schedule, label = VPLinear(), torch.arange(64) % 3
    model = CFG(12.0).wrap(m64(schedule, labels=[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]))
    free, kept = (
        draw(den, UniPC(), UniformLambda(), Noise(range(64), (64,)), steps=10, label=label)
        for den in (model, DynamicThreshold(0.995).wrap(model))
    )
    assert free.abs().max() > 3.0 and kept.abs().max() < 1.1


def test_spelled() -> None:
    assert {"cfg", "interval", "rescale", "dynamic_threshold", "distribution"} <= set(method_names("guides"))
    assert pick("guides", "interval:low=0.2,high=1.5") == Interval(0.2, 1.5)
    assert format_spec(Interval(0.2, 1.5)) == "interval:low=0.2,high=1.5"
    assert pick("guides", "rescale:amount=0.5") == Rescale(0.5)
    assert pick("guides", "dynamic_threshold:quantile=0.99") == DynamicThreshold(0.99)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Interval(2.0, 1.0), "low < high"),
        (lambda: Interval(-1.0, 1.0), "low < high"),
        (lambda: Interval(math.nan, 1.0), "low < high"),
        (lambda: Rescale(1.5), "amount in"),
        (lambda: DynamicThreshold(0.0), "quantile in"),
        (lambda: DynamicThreshold(least=0.0), "least > 0"),
        (
            lambda: Interval(0.1, 1.0).wrap(m2(VPLinear())),
            "interval narrows guidance: give a guidance scale other than 1",
        ),
        (lambda: Rescale().wrap(m2(VPLinear())), "rescale tames guidance: give a guidance scale other than 1"),
        (lambda: Rescale().wrap(DynamicThreshold().wrap(m2(VPLinear()))), "rescale tames guidance"),
    ],
)
def test_bad_input(make: object, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()  # type: ignore[operator]
