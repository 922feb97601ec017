"""Compiled networks: the same outputs, the same split points, a limited number of graphs, and errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators import SamplingContext, accelerate
from hasten.accelerators.compile import Compile
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.nets.unet import UNet
from hasten.pick import pick
from hasten.schedules import VPCosine

TRACED = Compile(backend="eager")  # all but the writing of C++


def denoiser(seed: int = 0, **more: Any) -> Denoiser:
    """A small U-Net with no layer at zero."""
    torch.manual_seed(seed)
    net = UNet(1, widths=(8,), classes=3, **more)
    for p in net.parameters():
        p.data = torch.randn_like(p) * 0.15
    return Denoiser(net.eval().requires_grad_(False), VPCosine(), "v")


def sample_inputs(rows: int = 2, side: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 1, side, side, generator=generator), torch.arange(rows) % 4


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_outputs_are_the_networks_and_its_weights_are_shared() -> None:
    plain = denoiser()
    before = copy.deepcopy(plain.net.state_dict())
    fast = accelerate(plain, [TRACED])
    x, label = sample_inputs()
    with torch.no_grad():
        for t in (0.9, 0.3):
            assert off(fast(x, t, label=label), plain(x, t, label=label)) < 1e-5
        assert off(fast(x, 0.3), plain(x, 0.3)) < 1e-5  # without labels
    assert type(plain.net) is UNet and fast.net is not plain.net
    assert {id(p) for p in fast.parameters()} == {id(p) for p in plain.parameters()}
    assert all(torch.equal(value, before[key]) for key, value in plain.net.state_dict().items())
    for name in ("null_label", "guidance_range", "step_counts"):
        assert getattr(fast, name) == getattr(plain, name)
    assert fast.net.config == plain.net.config and fast.net.multiple == 1


def test_split_points_are_compiled_and_agree_with_the_network() -> None:
    fast, plain = accelerate(denoiser(), [TRACED]), denoiser()
    x, label = sample_inputs()
    with torch.no_grad():
        emb = fast.net.embed(torch.full((2,), 0.5), label=label)
        skips, middle = fast.net.encode(x, emb)
        later = fast.net.embed(torch.full((2,), 0.4), label=label)
        truth = plain.net.decode(*plain.net.encode(x, emb), later)
        assert off(fast.net.decode(skips, middle, later), truth) < 1e-5
        seam, finish = fast.features(x, 0.5, label=label)
        assert off(finish(seam), plain(x, 0.5, label=label)) < 1e-5
    assert {one.part for one in fast.net.built} == {"embed", "encode", "decode"}


class Tokens(nn.Module):
    """A transformer with split points."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def embed(self, x: Tensor, time: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return x.flatten(1).unflatten(1, (-1, 4)), (time[:, None, None],)

    def run(self, first: int, last: int, tokens: Tensor, emb: tuple[Tensor]) -> Tensor:
        for block in self.blocks[first:last]:
            tokens = torch.tanh(block(tokens) + emb[0])
        return tokens

    def finish(self, tokens: Tensor, emb: tuple[Tensor]) -> Tensor:
        return tokens.flatten(1).unflatten(1, (1, 4, 4)) * (1 + emb[0][..., None])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        tokens, emb = self.embed(x, time)
        return self.finish(self.run(0, 3, tokens, emb), emb)


def test_a_transformer_has_its_split_points() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 4, 4)
    tokens = Tokens().requires_grad_(False)
    fast = accelerate(Denoiser(tokens, VPCosine(), "v"), [TRACED])
    with torch.no_grad():
        assert off(fast(x, 0.5), Denoiser(tokens, VPCosine(), "v")(x, 0.5)) < 1e-5
        inner, emb = fast.net.embed(x, torch.full((3,), 0.5))
        parted = fast.net.run(2, 3, fast.net.run(0, 2, inner, emb), emb)
        assert off(fast.net.finish(parted, emb), tokens(x, torch.full((3,), 0.5))) < 1e-5
    assert [one.part for one in fast.net.built].count("run") == 3


def test_a_network_without_split_points_is_compiled_as_one() -> None:
    x, plain = torch.randn(3, 1, 4, 4), Denoiser(Scaled(2.0), VPCosine(), "v")
    whole = accelerate(plain, [TRACED])
    with torch.no_grad():
        assert off(whole(x, 0.5), plain(x, 0.5)) < 1e-6
    assert [one.part for one in whole.net.built] == ["forward"]


