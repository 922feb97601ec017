"""Guidance by the network without its self-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.exact import m2
from hasten.guides import APG, CFG, DynamicThreshold, PerturbedAttention
from hasten.guides.perturbed_attention import IdentityProcessor, can_perturb
from hasten.nets.layers import Attention
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine, VPLinear

LABEL = torch.tensor([0, 1])


def small() -> Denoiser:
    torch.manual_seed(0)
    net = UNet(channels=1, widths=(8, 8), attention=(1,), classes=2, embedding=16)
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return Denoiser(net, VPCosine(), V(), null_label=2).eval().requires_grad_(False)


def without_attention(model: Denoiser, x: Tensor, monkeypatch: pytest.MonkeyPatch, **cond: Any) -> Tensor:
    """x0 where every attention of the network is written out with the identity for its map."""

    def values(self: Attention, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        v = self.qkv(tokens)[..., -x.shape[1] :]
        return x + self.out(v).transpose(1, 2).reshape(x.shape)

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", values)
        return model(x, 0.5, **cond)


def test_it_moves_away_from_the_prediction_without_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all layers, alone and on top of guidance; the network is as before afterwards."""
    model, x = small(), torch.randn(2, 1, 8, 8)
    before = model(x, 0.5, label=LABEL)
    perturbed = without_attention(model, x, monkeypatch, label=LABEL)
    assert not torch.allclose(before, perturbed, atol=1e-3)
    steered = PerturbedAttention(2.0, layers="").wrap(model)
    torch.testing.assert_close(steered(x, 0.5, label=LABEL), before + 2 * (before - perturbed))
    for guided in (CFG(1.5).wrap(model), APG(eta=1.0).wrap(CFG(1.5).wrap(model))):
        steered = PerturbedAttention(2.0, layers="").wrap(guided)
        expected = guided(x, 0.5, label=LABEL) + 2 * (before - perturbed)
        torch.testing.assert_close(steered(x, 0.5, label=LABEL), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x, 0.5, label=LABEL), before)
    assert PerturbedAttention(0.0).wrap(model) is model


def test_layers_are_chosen_by_name_and_restored_after_an_error() -> None:
    model, x = small(), torch.randn(2, 1, 8, 8)
    names = [name for name, m in model.net.named_modules() if can_perturb(m)]
    middle = [name for name in names if "mid" in name]
    assert 0 < len(middle) < len(names)
    some = PerturbedAttention(2.0).wrap(model)
    assert len(some.attention) == len(middle)
    one = PerturbedAttention(2.0, layers=middle[0]).wrap(model)
    torch.testing.assert_close(one(x, 0.5, label=LABEL), some(x, 0.5, label=LABEL))
    with pytest.raises(IndexError):
        one(x, 0.5, label=LABEL + 10)
    assert not any(m.identity for m in model.net.modules() if isinstance(m, Attention))


def test_the_processor_is_that_of_diffusers() -> None:
    """The perturbed half of the pair that diffusers' own processor of this method computes."""
    processors = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    attention = processors.Attention(8, heads=2, dim_head=4, residual_connection=True, rescale_output_factor=2.0)
    assert can_perturb(attention)
    ours = IdentityProcessor()(attention, x)
    attention.set_processor(processors.PAGIdentitySelfAttnProcessor2_0())
    theirs = attention(torch.cat([x, x])).chunk(2)[1]
    torch.testing.assert_close(ours, theirs)
    assert not can_perturb(processors.Attention(8, cross_attention_dim=6, heads=2, dim_head=4))


def test_bad_input() -> None:
    model = small()
    for make, words in (
        (lambda: PerturbedAttention(-1.0), "scale >= 0"),
        (lambda: PerturbedAttention().wrap(m2(VPLinear())), "no self-attention"),
        (lambda: PerturbedAttention(layers="nowhere").wrap(model), "no layer has 'nowhere'"),
        (lambda: PerturbedAttention().wrap(DynamicThreshold().wrap(CFG(2.0).wrap(model))), "before the other guides"),
    ):
        with pytest.raises(BadInput, match=words):
            make()
