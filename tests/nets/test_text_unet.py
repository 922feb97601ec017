"""`TextUNet`: its attention variants, its table, its split points, and that it is Stable Diffusion's U-Net."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.accelerators import SamplingContext, accelerate
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.text_unet import Level, TextUNet, mobile, mobile_table, sd_like, sd_like_table
from hasten.nets.text_unet_blocks import TextAttention, relu_attention
from hasten.performance.cost import macs, parameters
from hasten.pick import pick
from hasten.schedules import Discrete

from ..pretend import Pretended, put, taken

SIZES: dict[str, Any] = {"in_channels": 4, "cross_attention_dim": 12, "norm_num_groups": 8}
WIDTHS, HEADS = (16, 32, 40), (2, 4, 5)


def seeded(net: nn.Module) -> Any:
    """The network with further random weights, so that no bias is a constant."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return net.eval().requires_grad_(False)


def small(**changes: Any) -> TextUNet:
    torch.manual_seed(0)
    return seeded(mobile(WIDTHS, HEADS, **{**SIZES, **changes}))


def inputs(n: int = 3, height: int = 8, width: int = 8, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, height, width, generator=generator)
    return x, torch.linspace(3, 990, n), torch.randn(n, 5, SIZES["cross_attention_dim"], generator=generator)


def test_shared_keys_and_values_are_a_tied_standard_attention() -> None:
    level = Level(16, 4)
    torch.manual_seed(0)
    shared, standard = TextAttention(replace(level, shared_kv=True)), TextAttention(level)
    weights = shared.state_dict()
    tied = weights.pop("to_kv.weight")
    standard.load_state_dict({**weights, "to_k.weight": tied, "to_v.weight": tied})
    x = torch.randn(2, 9, 16)
    assert (shared(x) - standard(x)).abs().max() < 1e-6
    assert parameters(standard) - parameters(shared) == 16 * 16
    with torch.no_grad():
        standard.to_v.weight.add_(0.1)
    assert (shared(x) - standard(x)).abs().max() > 1e-3


def test_relu_attention_is_unchanged_when_all_keys_and_values_are_duplicated() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    out = relu_attention(q, k, v)
    twice = relu_attention(q, torch.cat([k, k], dim=2), torch.cat([v, v], dim=2))
    assert (out - twice).abs().max() < 1e-6
    scores = (q[1, 2] @ k[1, 2].T / 8**0.5).clamp(min=0) / 6
    assert torch.allclose(out[1, 2], scores @ v[1, 2], atol=1e-6)
    assert not torch.allclose(out, nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-2)


def test_a_network_with_relu_attention_reads_a_text_twice_as_long_as_once() -> None:
    levels, middle = mobile_table(WIDTHS, HEADS)
    torch.manual_seed(0)
    net = seeded(
        TextUNet([replace(row, attention="relu") for row in levels], replace(middle, attention="relu"), **SIZES)
    )
    x, time, text = inputs()
    assert torch.allclose(net(x, time, text), net(x, time, torch.cat([text, text], dim=1)), atol=1e-5)
    assert not torch.allclose(net(x, time, text), net(x, time, text[:, :3]), atol=1e-3)


