"""Integer layers: exact against the formula, in every kernel and layout, faster where there is an instruction."""

from __future__ import annotations

import copy
import pickle
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.nets import _int8
from hasten.nets._packed import pack4, unpack4
from hasten.nets.layers import ResBlock
from hasten.nets.quantized import (
    ChannelSlice,
    QConv2d,
    QLinear,
    empty_quantized,
    quantization_config,
    replace_layers,
    set_group,
    why_not_quantizable,
)
from tests.nets.test_unet import lively


def rounded(layer, bits=8, borders=(), acts=((0.03, 120),), rank=0, seed=0):
    """Parts of a layer by rounding to the nearest."""
    weight, parts = layer.weight.detach(), []
    edges = [0, *borders, weight.shape[1]]
    generator = torch.Generator().manual_seed(seed)
    for i, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        w = weight[:, first:last]
        rows, view = w.flatten(1), [-1] + [1] * (w.ndim - 1)
        if bits == 8:
            scale, zero = rows.abs().amax(1) / 127, None
            q = (w / scale.view(view)).round().clamp(-127, 127).to(torch.int8)
        else:
            low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
            scale = (high - low) / 15
            zero = (-low / scale).round()
            q = ((w / scale.view(view)).round() + zero.view(view)).clamp(0, 15).to(torch.uint8)
        low_rank = None
        if rank:
            low_rank = tuple(
                torch.randn(shape, generator=generator).mul(0.1).half().float()
                for shape in ((w.shape[0], rank), (rank, rows.shape[1]))
            )
        x_scale = torch.tensor([scale_ * (1 + 0.3 * i) for scale_, _ in acts]) if acts else None
        x_zero = torch.tensor([zero_ for _, zero_ in acts]) if acts else None
        parts.append(ChannelSlice((first, last), q, scale, zero, bits, x_scale, x_zero, low_rank))
    return parts


def reference(layer, parts, x, group=0):
    """The formula of the module, in float64, from the parts alone."""
    total = 0.0
    for part in parts:
        first, last = part.channels
        piece = x[..., first:last] if isinstance(layer, nn.Linear) else x[:, first:last]
        view = [-1] + [1] * (part.q.ndim - 1)
        v = part.q.double() - (0 if part.zero is None else part.zero.double().view(view))
        w = v * part.scale.double().view(view)
        if part.act_scale is None:
            inputs = piece.double()
        else:
            s, z = part.act_scale[group], int(part.act_zero[group])
            u = (piece.double() * (1 / s).double() + z).float().round().clamp(0, 255).double()
            inputs = (u - z) * s.double()
        total = total + plain(layer, inputs, w)
        if part.low_rank is not None:
            total = total + plain(layer, piece.double(), (part.low_rank[0] @ part.low_rank[1]).double().view(w.shape))
    if layer.bias is None:
        return total
    return total + layer.bias.detach().double().view(-1, *[1] * (0 if isinstance(layer, nn.Linear) else 2))


def plain(layer, x, w):
    if isinstance(layer, nn.Linear):
        return F.linear(x, w)
    return F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation)


