"""Tiny randomly initialised networks and pipelines of `diffusers`, built from configurations: nothing is downloaded."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

WORDS = ["a", "photo", "of", "the", "cat", "dog", "blue", "red", "big"]
SD_TABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def seeded(make: Any, seed: int = 0) -> Any:
    """What `make` builds, with weights that are the same every time, none of them 0, in evaluation mode."""
    torch.manual_seed(seed)
    net = make()
    with torch.no_grad():
        for p in net.parameters():  # some layers start at 0: they would hide mistakes
            p.add_(0.05 * torch.randn(p.shape))
    return net.eval().requires_grad_(False)


def unet2d(**changes: Any) -> nn.Module:
    from diffusers import UNet2DModel

    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
    }
    return seeded(lambda: UNet2DModel(**{**config, **changes}))


def unet2d_condition(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
    }
    return seeded(lambda: UNet2DConditionModel(**{**config, **changes}))


def sdxl_unet() -> nn.Module:
    return unet2d_condition(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
        transformer_layers_per_block=(1, 1),
    )


def dit(**changes: Any) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
    }
    return seeded(lambda: DiTTransformer2DModel(**{**config, **changes}))


def sd3_transformer() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=16,
        )
    )


def controlnet() -> nn.Module:
    from diffusers import ControlNetModel

    return seeded(
        lambda: ControlNetModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            in_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            norm_num_groups=8,
            attention_head_dim=4,
            cross_attention_dim=16,
            conditioning_embedding_out_channels=(8, 16),
        ),
        seed=5,
    )


def vae(channels: int = 4, **changes: Any) -> nn.Module:
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": (8, 8),
        "in_channels": 3,
        "out_channels": 3,
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": channels,
        "sample_size": 16,
        "scaling_factor": 0.5,
    }
    return seeded(lambda: AutoencoderKL(**{**config, **changes}), seed=2)


@cache
def tokenizer() -> Any:
    """A CLIP tokenizer of a handful of words."""
    from transformers import CLIPTokenizer

    folder = Path(tempfile.mkdtemp())
    letters = [chr(k) for k in range(33, 127)]
    entries = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (pair := f"{parts[0]} {parts[1]}") not in merges:
                merges.append(pair)
                entries.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: k for k, entry in enumerate(dict.fromkeys(entries))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def text_encoder(projected: bool = False, seed: int = 1) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return seeded(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), seed)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler(name: str = "DDIMScheduler", **changes: Any) -> Any:
    import diffusers

    return getattr(diffusers, name).from_config({**SD_TABLE, **changes})


def ddpm_pipeline(kind: str = "DDPMPipeline", **changes: Any) -> Any:
    import diffusers

    table = diffusers.DDIMScheduler(clip_sample=False, **changes)
    return quiet(getattr(diffusers, kind)(unet=unet2d(), scheduler=table))


def sd_pipeline(kind: str = "StableDiffusionPipeline", unet: nn.Module | None = None, **more: Any) -> Any:
    import diffusers

    parts = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet or unet2d_condition(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return quiet(getattr(diffusers, kind)(**{**parts, **more}))


def sdxl_pipeline() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(True, 4),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=sdxl_unet(),
            scheduler=scheduler(),
            add_watermarker=False,
        )
    )


def sd3_pipeline(**changes: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    return quiet(
        StableDiffusion3Pipeline(
            transformer=sd3_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, **changes),
            vae=vae(shift_factor=0.1),
            text_encoder=text_encoder(True),
            tokenizer=tokenizer(),
            text_encoder_2=text_encoder(True, 4),
            tokenizer_2=tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def dit_pipeline(scheduler: Any = None) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline

    table = scheduler or DDIMScheduler(clip_sample=False)
    return quiet(DiTPipeline(transformer=dit(), vae=vae(), scheduler=table, id2label={0: "tench, fish", 1: "cat"}))