@pytest.mark.parametrize(("layers", "height", "width"), [(1, 8, 8), (2, 8, 8), (1, 9, 7)])
def test_sd_like_is_the_unet_of_diffusers(layers: int, height: int, width: int) -> None:
    """The same names of weights, and the same output with them, sizes that do not halve included."""
    diffusers = pytest.importorskip("diffusers")
    crossed = len(WIDTHS) - 1
    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
        cross_attention_dim=12,
        attention_head_dim=HEADS,
        norm_num_groups=8,
    )
    reference = seeded(reference)
    net = sd_like(WIDTHS, HEADS, layers, **SIZES).eval()
    net.load_state_dict(reference.state_dict())
    x, time, text = inputs(height=height, width=width)
    with torch.no_grad():
        expected = reference(x, time, text).sample
        assert (net(x, time, text) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_forward_is_its_parts_and_features_are_left_alone() -> None:
    net = small()
    x, time, text = inputs()
    emb = net.embed(time, text)
    whole = net(x, time, text)
    skips, middle = net.encode(x, emb)
    copies = [feature.clone() for feature in (*skips, middle)]
    assert torch.equal(net.decode(skips, middle, emb), whole) and torch.equal(net.decode(skips, middle, emb), whole)
    assert all(torch.equal(a, b) for a, b in zip(copies, (*skips, middle), strict=True))
    first = net.shallow_encode(x, emb)
    assert torch.equal(net.shallow_decode(first, net.deep(first, emb), emb), whole)
    assert len(first) < len(skips)
    later = net.embed(time + 50, text)
    assert not torch.equal(net.decode(skips, middle, later), whole)
    assert not torch.equal(net.decode(skips, middle, later), net(x, time + 50, text))


def test_every_skip_and_every_weight_reaches_the_output() -> None:
    net = small().requires_grad_(True)
    x, time, text = inputs()
    emb = net.embed(time, text)
    skips, middle = net.encode(x, emb)
    for k in range(len(skips)):
        changed = [skip + (j == k) for j, skip in enumerate(skips)]
        assert not torch.allclose(net.decode(changed, middle, emb), net.decode(skips, middle, emb), atol=1e-4)
    net(x, time, text).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_a_batch_is_its_samples() -> None:
    net = small()
    x, time, text = inputs(height=9, width=6)
    one = torch.cat([net(x[k : k + 1], time[k : k + 1], text[k : k + 1]) for k in range(len(x))])
    assert one.shape == x.shape and torch.allclose(net(x, time, text), one, atol=1e-5)


# each switch of the method: the change of a row, and the change of (parameters, multiply-accumulates per image) of one
# transformer or block where it is exact: d = 32 channels, 16 pixels, 5 tokens of width 12
d, pixels, tokens, wide = 32, 16, 5, 12
FF = (3 * (d * 4 * d) + 2 * 4 * d + d, pixels * 3 * d * 4 * d)  # of factor 8
KV = (2 * d * wide, 2 * tokens * d * wide)
SELF = (4 * d * d + d + 2 * d, pixels * 4 * d * d + 2 * pixels * pixels * d)
CROSS = (2 * d * d + d + 2 * d + KV[0], pixels * 2 * d * d + KV[1] + 2 * pixels * tokens * d)
SWITCHES: list[tuple[dict[str, Any], tuple[int, int]]] = [
    ({"self_attention": False}, SELF),
    ({"cross_attention": False}, CROSS),
    ({"shared_kv": True}, (d * d, pixels * d * d)),
    ({"ff_factor": 6}, (FF[0] // 4 - d // 4, FF[1] // 4)),
    ({"activation": "silu"}, (0, 0)),
    ({"attention": "relu"}, (0, 0)),
    (
        {"transformer_blocks": 0},
        tuple(
            a + b + c + more
            for a, b, c, more in zip(SELF, CROSS, FF, (2 * d + 2 * d + 2 * (d * d + d), pixels * 2 * d * d))
        ),
    ),
    ({"convolution": "separable"}, (2 * (9 * d * d - 9 * d - d * d), 2 * pixels * (9 * d * d - 9 * d - d * d))),
]


@pytest.mark.parametrize(("change", "saved"), SWITCHES, ids=lambda value: str(value))
def test_each_switch_changes_what_it_should(change: dict[str, Any], saved: tuple[int, int]) -> None:
    """The middle has one transformer of one block and two residual blocks: the savings are exact there."""
    before = sd_like_table((d,), 4, 1)
    levels, middle = [replace(before[0][0])], replace(before[1], **change)
    a, b = (
        TextUNet(levels, m, **SIZES).eval() for m in (replace(before[1], up_blocks=0), replace(middle, up_blocks=0))
    )
    x, time, text = inputs(1, 4, 4)
    assert parameters(a) - parameters(b) == saved[0]
    assert macs(a, x, time, text) - macs(b, x, time, text) == saved[1]
    if saved == (0, 0):
        b.load_state_dict(a.state_dict())
        with torch.no_grad():
            assert not torch.allclose(a(x, time, text), b(x, time, text), atol=1e-5)


def test_fewer_blocks_and_transformers_in_the_middle_are_the_other_two_switches() -> None:
    levels, middle = sd_like_table(WIDTHS, HEADS, 2)
    pruned = [replace(row, down_blocks=1, up_blocks=1) for row in levels]
    x, time, text = inputs(1)
    nets = [TextUNet(rows, middle, **SIZES) for rows in (levels, pruned)]
    assert parameters(nets[1]) < parameters(nets[0]) and macs(nets[1], x, time, text) < macs(nets[0], x, time, text)
    assert [sum(len(row.resnets) for row in (*net.down_blocks, *net.up_blocks)) for net in nets] == [15, 6]
    deeper = TextUNet(levels, replace(middle, transformer_blocks=3), **SIZES)
    extra = parameters(deeper) - parameters(nets[0])
    assert extra == 2 * parameters(deeper.mid_block.attentions[0].transformer_blocks[0])


def test_the_mobile_preset_saves_what_it_should() -> None:
    from recipes.emoji_unet_mobile import HEADS, WIDTHS, emoji_mobile

    sizes: dict[str, Any] = {"in_channels": 8, "cross_attention_dim": 128, "norm_num_groups": 16}
    like, small = sd_like(WIDTHS, HEADS, 1, **sizes), emoji_mobile()
    x, time, text = torch.randn(1, 8, 16, 16), torch.zeros(1), torch.randn(1, 24, 128)
    assert parameters(small) <= 0.55 * parameters(like)
    assert macs(small, x, time, text) <= 0.5 * macs(like, x, time, text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_keep_the_time_exact(dtype: torch.dtype) -> None:
    """Its sinusoids are computed in float32: a time of 999 in half precision would be off by radians."""
    net = small()
    x, time, text = inputs()
    expected, emb = net(x, time, text), net.embed(time, text)["time"]
    half = copy.deepcopy(net).to(dtype)
    raw = half(x.to(dtype), time, text.to(dtype))
    assert raw.dtype == dtype and (raw.float() - expected).norm() < 0.03 * expected.norm()
    assert (half.embed(time, text.to(dtype))["time"].float() - emb).norm() < 0.01 * emb.norm()


def test_gradient_checkpointing_leaves_the_gradient_as_it_is() -> None:
    net = small().requires_grad_(True)
    other = copy.deepcopy(net)
    for module in other.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    stored: list[int] = []
    for one in (net, other):
        count = [0]

        def pack(tensor: Tensor, count: list[int] = count) -> Tensor:
            count[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = one(*inputs()).square().mean()
        stored.append(count[0])
        loss.backward()
    assert stored[1] < 0.5 * stored[0]
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and torch.allclose(p.grad, q.grad, atol=1e-6)


def denoiser(net: nn.Module) -> Denoiser:
    return Denoiser(
        net, Discrete(alphas_cumprod=torch.linspace(0.999, 0.005, 1000).tolist()), "v", clock="index"
    ).eval()


@pytest.mark.parametrize("spec", ["encoder_propagation:keys=uniform", "deep_cache:every=2"])
def test_accelerators_reuse_its_features(spec: str) -> None:
    source = denoiser(small())
    times = torch.linspace(1, 0.1, 10).tolist()
    fast = accelerate(source, [pick("accelerators", spec)], SamplingContext(tuple(times)))
    x, _, text = inputs()
    calls = [0]
    for middle in {source.net.mid_block, fast.net.mid_block}:
        middle.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    outputs = [fast(x, t, text=text) for t in times]
    assert 0 < calls[0] < 8 and torch.allclose(outputs[0], source(x, times[0], text=text), atol=1e-5)
    errors = [float((out - source(x, t, text=text)).norm()) for out, t in zip(outputs, times)]
    assert max(errors) > 1e-4


def test_a_model_folder_keeps_table_and_weights(tmp_path: Path) -> None:
    net = small()
    again = TextUNet(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    Model(denoiser(net), "mobile", (4, 8, 8), codec="latent").save(tmp_path / "m")
    opened = hasten.load(tmp_path / "m").denoiser.net
    assert type(opened) is TextUNet and opened.config == net.config
    x, time, text = inputs()
    assert torch.equal(opened(x, time, text), net(x, time, text))
    assert torch.equal(again.eval()(x, time, text), net(x, time, text))


def test_an_evaluation_never_waits_for_the_device() -> None:
    net = small()
    x, time, text = inputs()
    expected = net(x, time, text)
    with Pretended() as device:
        there = put(copy.deepcopy(net))
        args = [value.to("cuda") for value in (x, time, text)]
        device.clear()
        raw = there(*args)
        assert device.count("wait") == 0 and device.count("upload") == 0, device.lines()
    assert torch.allclose(taken(raw), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Level(32, 5), "32 channels do not split into 5"),
        (lambda: Level(32, convolution="separate"), "separable"),
        (lambda: Level(0), "width"),
        (lambda: TextUNet([Level(32, 4, 1, 3)], Level(32, 4, 1, 1), **SIZES), "level 0: up_blocks must be 1 to"),
        (lambda: TextUNet([Level(20, 4)], Level(32, 4), **SIZES), "width 20 is no multiple of norm_num_groups = 8"),
        (lambda: TextUNet([], Level(32, 4), **SIZES), "at least one level"),
        (lambda: TextUNet([{"width": 32, "attentions": 2}], Level(32, 4), **SIZES), "attentions"),
        (lambda: mobile(WIDTHS, (2, 4), **SIZES), "heads must be one number or one per width"),
        (lambda: small()(*inputs()[:2], torch.zeros(3, 5, 13)), r"text must be \(B, L, 12\)"),
    ],
)
def test_bad_input_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        make()
    assert "\n" not in str(error.value)
