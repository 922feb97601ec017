"""Distribution guidance: the toy of the sheet, the gradient, the batch, and an exact mixture moved to a wanted ratio."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import BadInput
from hasten.exact import GaussianMixture
from hasten.guides import CFG, Distribution, DynamicThreshold
from hasten.nets.attributes import Attributes
from hasten.pick import format_spec, pick
from hasten.plan.draw import draw
from hasten.samplers import DDIM, UniPC
from hasten.sampling import Noise
from hasten.schedules import VPCosine
from hasten.times import UniformLambda
from tests.guides.test_features import setting


def linear_heads(W: Tensor, b: Tensor, name: str = "group") -> Attributes:
    """Classifiers of (D, 1, 1) features, the same at all times."""
    heads = Attributes((W.shape[1], 1, 1), {name: len(W)}, [0.5], pool=0)
    with torch.no_grad():
        heads.weight[name].copy_(W[None])
        heads.bias[name].copy_(b[None])
    return heads.requires_grad_(False)


class Still(nn.Module):
    """Its middle features are x_t itself, and they are its answer."""

    schedule, null_label = VPCosine(offset=0.0), None

    def features(self, x_t: Tensor, t: Any, **cond: Any) -> tuple[Tensor, Any]:
        return x_t[:, :, None, None], lambda changed: changed.flatten(1).to(x_t.dtype)

    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        return x_t.clone()


# ---- CHECK 15 ----


def toy(k: float) -> tuple[list[float], list[float]]:
    """pbar of the second cluster and L over 20 steps of `h -= k grad(64 L)`."""
    torch.manual_seed(0)
    centres = torch.zeros(2, 16)
    centres[0, 0], centres[1, 0] = -3.0, 3.0
    h = torch.randn(64, 16) + centres[torch.tensor([0] * 58 + [1] * 6)]
    # the guide's scale is in units of |W|^2, the mean squared distance of the weights from their mean: 9 here
    guide = Distribution(attribute="group", scale=9 * k, temperature=8.0, along="gradient")
    guide = guide.bind({}, {"attributes": linear_heads(centres, torch.zeros(2))})
    steered, shares, losses = guide.wrap(Still()), [], []
    for _ in range(21):
        logits = h @ centres.T
        shares.append(float(torch.softmax(logits / 8, 1)[:, 1].mean()))
        losses.append(float(guide.value(logits)))
        h = steered(h, 0.5)
    return shares, losses


def test_toy_of_the_sheet() -> None:
    shares, losses = toy(1)
    assert shares[0] == pytest.approx(0.180, abs=0.01) and losses[0] == pytest.approx(0.409, abs=0.03)
    assert shares[-1] == pytest.approx(0.465, abs=0.005)
    assert all(b < a for a, b in zip(losses, losses[1:]))
    shares, losses = toy(5)
    assert shares[-1] == pytest.approx(0.5, abs=1e-3) and losses[-1] < 1e-5
    assert all(b < a for a, b in zip(losses, losses[1:]) if a > 1e-9)
    shares, losses = toy(20)
    assert shares[-1] == pytest.approx(0.5, abs=0.01)
    assert any(b > a for a, b in zip(losses, losses[1:]))


def test_steps_are_repetitions() -> None:
    W, h = torch.randn(3, 6), torch.randn(20, 6)
    once = Distribution(attribute="group", scale=2.0, along="gradient").bind(
        {}, {"attributes": linear_heads(W, torch.randn(3))}
    )
    steered = once.wrap(Still())
    expected = steered(steered(steered(h, 0.5), 0.5), 0.5)
    assert torch.allclose(replace(once, steps=3).wrap(Still())(h, 0.5), expected, atol=1e-6)


# ---- the gradient ----


@pytest.mark.parametrize("options", [{"loss": "chi2"}, {"loss": "kl"}, {"target": 1}, {"classes": (0.2, 0.3, 0.5)}])
@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_slope_is_the_gradient(options: dict[str, Any], temperature: float) -> None:
    torch.manual_seed(1)
    B, heads = 10, linear_heads(torch.zeros(3, 4), torch.zeros(3))
    guide = Distribution(attribute="group", temperature=temperature, along="gradient", **options).bind(
        {}, {"attributes": heads}
    )
    logits = torch.randn(B, 3, dtype=torch.float64, requires_grad=True)
    factor = 1 if "target" in options else B
    (by_autograd,) = torch.autograd.grad(factor * guide.value(logits), logits)
    found = guide.gradient(logits.detach())
    assert (found - by_autograd).abs().max() < 1e-12
    step = 1e-5
    for b, k in ((0, 0), (3, 2), (9, 1)):
        near = [logits.detach().clone() for _ in range(2)]
        near[0][b, k] += step
        near[1][b, k] -= step
        by_difference = factor * (guide.value(near[0]) - guide.value(near[1])) / (2 * step)
        assert float(by_difference) == pytest.approx(float(found[b, k]), rel=1e-5, abs=1e-9)


def test_kl_of_a_class_that_nobody_is() -> None:
    heads = linear_heads(torch.zeros(2, 4), torch.zeros(2))
    guide = Distribution(attribute="group", loss="kl", along="gradient").bind({}, {"attributes": heads})
    logits = torch.tensor([[300.0, -300.0]]).repeat(8, 1)
    assert bool(torch.isfinite(guide.value(logits))) and bool(torch.isfinite(guide.gradient(logits)).all())


def test_a_step_does_not_depend_on_the_size_of_the_batch() -> None:
    torch.manual_seed(2)
    heads = linear_heads(torch.randn(3, 6), torch.randn(3))
    for options in ({}, {"target": 2}):
        guide = Distribution(attribute="group", scale=5.0, along="gradient", **options).bind({}, {"attributes": heads})
        h = torch.randn(9, 6)
        assert torch.allclose(guide.wrap(Still())(h.repeat(4, 1), 0.5)[:9], guide.wrap(Still())(h, 0.5), atol=1e-6)


def test_a_step_does_not_depend_on_the_scale_of_the_features() -> None:
    torch.manual_seed(3)
    W, b, h = torch.randn(3, 6), torch.randn(3), torch.randn(12, 6)
    small = Distribution(attribute="group", scale=5.0, along="gradient").bind({}, {"attributes": linear_heads(W, b)})
    large = Distribution(attribute="group", scale=5.0, along="gradient").bind(
        {}, {"attributes": linear_heads(W / 100, b)}
    )
    assert torch.allclose(small.wrap(Still())(h, 0.5) * 100, large.wrap(Still())(h * 100, 0.5), atol=1e-3)


# ---- as a denoiser ----


def bound(**options: Any) -> tuple[Any, Distribution]:
    denoiser, _, _ = setting()
    torch.manual_seed(4)
    heads = Attributes((16, 4, 4), {"group": 2, "tone": 3}, [0.2, 0.8], pool=2, means=True)
    with torch.no_grad():
        for p in heads.parameters():
            p.normal_(std=0.1)
    guide = Distribution(**{"attribute": "group", "scale": 20.0} | options)
    return denoiser, guide.bind({}, {"attributes": heads.requires_grad_(False)})


def test_it_moves_the_middle_and_only_where_it_is_told() -> None:
    denoiser, guide = bound(start=0.7, stop=0.3)
    x = torch.randn(12, 1, 8, 8)
    steered = guide.wrap(denoiser)
    for t in (0.8, 0.2):
        assert torch.equal(steered(x, t), denoiser(x, t))
    middle, finish = denoiser.features(x, 0.5)
    W, b = guide.heads.at("group", 0.5)
    h = middle.flatten(1)
    means = guide.heads.mean["group"].mean(0)  # half way between the knots
    for along, ways in (("gradient", W / (W - W.mean(0)).square().sum(1).mean()), ("means", means - means.mean(0))):
        moved = h - 20.0 * guide.gradient(h @ W.T + b) @ ways
        found = replace(guide, along=along).wrap(denoiser)(x, 0.5)
        assert torch.allclose(found, finish(moved.reshape(middle.shape)), atol=1e-6)
        assert (found - denoiser(x, 0.5)).abs().max() > 1e-4


def test_times_of_each_sample_make_batches_of_equal_times() -> None:
    denoiser, guide = bound(start=0.7)
    x, steered = torch.randn(24, 1, 8, 8), guide.wrap(denoiser)
    t = torch.tensor([0.6, 0.3, 0.9], dtype=torch.float64).repeat(8)
    together = steered(x, t)
    for time in (0.6, 0.3, 0.9):
        assert torch.allclose(together[t == time], steered(x[t == time], time), atol=1e-6)


def test_two_attributes_add_their_gradients() -> None:
    denoiser, first = bound()
    second = bound(attribute="tone", classes=(0.5, 0.25, 0.25), scale=7.0)[1]
    second = replace(second, heads=first.heads)
    x = torch.randn(10, 1, 8, 8)
    middle = denoiser.features(x, 0.4)[0]
    shifts = [guide.wrap(denoiser).features(x, 0.4)[0] - middle for guide in (first, second)]
    both = second.wrap(first.wrap(denoiser))
    assert torch.allclose(both.features(x, 0.4)[0], middle + shifts[0] + shifts[1], atol=1e-5)
    assert torch.allclose(both(x, 0.4), first.wrap(second.wrap(denoiser))(x, 0.4), atol=1e-4)
    apart = second.wrap(DynamicThreshold(least=100.0).wrap(first.wrap(denoiser)))  # not next to each other: in turn
    moved = first.wrap(denoiser).features(x, 0.4)[0]
    assert not torch.equal(apart.features(x, 0.4)[0], moved)


def test_it_needs_no_gradients_and_keeps_float32_under_autocast() -> None:
    denoiser, guide = bound()
    x = torch.randn(8, 1, 8, 8)
    with torch.inference_mode():
        inside = guide.wrap(denoiser)(x, 0.4)
    assert torch.allclose(inside, guide.wrap(denoiser)(x, 0.4), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        middle, _ = guide.wrap(denoiser).features(x, 0.4)
        assert middle.dtype == torch.float32
        assert (guide.wrap(denoiser)(x, 0.4) - inside).abs().max() < 0.1


def test_around_guidance() -> None:
    denoiser, guide = bound()
    x, label = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    guided = CFG(2.0).wrap(denoiser)
    middle, finish = guided.features(x, 0.4, label=label)
    moved = guide.wrap(guided).features(x, 0.4, label=label)[0]
    assert torch.allclose(guide.wrap(guided)(x, 0.4, label=label), finish(moved), atol=1e-6)
    assert (moved - middle).abs().max() > 1e-4


def test_few_samples_are_noise_and_it_says_so() -> None:
    denoiser, guide = bound()
    with pytest.warns(UserWarning, match="a batch of 3 is noise"):
        guide.wrap(denoiser)(torch.randn(3, 1, 8, 8), 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(guide, target=1).wrap(denoiser)(torch.randn(3, 1, 8, 8), 0.4)


# ---- an exact model ----


class Mixture(nn.Module):
    """Two clusters, nine to one, in 8 dimensions; the middle features are x_t, of which the true class is a linear
    logistic function at every time."""

    null_label = None

    def __init__(self) -> None:
        super().__init__()
        self.schedule = VPCosine(offset=0.0)
        self.means = torch.zeros(2, 8, dtype=torch.float64)
        self.means[0, 0], self.means[1, 0] = -1.0, 1.0
        self.exact = GaussianMixture(torch.tensor([0.9, 0.1]), self.means, torch.full((2, 8), 0.15), self.schedule)

    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        return self.exact(x_t, t)

    def features(self, x_t: Tensor, t: Any, **cond: Any) -> tuple[Tensor, Any]:
        return x_t[:, :, None, None], lambda changed: self.exact(changed.flatten(1).to(x_t.dtype), t)

    def heads(self) -> Attributes:
        t = torch.linspace(0.001, 1, 33, dtype=torch.float64)
        a, s = self.schedule.alpha(t)[:, None, None], self.schedule.sigma(t)[:, None, None]
        variance = a**2 * 0.15 + s**2
        heads = Attributes((8, 1, 1), {"group": 2}, t.tolist(), pool=0, means=True).requires_grad_(False)
        heads.mean["group"].copy_(a * self.means)
        heads.weight["group"].copy_(a * self.means / variance)
        prior = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
        heads.bias["group"].copy_(prior - ((a * self.means).square() / (2 * variance)).sum(-1))
        return heads


@pytest.mark.parametrize("along, scale", [("gradient", 4.0), ("means", 16.0)])
@pytest.mark.parametrize("sampler", [UniPC(), DDIM()], ids=["unipc", "ddim"])
def test_an_exact_mixture_gets_the_wanted_shares(sampler: Any, along: Any, scale: float) -> None:
    model = Mixture()
    parts = {"attributes": model.heads()}

    def share(guide: Distribution | None, seed: int = 0) -> tuple[float, float]:
        """Of the rare cluster, and the variance across the clusters, which guidance must leave alone."""
        denoiser = model if guide is None else guide.bind({}, parts).wrap(model)
        noise = Noise(range(seed, seed + 200), (8,), torch.float64)
        x = draw(denoiser, sampler, UniformLambda(low=0.03), noise, steps=20)
        return float((x[:, 0] > 0).double().mean()), float(x[:, 1:].var())

    guide = Distribution(attribute="group", scale=scale, along=along)
    assert share(None)[0] == pytest.approx(0.1, abs=0.04)
    assert share(guide)[0] == pytest.approx(0.5, abs=0.05)
    assert share(replace(guide, classes=(0.3, 0.7)))[0] == pytest.approx(0.7, abs=0.06)
    assert share(replace(guide, classes=(0.95, 0.05)))[0] == pytest.approx(0.05, abs=0.04)
    assert share(replace(guide, target=1, scale=10 * scale))[0] > 0.9
    assert share(guide)[1] == pytest.approx(share(None)[1], rel=0.05)


# ---- text, errors ----


def test_spelled() -> None:
    guide = pick("guides", "distribution:attribute=group,classes=(0.5,0.5),scale=20,loss=kl")
    assert guide == Distribution(classes=(0.5, 0.5), attribute="group", scale=20.0, loss="kl")
    assert pick("guides", "distribution:classes=uniform") == Distribution()
    assert (
        format_spec(replace(bound()[1], classes=(0.3, 0.7)))
        == "distribution:classes=(0.3,0.7),attribute=group,scale=20"
    )


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Distribution(classes=(1.0,)), "at least two positive"),
        (lambda: Distribution(classes=(0.5, -0.5)), "at least two positive"),
        (lambda: Distribution(start=0.2, stop=0.5), "stop <= start"),
        (lambda: Distribution(temperature=0.0), "temperature > 0"),
        (lambda: Distribution(steps=0), "steps >= 1"),
        (lambda: Distribution(scale=float("nan")), "finite scale"),
        (lambda: Distribution(loss="chi"), "loss='chi'.*chi2"),
        (lambda: Distribution().bind({}, {}), "hasten tune MODEL --method attributes"),
        (lambda: Distribution().wrap(Still()), "not bound"),
        (lambda: bound(attribute="grup"), "unknown attribute 'grup'.*group"),
        (lambda: bound(classes=(0.2, 0.3, 0.5)), "has 2 classes, found 3 fractions"),
        (lambda: Distribution(along="mean"), "along=.mean..*means"),
        (
            lambda: Distribution(attribute="a").bind({}, {"attributes": Attributes((2, 1, 1), {"a": 2}, [0.5], 0)}),
            "no class means: use along=gradient",
        ),
        (lambda: bound(target=2), "classes 0 .. 1, found target 2"),
        (lambda: bound()[1].wrap(nn.Identity()), "no middle features"),
    ],
)
def test_bad_input(make: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        make()
