"""DeepCache against the plain sampler, its own formula and its cost; the shallow part of the U-Net."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.accelerators.deep_cache import DeepCache
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.nets.unet import UNet
from hasten.performance.cost import macs
from hasten.pick import pick
from hasten.samplers import DDIM

from ._tiny import LABEL, SHAPE, Transformer, compiled, context_of, denoiser_of, random_, relative, sampled, unet

DDIM20 = compiled(DDIM(), 20)


def cached(denoiser: Denoiser, plan: Any = DDIM20, **options: Any) -> Any:
    return DeepCache(**options).apply(denoiser, context_of(plan, denoiser))


@torch.no_grad()
@pytest.mark.parametrize(
    "shape",
    [
        {"widths": (8, 16), "blocks": 1, "patch": 2},
        {"widths": (8,), "blocks": 2},
        {"widths": (8, 16, 16), "blocks": 2, "attention": (0, 1)},
        {"widths": (8, 16), "blocks": 3},
    ],
)
def test_the_parts_compose_to_the_network(shape: dict[str, Any]) -> None:
    """For every branch: bit for bit, and with the layers of its split point."""
    net = random_(UNet(1, **shape))
    x, time = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])
    emb, whole = net.embed(time), net(x, time)
    skips, middle = net.encode(x, emb)
    assert torch.equal(net.decode(skips, middle, emb), whole)
    assert len(skips) == sum(len(row) for row in net.up)
    for branch in (None, *range(net.branches + 1)):
        first = net.shallow_encode(x, emb, branch)
        assert len(first) == 1 + (net.branches if branch is None else branch)
        assert all(torch.equal(one, other) for one, other in zip(first, skips))
        up_input = net.deep(first, emb)
        assert torch.equal(net.shallow_decode(first, up_input, emb), whole)
        assert not torch.equal(net.shallow_decode(first, 2 * up_input, emb), whole)
        parts = [macs(net.shallow_encode, x, emb, branch), macs(net.deep, first, emb)]
        assert sum(parts) + macs(net.shallow_decode, first, up_input, emb) == macs(net, x, time) - macs(net.embed, time)
    with pytest.raises(ValueError, match="branch must be"):
        net.shallow_encode(x, emb, net.branches + 1)


@pytest.mark.parametrize("branch", [None, 0])
def test_with_key_steps_alone_it_is_the_plain_sampler(branch: int | None) -> None:
    plain = denoiser_of(unet())
    for name in ("ddim", "heun", "dpm:order=2", "ddpm"):
        plan = compiled(pick("samplers", name), 12)
        fast = cached(plain, plan, every=1, branch=branch, extrapolate=1)
        assert torch.equal(sampled(fast, plan), sampled(plain, plan)), name
        assert 1e-6 < relative(sampled(cached(plain, plan, every=3), plan), sampled(plain, plan)) < 1, name


@torch.no_grad()
def test_outputs_are_those_of_the_formula() -> None:
    net = unet()
    plain, times = denoiser_of(net), DDIM20.times
    x = torch.randn(20, 3, *SHAPE, generator=torch.Generator().manual_seed(3))
    schedule = plain.schedule
    angle = torch.atan2(schedule.sigma(times), schedule.alpha(times))

    def emb(k: int) -> torch.Tensor:
        return net.embed(times[k].float().expand(3), LABEL)

    def deep(k: int) -> torch.Tensor:
        return net.deep(net.shallow_encode(x[k], emb(k)), emb(k))

    for extrapolate in (0, 1):
        fast = cached(plain, every=4, extrapolate=extrapolate)
        for k in range(12):
            result, i = fast(x[k], times[k], label=LABEL), k - k % 4
            up_input = deep(i)
            if extrapolate and i >= 8:
                up_input = up_input + (angle[k] - angle[i]) / (angle[i] - angle[i - 4]) * (up_input - deep(i - 4))
            raw = net.shallow_decode(net.shallow_encode(x[k], emb(k)), up_input.float(), emb(k))
            expected = schedule.alpha(times[k]) * x[k] - schedule.sigma(times[k]) * raw
            torch.testing.assert_close(result, expected.float(), rtol=1e-4, atol=1e-5)
        assert (fast.encoder_calls, fast.decoder_calls, fast.queries) == (3, 12, 12)


def test_cost_is_what_the_formula_predicts() -> None:
    net = unet(widths=(16, 32), attention=(0, 1))
    plain = denoiser_of(net)
    x, time = torch.randn(3, *SHAPE), torch.full((3,), 0.5)
    emb = net.embed(time, LABEL)
    for branch in (0, 1):
        share = macs(net.deep, net.shallow_encode(x, emb, branch), emb) / macs(net, x, time, LABEL)
        fast = cached(plain, branch=branch, every=4)
        result = macs(sampled, plain, DDIM20) / macs(sampled, fast, DDIM20)
        assert result == pytest.approx(fast.expected_speedup(share), rel=0.01)
        assert result > 1.3


def test_more_key_steps_are_better() -> None:
    plain = denoiser_of(unet(attention=(1,)))
    target = sampled(plain, DDIM20, seed=50)

    def error(**options: Any) -> float:
        return relative(sampled(cached(plain, **options), DDIM20, seed=50), target)

    uniform = {every: error(every=every) for every in (2, 4, 8)}
    assert 0 < uniform[2] < uniform[4] < uniform[8]


def test_key_steps_by_budget_and_around_a_center() -> None:
    plain = denoiser_of(unet(attention=(1,)))
    for options, count in (({"every": 4}, 5), ({"every": 2, "budget": 7}, 7)):
        keys = cached(plain, keys="found", samples=3, **options).keys
        assert len(keys) == count and keys[0] == 0
    around = cached(plain, every=4, keys="around", center=6, power=1.2).keys
    assert len(around) == 5 and around[0] == 0 and min(abs(key - 6) for key in around) <= 1


def test_unsupported_options_and_networks_raise() -> None:
    plain = denoiser_of(unet())
    with pytest.raises(BadInput, match="deep_cache reuses .* found 8"):
        cached(plain, compiled(DDIM(), 8))
    with pytest.raises(BadInput, match="11 of 20 model evaluations would depend on key step 0"):
        cached(plain, every=11)
    with pytest.raises(BadInput, match="Transformer has no shallow part: supported is a U-Net with embed"):
        cached(denoiser_of(random_(Transformer())))
    with pytest.raises(BadInput, match="branch must be 0 to 1, found 2"):
        cached(plain, branch=2)
    with pytest.raises(BadInput, match="every and samples are 1 or more"):
        DeepCache(every=0)
    with pytest.raises(BadInput, match="made for t = 0.98 at model evaluation 0"):
        cached(plain)(torch.zeros(1, *SHAPE), 0.3)


class Foreign(nn.Module):
    """A network with a shallow part and no word of branches."""

    null_label = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = unet()

    def __getattr__(self, name: str) -> Any:
        return (
            getattr(super().__getattr__("net"), name)
            if name in ("embed", "deep", "shallow_decode")
            else (super().__getattr__(name))
        )

    def shallow_encode(self, x: torch.Tensor, emb: torch.Tensor) -> Any:
        return self.net.shallow_encode(x, emb)

    def forward(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.net(x, time, label)


def test_a_network_without_branches() -> None:
    plain = denoiser_of(Foreign())
    same = sampled(cached(denoiser_of(unet())), DDIM20)
    assert torch.equal(sampled(cached(plain), DDIM20), same)
    with pytest.raises(BadInput, match="branch must be none for this network, found 0"):
        cached(plain, branch=0)