def test_graphs_do_not_multiply() -> None:
    """Two sizes of batch get graphs, a third runs as it is, all give the right answer; dynamic: one graph for all."""
    plain = denoiser()
    few = accelerate(plain, [Compile(graphs=2, backend="eager")])
    one = accelerate(plain, [Compile(graphs=1, dynamic=True, backend="eager")])
    compiled = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        for rows in (4, 4, 3, 2, 4, 5):
            x, label = sample_inputs(rows)
            for fast in (few, one):
                assert off(fast(x, 0.6, label=label), plain(x, 0.6, label=label)) < 1e-5
        recorded = compiled["unique_graphs"]
        for rows in (6, 7):
            x, label = sample_inputs(rows)
            few(x, 0.2, label=label), one(x, 0.2, label=label)
    assert compiled["unique_graphs"] == recorded  # nothing new was compiled
    assert sorted({b.rows for b in few.net.built}) == [3, 4] and len(few.net.built) == 6
    assert {b.rows for b in one.net.built} == {0} and len(one.net.built) == 3


class Scaled(nn.Module):
    """A network without split points."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by), requires_grad=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x.sin() * self.by * time[:, None, None, None]


def test_many_networks_of_a_class_do_not_share_a_limit() -> None:
    """The compiler counts the graphs of a piece of code and gives up at eight: each part has code of its own."""
    compiled = torch._dynamo.utils.counters["stats"]
    x = torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        for by in range(1, 13):
            plain = Denoiser(Scaled(by), VPCosine(), "v")
            before = compiled["unique_graphs"]
            fast = accelerate(plain, [Compile(backend="eager")])
            assert off(fast(x, 0.5), plain(x, 0.5)) < 1e-6
            assert compiled["unique_graphs"] == before + 1


def test_autocast_from_outside_and_gradients_work() -> None:
    plain = denoiser()
    fast = accelerate(plain, [TRACED])
    x, label = sample_inputs()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half, truth = fast(x, 0.5, label=label), plain(x, 0.5, label=label)
        whole = fast(x, 0.5, label=label)
    assert off(half, truth) < 0.02 and off(half, whole) > 1e-4  # another graph than that of float32
    given = x.clone().requires_grad_(True)
    fast(given, 0.5, label=label).sum().backward()
    assert given.grad is not None and bool(given.grad.abs().sum() > 0)


def test_cold_and_warm_seconds_are_measured() -> None:
    fast = accelerate(denoiser(), [TRACED])
    assert fast.net.cold_seconds == 0 and fast.net.warm_seconds == 0
    x, label = sample_inputs()
    with torch.no_grad():
        fast(x, 0.5, label=label)
    assert 0 < fast.net.warm_seconds < fast.net.cold_seconds
    warm = fast.net.warm_seconds
    with torch.no_grad():
        fast(*sample_inputs(3)[:1], 0.5)
    assert fast.net.warm_seconds == warm  # of the size that came first


def test_what_cannot_be_compiled_is_a_one_line_error() -> None:
    from torch._inductor import config

    with pytest.raises(BadInput, match="no backend 'inducto': did you mean 'inductor'"):
        accelerate(denoiser(), [Compile(backend="inducto")])
    with pytest.raises(BadInput, match="graphs of at least 1, found 0"):
        Compile(graphs=0)
    with pytest.raises(BadInput, match="mode"):
        pick("accelerators", "compile:mode=fast")
    with pytest.raises(BadInput, match="works on a Denoiser and its network, found Identity"):
        Compile().apply(nn.Identity(), SamplingContext())
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(BadInput, match=r"needs a C\+\+ compiler and found none: install g\+\+"):
            accelerate(denoiser(), [Compile()])
        assert accelerate(denoiser(), [TRACED]) is not None  # which needs none

    net = denoiser().net
    net.runs_elsewhere = True  # type: ignore[assignment]
    with pytest.raises(BadInput, match="nothing to do on a UNet, which another library runs"):
        accelerate(Denoiser(net, VPCosine(), "v"), [Compile()])


def test_it_is_picked_by_name() -> None:
    assert pick("accelerators", "compile:dynamic=true,graphs=2") == Compile(dynamic=True, graphs=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scaled", "unet"])
def test_inductor_with_frozen_weights_gives_the_same_outputs(kind: str) -> None:
    plain = denoiser() if kind == "unet" else Denoiser(Scaled(2.0), VPCosine(), "v")
    fast = accelerate(plain, [Compile(graphs=1)])
    with torch.no_grad():
        for rows in (2, 2, 3):
            x, _ = sample_inputs(rows)
            assert off(fast(x, 0.6), plain(x, 0.6)) < 1e-5
    assert fast.net.cold_seconds > 2 * fast.net.warm_seconds
