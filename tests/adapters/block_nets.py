"""Tiny random transformers and U-Nets of `diffusers` that hasten splits by their structure, each with its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import tiny

B = 2
Case = tuple[nn.Module, Tensor, dict[str, Any]]  # the network, x and conditions
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, **config: Any) -> nn.Module:
    import diffusers

    return tiny.seeded(lambda: getattr(diffusers, name)(**config))


def flux(rows: int = B, guidance_embeds: bool = True) -> Case:
    net = build(
        "FluxTransformer2DModel", patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, **HEADS,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0))
    cond = {"img_ids": ids, "txt_ids": torch.zeros(5, 3), "pooled_projections": noise(rows, 16, seed=1)}
    cond |= {"guidance": torch.full((rows,), 3.5)} if guidance_embeds else {}
    return net, noise(rows, 6, 16), {**cond, "encoder_hidden_states": noise(rows, 5, 32)}


def qwen() -> Case:
    net = build(
        "QwenImageTransformer2DModel", patch_size=2, in_channels=16, out_channels=4, num_layers=3,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    mask = torch.ones(B, 5, dtype=torch.long)
    cond = {
        "encoder_hidden_states": noise(B, 5, 16),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, 2, 3)]] * B,
    }
    return net, noise(B, 6, 16), cond


def sd3() -> Case:
    net = tiny.sd3_transformer()
    return net, noise(B, 4, 8, 12), {"encoder_hidden_states": noise(B, 5, 32), "pooled_projections": noise(B, 32)}


def dit() -> Case:
    return tiny.dit(), noise(B, 4, 8, 8), {"class_labels": torch.tensor([1, 1000])}


def sana() -> Case:
    net = build(
        "SanaTransformer2DModel", patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8, sample_size=8,
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return net, noise(B, 4, 8, 8), {"encoder_hidden_states": noise(B, 5, 8), "encoder_attention_mask": mask}


def pixart() -> Case:
    net = build(
        "PixArtTransformer2DModel", **HEADS, in_channels=4, out_channels=8, num_layers=3, sample_size=8, patch_size=2,
        cross_attention_dim=16, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    cond = {"encoder_hidden_states": noise(B, 5, 32), "encoder_attention_mask": torch.ones(B, 5)}
    return net, noise(B, 4, 8, 8), {**cond, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def lumina2() -> Case:
    net = build(
        "Lumina2Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=3,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2),
        axes_lens=(16, 16, 16), cap_feat_dim=8,
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    return net, noise(B, 4, 8, 8), {"encoder_hidden_states": noise(B, 5, 8), "encoder_attention_mask": mask}


def hunyuan_dit() -> Case:
    """Its later blocks read the outputs of earlier ones too, as in a U-Net."""
    net = build(
        "HunyuanDiT2DModel", sample_size=8, num_layers=4, patch_size=2, **HEADS, in_channels=4, hidden_size=16,
        mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=4,
        text_len_t5=4, activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    texts = {"encoder_hidden_states": noise(B, 4, 16), "encoder_hidden_states_t5": noise(B, 4, 16)}
    masks = {"text_embedding_mask": torch.ones(B, 4), "text_embedding_mask_t5": torch.ones(B, 4)}
    return net, noise(B, 4, 8, 8), {**texts, **masks, "image_rotary_emb": list(noise(2, 16, 8))}


def auraflow() -> Case:
    net = build(
        "AuraFlowTransformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, **HEADS,
        num_single_dit_layers=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=16,
    )  # fmt: skip
    return net, noise(B, 4, 8, 8), {"encoder_hidden_states": noise(B, 5, 16)}


def hunyuan_video() -> Case:
    net = build(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, **HEADS, num_layers=1, num_single_layers=3,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    cond = {"encoder_hidden_states": noise(B, 5, 8), "encoder_attention_mask": mask, "pooled_projections": noise(B, 8)}
    return net, noise(B, 4, 2, 8, 8), {**cond, "guidance": torch.full((B,), 6000.0)}


def wan() -> Case:
    net = build(
        "WanTransformer3DModel", patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=8, ffn_dim=16, num_layers=3, rope_max_seq_len=16,
    )  # fmt: skip
    return net, noise(B, 4, 2, 8, 8), {"encoder_hidden_states": noise(B, 5, 16)}


def cogvideox() -> Case:
    net = build(
        "CogVideoXTransformer3DModel", **HEADS, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=3, sample_width=8, sample_height=8, sample_frames=5, patch_size=2, max_text_seq_length=5,
        temporal_compression_ratio=4, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    rope = tuple(noise(2, 2 * 16, 8))
    return net, noise(B, 2, 4, 8, 8), {"encoder_hidden_states": noise(B, 5, 16), "image_rotary_emb": rope}


def ltx() -> Case:
    net = build(
        "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, **HEADS, cross_attention_dim=16, num_layers=3,
        caption_channels=16,
    )  # fmt: skip
    cond = {"encoder_hidden_states": noise(B, 5, 16), "encoder_attention_mask": torch.ones(B, 5)}
    return net, noise(B, 8, 4), {**cond, "num_frames": 2, "height": 2, "width": 2}


def motion_unet() -> Case:
    """The U-Net of AnimateDiff, with the frames of a video in its batch of texts."""
    net = build(
        "UNetMotionModel", sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), norm_num_groups=8, cross_attention_dim=16,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2, motion_num_attention_heads=2,
    )  # fmt: skip
    return net, noise(B, 4, 3, 8, 8), {"encoder_hidden_states": noise(B * 3, 5, 16)}


def unet3d() -> Case:
    """The U-Net of ModelScope's text-to-video."""
    net = build(
        "UNet3DConditionModel", sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    return net, noise(B, 4, 3, 8, 8), {"encoder_hidden_states": noise(B, 5, 16)}


def spatio_temporal_unet() -> Case:
    """The U-Net of Stable Video Diffusion."""
    net = build(
        "UNetSpatioTemporalConditionModel", sample_size=8, in_channels=8, out_channels=4, block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), layers_per_block=1,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=16,
        num_attention_heads=2, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    return net, noise(B, 3, 8, 8, 8), {"encoder_hidden_states": noise(B, 1, 16), "added_time_ids": noise(B, 3).abs()}


CASES: dict[str, Callable[[], Case]] = {
    "FLUX": flux,
    "Qwen-Image": qwen,
    "SD3": sd3,
    "DiT": dit,
    "Sana": sana,
    "PixArt": pixart,
    "Lumina 2": lumina2,
    "HunyuanDiT": hunyuan_dit,
    "AuraFlow": auraflow,
    "HunyuanVideo": hunyuan_video,
    "Wan": wan,
    "CogVideoX": cogvideox,
    "LTX": ltx,
    "AnimateDiff": motion_unet,
    "text-to-video": unet3d,
    "Stable Video Diffusion": spatio_temporal_unet,
}