def off(a, b):
    """Relative distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def conv(channels=10, out=12, kernel=3, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Conv2d(channels, out, kernel, **options)


def images(batch, channels=10, side=9, seed=1):
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed)) + 0.3


ACTS = ((0.03, 120), (0.011, 0), (0.05, 201))
LAYERS = {
    "3x3": lambda: conv(padding=1),
    "3x3, stride 2": lambda: conv(padding=1, stride=2),
    "3x3, no padding": lambda: conv(bias=False),
    "3x3, dilated": lambda: conv(padding=2, dilation=2),
    "1x1": lambda: conv(kernel=1),
    "1x1, stride 2": lambda: conv(kernel=1, stride=2),
    "1x3": lambda: conv(kernel=(1, 3), padding=(0, 1), stride=(2, 1)),
    "odd": lambda: conv(channels=7, out=5, padding=1),
    "linear": lambda: nn.Linear(10, 12),
    "linear without a bias": lambda: nn.Linear(10, 12, bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("borders", [(), (3,)], ids=["whole", "split"])
def test_layers_implement_the_formula(name, bits, borders):
    layer = LAYERS[name]()
    linear = isinstance(layer, nn.Linear)
    parts = rounded(layer, bits, borders, ACTS)
    output = (QLinear if linear else QConv2d).from_layer(layer, parts)
    again = empty_quantized(nn.Sequential(LAYERS[name]()), quantization_config(nn.Sequential(output)))
    again.load_state_dict(nn.Sequential(output).state_dict())
    for batch in (1, 3):
        x = images(batch, layer.weight.shape[1])
        shapes = [x[:, :, 0, 0], x.permute(0, 2, 3, 1), x[:, :, 0].transpose(1, 2)] if linear else [x, x[..., :7]]
        for inputs in shapes:
            for group in range(len(ACTS)):
                set_group(output, group)
                set_group(again, group)
                expected = reference(layer, parts, inputs, group)
                with torch.no_grad():
                    result = output(inputs)
                    assert result.dtype == torch.float32 and result.shape == expected.shape
                    assert off(result, expected) <= 1e-5
                    assert torch.equal(again(inputs), result)
    set_group(output, 0)
    x = images(2, layer.weight.shape[1])[..., 0, 0] if linear else images(2, layer.weight.shape[1])
    with torch.no_grad():  # an approximation of the layer, and not the layer
        assert 1e-3 < off(output(x), layer(x)) < (0.02 if bits == 8 else 0.2)


@pytest.mark.parametrize("kind", [_int8.OneDnnKernel, _int8.SimulatedKernel, _int8.IntMmKernel])
@pytest.mark.parametrize("layer", [nn.Linear(16, 24), nn.Conv2d(16, 24, 1), nn.Conv2d(16, 24, 3, padding=1)])
def test_every_kernel_gives_the_same_sums(kind, layer):
    if kind is _int8.OneDnnKernel and not _int8.onednn_works():
        pytest.skip("this CPU has no VNNI")
    geometry = None if isinstance(layer, nn.Linear) else _int8.ConvGeometry(padding=layer.padding)
    (part,) = rounded(layer, 8)
    if kind is _int8.IntMmKernel and not _int8.IntMmKernel.fits(part.q, geometry):
        assert layer.weight.shape[-1] == 3
        return
    kernel = kind(part.q, part.scale, layer.bias, geometry, part.act_scale.tolist(), part.act_zero.tolist())
    index = torch.zeros(1, dtype=torch.int64)
    for batch in (1, 3):
        x = images(batch, 16) if geometry else images(batch, 16)[:, :, 0].transpose(1, 2)
        assert off(kernel(x, 0, index, torch.float32), reference(layer, [part], x)) <= 1e-5


def test_bytes_are_the_formulas_in_every_layout():
    x = images(2, 6).mul(3)
    x[0, 0] = (torch.arange(81).view(9, 9) - 40) * 0.125 / 2  # half steps
    for inputs in (x, x.contiguous(memory_format=torch.channels_last), x[:, 2:5], x.bfloat16()):
        u = _int8.quantize_uint8(inputs, 0.125, 121)
        assert u.dtype == torch.uint8 and u.shape == inputs.shape
        assert torch.equal(u.double(), (inputs.double() * 8 + 121).round().clamp(0, 255))
        tensors = _int8.quantize_uint8(inputs, torch.tensor(0.125), torch.tensor(121))
        assert torch.equal(tensors, u)


@pytest.mark.parametrize("shape", [(3, 5), (5, 7, 3, 3), (2, 8), (1, 1), (0, 3)])
def test_codes_of_four_bits_come_back(shape):
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack4(codes)
    assert packed.numel() == (codes.numel() + 1) // 2
    assert torch.equal(unpack4(packed, shape), codes)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("acts", [((0.03, 120),), None], ids=["bytes", "float"])
@pytest.mark.parametrize("layer", [conv(padding=1, stride=2), nn.Linear(10, 12)])
def test_low_rank_branch_and_weights_only(layer, acts, rank):
    parts = rounded(layer, 4, (4,), acts, rank)
    output = (QLinear if isinstance(layer, nn.Linear) else QConv2d).from_layer(layer, parts)
    x = images(2) if output.geometry else images(2)[:, :, 0].transpose(1, 2)
    with torch.no_grad():
        assert off(output(x), reference(layer, parts, x)) <= 1e-5
        assert off(plain(layer, x, output.weight), plain(layer, x, layer.weight)) < (0.5 if not rank else 9)
    assert output.execution == "simulated" if acts is None else output.quantization_config()["rank"] == rank


def test_output_type_follows_autocast_and_input():
    layer = conv(padding=1)
    for bits, borders in ((8, ()), (4, (3,))):
        output = QConv2d.from_layer(layer, rounded(layer, bits, borders))
        x = images(2)
        with torch.no_grad():
            full = output(x)
            with torch.autocast("cpu", torch.bfloat16):
                low = output(x)
            assert low.dtype == torch.bfloat16 and 0 < off(low, full) < 3e-3
            for dtype in (torch.bfloat16, torch.float16):
                assert output(x.to(dtype)).dtype == dtype
                assert off(output(x.to(dtype)), output(x.to(dtype).float())) < 3e-3
            moved = copy.deepcopy(output).to(torch.bfloat16)
            assert moved.parts[0].scale.dtype == torch.float32
            assert off(moved(x), full) < 3e-3  # only the bias is coarser


def test_gradient_by_the_input_goes_straight_through():
    layer = conv(padding=1)
    output = QConv2d.from_layer(layer, rounded(layer))
    x = images(2).requires_grad_()
    y = output(x)
    (result,) = torch.autograd.grad(y.square().sum(), x)
    z = plain(layer, x, output.weight)
    (expected,) = torch.autograd.grad((z * 2 * y.detach()).sum(), x)
    assert off(result, expected) < 1e-5
    with torch.no_grad():
        assert off(output(x), y) < 1e-6


def test_slices_that_do_not_match_are_refused():
    layer = conv(padding=1)
    good = rounded(layer, 4, (3,))
    for parts, outputs in (
        (good[:1], "cover 3 of the layer's 10"),
        (good[1:], "expected"),
        (rounded(layer, 8, (3,))[:1] + good[1:], "same bits"),
        (
            [ChannelSlice((0, 10), torch.full((12, 10, 3, 3), 16), torch.ones(12), torch.zeros(12), 4, None, None)],
            "0..15",
        ),
        ([ChannelSlice((0, 10), torch.zeros(12, 10, 3, 3), torch.ones(12), None, 3, None, None)], "3 bits"),
    ):
        with pytest.raises(ValueError, match=outputs):
            QConv2d.from_layer(layer, parts)
    for other, outputs in (
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.Conv1d(4, 4, 3), "Conv1d"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding"),
    ):
        assert outputs in why_not_quantizable(other)
    with pytest.raises(ValueError, match="groups"):
        QConv2d.from_layer(nn.Conv2d(4, 4, 3, groups=2), good)
    output = QConv2d.from_layer(layer, rounded(layer, acts=ACTS))
    with pytest.raises(ValueError, match="0..2"):
        set_group(output, 3)
    with pytest.raises(ValueError, match="no layer 'absent'"):
        replace_layers(nn.Sequential(layer), {"absent": output})


def test_block_with_a_split_shortcut_and_its_copies():
    block = lively(ResBlock(12, 8, 6))
    x, emb = images(2, 12, 8), torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    x[:, 7:] *= 9  # what a split is for
    before = {name: value.clone() for name, value in block.state_dict().items()}
    output = {
        "shortcut": QConv2d.from_layer(block.shortcut, rounded(block.shortcut, 8, (7,), ((0.2, 128),))),
        "modulation": QLinear.from_layer(block.modulation, rounded(block.modulation)),
    }
    fast = replace_layers(block, output)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert isinstance(block.shortcut, nn.Conv2d) and fast.shortcut is output["shortcut"]
    assert fast.norm1.weight is block.norm1.weight and fast.conv1.bias is block.conv1.bias
    assert fast.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert list(quantization_config(fast)) == ["modulation", "shortcut"] and quantization_config(fast)["shortcut"][
        "parts"
    ] == [0, 7]
    with torch.no_grad():
        expected = fast(x, emb)
        assert off(expected, block(x, emb)) < 0.05
        assert torch.equal(copy.deepcopy(fast)(x, emb), expected)
        assert torch.equal(pickle.loads(pickle.dumps(fast))(x, emb), expected)


def integers(net, bits=8, **options):
    """The network with all its layers made of integers."""
    output = {}
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            kind = QLinear if isinstance(layer, nn.Linear) else QConv2d
            output[name] = kind.from_layer(layer, rounded(layer, bits, **options))
    return replace_layers(net, output)


def test_one_compiled_graph_serves_all_groups():
    net = integers(lively(ResBlock(12, 8, 6)), acts=ACTS)
    x, emb = images(2, 12, 8), torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=counted, fullgraph=True)
    result = []
    with torch.no_grad():
        for group in (0, 1, 2, 0):
            set_group(net, group)
            result.append(compiled(x, emb))
            assert off(result[-1], net(x, emb)) < 2e-3  # a rounding may fall to the other side
    assert len(graphs) == 1
    assert off(result[1], result[0]) > 0.05 and torch.equal(result[3], result[0])


@pytest.mark.slow
def test_integer_convolution_is_faster():
    if not _int8.onednn_works():
        pytest.skip("this CPU has no VNNI")
    layer = conv(256, 256, padding=1)
    output, x = (
        QConv2d.from_layer(layer, rounded(layer)),
        images(16, 256, 16).contiguous(memory_format=torch.channels_last),
    )
    threads, minimum = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(10):
                for name, run in (("float", layer), ("integer", output)):
                    start = time.thread_time()
                    run(x)
                    minimum[name] = min(time.thread_time() - start, minimum.get(name, 1e9))
    finally:
        torch.set_num_threads(threads)
    assert minimum["float"] >= 1.5 * minimum["integer"]
