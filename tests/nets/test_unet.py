"""The U-Net: its seam, its conditioning, its shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.nets.layers import Attention, TimeFeatures
from hasten.nets.unet import UNet


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give the zero-initialised layers weights, so that every path counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def small(**changes) -> UNet:
    settings = {"channels": 1, "widths": (16, 32), "classes": 3, "patch": 2, "attention": (1,)} | changes
    return lively(UNet(**settings))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 12, 8, generator=generator)
    return x, torch.tensor([0.1, 0.4, 0.7, 1.0]), torch.tensor([0, 1, 2, 3])


def test_forward_is_decode_of_encode_and_leaves_the_skips_alone(inputs):
    net = small()
    x, t, label = inputs
    emb = net.embed(t, label)
    skips, middle = net.encode(x, emb)
    before = [s.clone() for s in (*skips, middle)]
    first, second = net.decode(skips, middle, emb), net.decode(skips, middle, emb)
    assert torch.equal(first, net(x, t, label))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (*skips, middle), strict=True))


def test_decoding_cached_features_at_another_time_differs_only_through_the_embedding(inputs):
    net = small()
    x, t, label = inputs
    saved = net.encode(x, net.embed(t, label))
    later = net.decode(*saved, net.embed(t * 0.9, label))
    assert not torch.allclose(later, net(x, t, label))
    assert not torch.allclose(later, net(x, t * 0.9, label))


def test_every_skip_reaches_the_output(inputs):
    net = small()
    x, t, label = inputs
    emb = net.embed(t, label)
    skips, middle = net.encode(x, emb)
    for k in range(len(skips)):
        changed = [s + (0.1 if i == k else 0.0) for i, s in enumerate(skips)]
        assert not torch.equal(net.decode(changed, middle, emb), net.decode(skips, middle, emb)), k


def test_no_label_is_the_null_class_and_samples_do_not_mix(inputs):
    net = small()
    x, t, label = inputs
    null = torch.full((4,), net.classes)
    assert torch.equal(net(x, t), net(x, t, null))
    assert not torch.allclose(net(x, t)[:3], net(x, t, label)[:3])
    one = net(x[1:2], t[1:2], label[1:2])
    torch.testing.assert_close(one, net(x, t, label)[1:2], rtol=1e-5, atol=5e-6)  # other kernels for a batch of one


def test_unconditional_network_refuses_labels_and_odd_sizes_are_named(inputs):
    x, t, label = inputs
    with pytest.raises(ValueError, match="classes=0"):
        small(classes=0)(x, t, label)
    with pytest.raises(ValueError, match="multiples of 4"):
        small()(torch.randn(1, 1, 10, 8), t[:1])


@pytest.mark.parametrize("attention", [(), (0,), (0, 1)])
def test_config_rebuilds_the_same_network(attention, inputs):
    net = small(attention=attention)
    twin = UNet(**net.config).eval()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(net(*inputs), twin(*inputs))


def test_bfloat16_and_channels_last_agree_with_float32(inputs):
    net = small()
    x, t, label = inputs
    exact = net(x, t, label)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x, t, label).float()
    assert (rough - exact).norm() < 0.03 * exact.norm()
    last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, label)
    torch.testing.assert_close(last, exact, rtol=1e-4, atol=1e-5)


def test_a_new_network_says_zero_and_learns_from_there(inputs):
    net = UNet(channels=1, widths=(16, 32), classes=3, patch=2)
    out = net(*inputs)
    assert not out.any()
    (out - 1).square().mean().backward()
    assert net.conv_out.weight.grad.any()


def test_attention_is_softmax_over_pixels():
    """Against the definition, head by head."""
    torch.manual_seed(0)
    layer = lively(Attention(64, head_width=32))
    x = torch.randn(2, 64, 3, 5)
    tokens = layer.norm(x).flatten(2).mT
    q, k, v = layer.qkv(tokens).chunk(3, dim=-1)
    heads = []
    for h in range(2):
        part = slice(32 * h, 32 * h + 32)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / 32**0.5, dim=-1)
        heads.append(weights @ v[..., part])
    expected = x + layer.out(torch.cat(heads, dim=-1)).mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_time_features_tell_close_times_apart():
    features = TimeFeatures(64)
    a, b = features(torch.tensor([0.5, 0.5005]))
    assert (a - b).norm() > 0.1
    assert features(torch.rand(5)).square().sum(1).allclose(torch.tensor(32.0))  # cos^2 + sin^2 over 32 frequencies
