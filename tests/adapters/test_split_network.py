"""Split networks equal the networks of `diffusers`: same weights, same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hasten.adapters.diffusers.split_network import SplitNetwork, guidance_features
from hasten.adapters.diffusers.wrap import split_network
from hasten.errors import BadInput

from . import tiny

B = 3


def inputs(net: Any, side: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(B, net.config.in_channels, side, side), torch.tensor([7.0, 500.25, 999.0])


def text(width: int = 16) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(B, 5, width)


def check(split: SplitNetwork, x: Tensor, time: Tensor, theirs: Tensor, **cond: Any) -> None:
    """`forward`, and the parts around every split point, equal the module bit for bit."""
    assert torch.equal(split(x, time, **cond), theirs)
    if hasattr(split, "blocks"):
        tokens, emb = split.embed(x, time, **cond)
        for at in range(len(split.blocks) + 1):
            half = split.run(0, at, tokens, emb)
            assert torch.equal(split.finish(split.run(at, len(split.blocks), half, emb), emb), theirs)
        return
    emb = split.embed(time, **cond)
    skips, middle = split.encode(x, emb)
    copies = [skip.clone() for skip in skips]
    assert torch.equal(split.decode(skips, middle, emb), theirs)
    assert all(torch.equal(a, b) for a, b in zip(skips, copies)), "decode changed the skips"
    if hasattr(split, "deep"):
        for branch in (None, *range(split.branches + 1)):
            first = split.shallow_encode(x, emb, branch)
            assert len(first) == 1 + (split.branches if branch is None else branch)
            copies, up_input = [skip.clone() for skip in first], split.deep(first, emb)
            assert torch.equal(split.shallow_decode(first, up_input, emb), theirs)
            assert all(torch.equal(a, b) for a, b in zip(first, copies)), "deep changed the first skips"
            assert not torch.equal(split.shallow_decode(first, 2 * up_input, emb), theirs)
    # twice the batch, by what an accelerator may do with an embedding
    twice = tree_map(lambda value: torch.cat([value, value]), emb)
    both = split.decode([torch.cat([s, s]) for s in skips], torch.cat([middle, middle]), twice)
    assert torch.allclose(both, torch.cat([theirs, theirs]), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_class_embeds": 5},
        {"class_embed_type": "timestep"},
        {"center_input_sample": True, "downsample_type": "resnet", "upsample_type": "resnet"},
        {"time_embedding_type": "fourier"},
        {"layers_per_block": 2},
        {
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "time_embedding_type": "fourier",
        },
    ],
    ids=str,
)
@torch.no_grad()
def test_unet2d(changes: dict[str, Any]) -> None:
    if "SkipDownBlock2D" in changes.get("down_block_types", ()):
        changes = {**changes, "block_out_channels": (128, 128), "norm_num_groups": 32}
    net = tiny.unet2d(**changes)
    x, time = inputs(net)
    split = split_network(net)
    cond = {"label": torch.tensor([0, 4, 2])} if {"num_class_embeds", "class_embed_type"} & set(changes) else {}
    theirs = net(x, time, class_labels=cond.get("label")).sample
    check(split, x, time, theirs, **cond)
    at = changes.get("down_block_types", ("DownBlock2D",))[0] == "DownBlock2D"
    assert hasattr(split, "deep") == at
    assert [p.data_ptr() for p in split.parameters()] == [p.data_ptr() for p in net.parameters()]


@pytest.mark.parametrize("side", [8, 9])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "layers_per_block": 2,
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        {"num_class_embeds": 5},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6, "class_embeddings_concat": True},
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "center_input_sample": True,
        },
        {  # as DeepFloyd IF
            "layers_per_block": 2,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
        },
        {"addition_embed_type": "text", "cross_attention_dim": 64, "time_embedding_act_fn": "silu"},
        {"encoder_hid_dim": 12, "encoder_hid_dim_type": "text_proj"},
    ],
    ids=str,
)
@torch.no_grad()
def test_unet2d_condition(changes: dict[str, Any], side: int) -> None:
    net = tiny.unet2d_condition(**changes)
    x, time = inputs(net, side)
    cond: dict[str, Tensor] = {"text": text(changes.get("encoder_hid_dim") or changes.get("cross_attention_dim", 16))}
    if "num_class_embeds" in changes:
        cond["label"] = torch.tensor([0, 4, 2])
    if "projection_class_embeddings_input_dim" in changes:
        cond["label"] = torch.randn(B, 6)
    theirs = net(x, time, encoder_hidden_states=cond["text"], class_labels=cond.get("label")).sample
    split = split_network(net)
    assert hasattr(split, "deep")
    check(split, x, time, theirs, **cond)


@torch.no_grad()
def test_masks_and_guidance_input() -> None:
    net = tiny.unet2d_condition(time_cond_proj_dim=10)
    x, time = inputs(net)
    mask, guidance = torch.tensor([[1, 1, 1, 0, 0]]).repeat(B, 1), torch.tensor([1.0, 3.0, 7.5])
    arguments = {"encoder_hidden_states": text(), "encoder_attention_mask": mask}
    embedded = guidance_features(guidance, 10)
    theirs = net(x, time, timestep_cond=embedded, **arguments).sample
    split = split_network(net)
    check(split, x, time, theirs, text=text(), text_mask=mask, guidance=guidance)
    check(split, x, time, theirs, text=text(), text_mask=mask, timestep_cond=embedded)
    assert split.guidance_range == (1.0, 15.0)
    assert not torch.equal(net(x, time, encoder_hidden_states=text(), timestep_cond=embedded).sample, theirs)


def test_guidance_features_are_those_of_the_pipeline() -> None:
    pipe, scales = tiny.sd_pipeline(), torch.tensor([1.0, 2.5, 7.5])
    theirs = pipe.get_guidance_scale_embedding(scales - 1, embedding_dim=11)
    assert torch.allclose(guidance_features(scales, 11), theirs, atol=1e-4)


@torch.no_grad()
def test_sdxl_conditions() -> None:
    net = tiny.sdxl_unet()
    x, time = inputs(net)
    added = {"text_embeds": torch.randn(B, 16), "time_ids": torch.rand(B, 6) * 100}
    theirs = net(x, time, encoder_hidden_states=text(32), added_cond_kwargs=added).sample
    check(split_network(net), x, time, theirs, text=text(32), **{f"added_{key}": value for key, value in added.items()})


@torch.no_grad()
def test_controlnet_and_adapter_residuals() -> None:
    net = tiny.unet2d_condition()
    x, time = inputs(net)
    split, emb = split_network(net), None
    emb = split.embed(time, text=text())
    skips, middle = split.encode(x, emb)
    residuals = [torch.randn_like(skip) for skip in skips]
    theirs = net(
        x,
        time,
        encoder_hidden_states=text(),
        mid_block_additional_residual=middle,
        down_block_additional_residuals=residuals,
    ).sample
    cond = {f"down_residual_{k}": residual for k, residual in enumerate(residuals)}
    check(split, x, time, theirs, text=text(), mid_residual=middle, **cond)
    controlled = split.embed(time, text=text(), mid_residual=middle, **cond)
    assert torch.equal(split.encode(x, controlled)[0][1], skips[1] + residuals[1])  # cached with the features
    adapters = [torch.randn(B, 16, 8, 8), torch.randn(B, 32, 4, 4)]
    theirs = net(x, time, encoder_hidden_states=text(), down_intrablock_additional_residuals=[*adapters]).sample
    ours = {f"adapter_{k}": adapter for k, adapter in enumerate(adapters)}
    assert torch.equal(split(x, time, text=text(), **ours), theirs)
    emb = split.embed(time, text=text(), **ours)
    first = split.shallow_encode(x, emb, 0)
    assert torch.equal(split.shallow_decode(first, split.deep(first, emb), emb), theirs)
    with pytest.raises(BadInput, match="use it with branch=0 to 0"):
        split.shallow_encode(x, emb)


@torch.no_grad()
def test_dit() -> None:
    net = tiny.dit()
    x, time = inputs(net)
    label = torch.tensor([0, 4, 1000])
    theirs = net(x, time, label).sample
    check(split_network(net, with_variance=True), x, time, theirs, label=label)
    assert torch.equal(split_network(net)(x, time, label=label), theirs[:, :4])
    assert split_network(net).null_label == 1000


@torch.no_grad()
def test_sd3() -> None:
    net = tiny.sd3_transformer()
    torch.manual_seed(6)
    x, time, pooled = torch.randn(B, 4, 8, 12), torch.tensor([7.0, 500.25, 999.0]), torch.randn(B, 32)
    theirs = net(x, text(32), pooled, time).sample
    check(split_network(net), x, time, theirs, text=text(32), added_text_embeds=pooled)


def test_refusals_are_one_line() -> None:
    net = tiny.unet2d_condition()
    x, time = inputs(net)
    split = split_network(net)
    for wrong, messages in [
        ({}, "needs text="),
        ({"text": text(), "txet": text()}, "takes no condition 'txet'"),
        ({"text": text(), "attention_options": {"gligen": {"boxes": text()}}}, "cross_attention_kwargs with tensors"),
    ]:
        with pytest.raises(BadInput, match=messages):
            split(x, time, **wrong)
    with pytest.raises(BadInput, match="needs label="):
        split_network(tiny.dit())(*inputs(tiny.dit()))
    with pytest.raises(BadInput, match="no split points are known for Linear; those of UNet2DModel"):
        split_network(torch.nn.Linear(2, 2))
