"""The layers of patches by themselves, in one process: what they compute, what they hold, what is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators._compile import CompiledNet
from hasten.accelerators._patches.attention import TextVersion
from hasten.accelerators._patches.buffers import Track
from hasten.accelerators._patches.exchange import Exchange, RowPartition
from hasten.accelerators._patches.layers import PatchNorm, correct_moments, pool_moments
from hasten.accelerators._patches.swap import Patched, shared_copy
from hasten.accelerators.patch_parallel import PatchParallel
from hasten.distributed.groups import ProcessGroup
from hasten.errors import BadInput
from hasten.nets.quantized import ChannelSlice, QConv2d, replace_layers

from ._tiny import unet

THERE = importlib.util.find_spec("diffusers") is not None


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_corrected_moments_of_now_are_those_of_all() -> None:
    parts = noise(3, 2, 4, 50, dtype=torch.float64) * 2 + 5 + noise(3, 2, 4, 1, seed=1, dtype=torch.float64)
    moments, weights = (
        torch.stack([parts.mean(-1), parts.var(-1, correction=0)], 1),
        torch.full((3,), 1 / 3, dtype=torch.float64),
    )
    M, V = pool_moments(moments, weights)
    whole = parts.movedim(0, -1).flatten(2)
    torch.testing.assert_close(M, whole.mean(-1)), torch.testing.assert_close(V, whole.var(-1, correction=0))
    for me in range(3):
        torch.testing.assert_close(correct_moments(moments[me], moments, weights, me), (M, V))
    # of another evaluation: E[x] and E[x^2] of then, plus this rank's change of each
    own = moments[1] * 1.1
    second = (moments[:, 1] + moments[:, 0].square()).mean(0)
    drift = own[1] + own[0].square() - moments[1, 1] - moments[1, 0].square()
    mean = M + own[0] - moments[1, 0]
    expected = second + drift - mean.square()
    assert bool((expected > 0).all())
    torch.testing.assert_close(correct_moments(own, moments, weights, 1), (mean, expected))
    gone = torch.stack([moments[1, 0], torch.zeros_like(V)])  # a part that lost its variance: its own, in place of < 0
    before = moments.clone()
    before[0, 1], before[2, 1] = 0.0, 0.0
    before[:, 0] = 1.0
    assert bool((correct_moments(gone, before, weights, 1)[1] == 0).all())


class Echo(Exchange):
    """The communication of one process that receives from itself alone."""

    def gather(self, kind: str, own: Tensor, now: bool = False) -> tuple[Tensor, None]:
        return own[None], None


def test_the_norm_over_all_patches_is_group_norm_whatever_the_layout() -> None:
    norm = nn.GroupNorm(4, 8).requires_grad_(False)
    norm.weight.copy_(noise(8)), norm.bias.copy_(noise(8, seed=1))
    ours = PatchNorm(norm, Echo(ProcessGroup(), "sync", "full", 0, "same", 60))
    wide = 3 + noise(2, 8, 6, 5, seed=2)
    tokens = wide.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    for x in (
        wide,
        wide.to(memory_format=torch.channels_last),
        wide[:1, :, ::2],
        tokens,
        tokens[:1].unflatten(2, (6, 5)),
        wide[:, :, :1],
        wide[:1, :, :2, :1],
        wide.transpose(2, 3),
    ):
        torch.testing.assert_close(ours(x), norm(x), rtol=1e-5, atol=1e-5)
    last = ours(wide.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    half = ours(wide.bfloat16())
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), norm(wide), rtol=0.02, atol=0.03)
    flat = torch.full((1, 8, 4, 4), 7.0)  # no variance at all
    torch.testing.assert_close(ours(flat), norm(flat), rtol=0, atol=1e-3)


def test_rows_are_divided_as_evenly_as_possible() -> None:
    partitions = [RowPartition.of(7, 3, me) for me in range(3)]
    assert partitions[0].units == (3, 2, 2) and not partitions[0].even
    assert [one.span(28) for one in partitions] == [(0, 12), (12, 20), (20, 28)]
    assert partitions[1].counts(8) == (12, 8, 8)


def test_buffers_hold_every_format() -> None:
    received = [noise(3, 5), noise(3, 2, 3, seed=1).double(), torch.zeros(3, 0, 2), noise(3, 7, seed=2).bfloat16()]
    track = Track(3, received, 2)
    assert all(torch.equal(track.received(k), tensor) for k, tensor in enumerate(received))
    assert track.bounds == [(0, 24 + 48), (72, 72 + 16)]
    track.outgoing(3).copy_(received[3][1])
    out, into = track.turn(1)
    assert torch.equal(out[:14].view(torch.bfloat16), received[3][1]) and track.latest == [0, 0]
    into.zero_()
    assert not track.received(3).any() and torch.equal(track.received(1), received[1])


def test_what_is_received_is_linearly_extrapolated() -> None:
    values = [noise(2, 5, seed=k) for k in range(4)]
    track, reused = Track(2, [values[0], values[0]], 1, [1]), Track(2, [values[0]], 1)
    exchange_ = Exchange(ProcessGroup((0, 1), 0), "async", "corrected", 4, "same", 60, 1)
    for time in (0.9, 0.7, 0.6):
        exchange_.set_time(torch.tensor([time, 0.1]))
    assert torch.equal(
        exchange_.extrapolate(track.received(1), track.before(1)), values[0]
    )  # nothing is known from before
    for before, now in zip(values, values[1:]):
        for c in (0, 1):  # a chunk for each slot
            into = track.turn(c)[1].view(2, -1)
            into[:, :20] = now.view(torch.uint8)
        assert torch.equal(track.received(0), now) and track.before(0) is None is reused.before(0)
        expected = now + 0.5 * (now - before)
        torch.testing.assert_close(exchange_.extrapolate(track.received(1), track.before(1)), expected)
        into = torch.zeros(2, 5, dtype=torch.float64)
        assert exchange_.extrapolate(track.received(1), track.before(1), out=into) is into
        torch.testing.assert_close(into.float(), expected)
    for time, ratio in ((0.3, 1.0), (0.3, 0.0), (0.2, 0.0), (0.15, 0.5), (0.4, 0.0)):  # too far, twice, back
        exchange_.set_time(torch.tensor(time))
        assert exchange_.ratio is not None and float(exchange_.ratio) == pytest.approx(ratio, abs=1e-5)


def parts(net: nn.Module) -> Any:
    return Patched(net, Exchange(ProcessGroup((0, 1), 0), "async", "corrected", 4, "same", 60), TextVersion())


def test_a_copy_shares_the_weights() -> None:
    net = unet(attention=(1,))
    before = [type(module) for module in net.modules()]
    built = parts(net).net
    assert [type(module) for module in net.modules()] == before and built is not net
    ours = {p.data_ptr() for p in net.parameters()}
    assert {p.data_ptr() for p in built.parameters()} == ours
    assert all(a is b for a, b in zip(shared_copy(net).parameters(), net.parameters()))


def test_unknown_layers_raise() -> None:
    with pytest.raises(BadInput, match="does not know Linear: supported are hasten's UNet"):
        parts(nn.Linear(2, 2))
    net = unet()
    net.down[0][0].block.norm1 = nn.InstanceNorm2d(8)
    with pytest.raises(BadInput, match=r"does not know down\.0\.0\.block\.norm1, a InstanceNorm2d: it may mix rows"):
        parts(net)
    net = unet()
    net.conv_out = nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular")
    with pytest.raises(BadInput, match="conv_out pads with 'circular'"):
        parts(net)
    net = unet()
    net.downsample[0] = nn.Conv2d(8, 8, 3, padding=0)
    with pytest.raises(BadInput, match=r"downsample\.0 changes the number of rows"):
        parts(net)
    net, layer = unet(), "down.0.0.block.conv1"
    ones = torch.ones(8, 8, 3, 3, dtype=torch.int8)
    part = ChannelSlice((0, 8), ones, torch.ones(8), None, 8, torch.ones(1), torch.zeros(1))
    with pytest.raises(BadInput, match=r"does not know down\.0\.0\.block\.conv1, a QConv2d"):
        parts(replace_layers(net, {layer: QConv2d.from_layer(net.get_submodule(layer), [part])}))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"does not know CompiledNet.*neither quantized nor compiled"):
        parts(CompiledNet(net, lambda f: f, 1))
    for wrong in ({"mode": "late"}, {"norm": "none"}, {"warmup": -1}, {"keys": "int8"}):
        with pytest.raises(BadInput, match="patch_parallel"):
            PatchParallel(**wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(not THERE, reason="diffusers is not installed")
def test_networks_of_diffusers_are_supported() -> None:
    from diffusers import UNet2DConditionModel, UNet2DModel

    from hasten.adapters.diffusers.wrap import split_network

    with torch.device("meta"):  # their shapes without their weights
        sd = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        xl = UNet2DConditionModel(
            sample_size=128,
            cross_attention_dim=2048,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=[5, 10, 20],
            transformer_layers_per_block=[1, 2, 10],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        scores = UNet2DModel(
            block_out_channels=(32, 64),
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        )
    for net, multiple in ((sd, 8), (xl, 4)):
        built = parts(split_network(net))
        assert built.exchange.multiple == multiple
        layers = [module for module in built.net.modules() if type(module) is nn.GroupNorm]
        inside = [module.norm for module in built.net.modules() if isinstance(module, PatchNorm)]
        assert layers and {id(layer) for layer in layers} == {id(layer) for layer in inside}
    with pytest.raises(BadInput, match=r"does not know down_blocks\.0, a SkipDownBlock2D"):
        parts(split_network(scores))
    sd.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(BadInput, match="UpBlock2D: it may mix rows"):
        parts(split_network(sd))


def test_the_containers_of_hasten_are_its_modules() -> None:
    from hasten.accelerators._patches.swap import CONTAINERS
    from hasten.nets import layers, unet

    assert all(hasattr(unet, name) or hasattr(layers, name) for name in CONTAINERS["hasten"])
