"""Tiny random pipelines of many families of `diffusers` without text encoders, and how each is called.

Prompts are given as embeddings and latents are returned, so that a pipeline is its network and its scheduler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import tiny

STEPS = 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(**given: Any) -> dict[str, Any]:
    """Embeddings for the prompt and for none."""
    return given | {
        f"negative_{key}": 0.5 * value if value.dtype.is_floating_point else value for key, value in given.items()
    }


@dataclass(frozen=True)
class Tiny:
    """How a pipeline is built and called.

    Attributes:
        net: class and config of the network.
        scheduler: class and config of its scheduler.
        call: options of the call, beside the number of steps.
        part: the name of the network in the pipeline.
        parts: functions that build others.
    """

    net: tuple[str, dict[str, Any]]
    scheduler: tuple[str, dict[str, Any]]
    call: Callable[[], dict[str, Any]]
    part: str = "transformer"
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def build(self, name: str) -> Any:
        """The pipeline of this class name."""
        import diffusers

        kind = getattr(diffusers, name)
        given = dict.fromkeys(set(inspect.signature(kind.__init__).parameters) - {"self"} - OPTIONS)
        net, config = self.net
        given[self.part] = tiny.seeded(lambda: getattr(diffusers, net)(**config))
        given["scheduler"] = getattr(diffusers, self.scheduler[0])(**self.scheduler[1])
        given |= {key: make() for key, make in self.parts.items()}
        return tiny.quiet(kind(**given))

    def sample(self, pipe: Any, steps: int = STEPS, **more: Any) -> Tensor:
        """The latents that a pipeline samples."""
        options = {"num_inference_steps": steps, "output_type": "latent", "return_dict": False, **self.call(), **more}
        result = pipe(generator=torch.Generator().manual_seed(3), **options)[0]
        return result if isinstance(result, Tensor) else torch.stack([torch.as_tensor(one) for one in result])


OPTIONS = {
    "boundary_ratio", "expand_timesteps", "force_zeros_for_empty_prompt", "requires_safety_checker", "add_watermarker",
    "requires_aesthetics_score", "is_distilled", "pag_applied_layers",
}  # fmt: skip
FLOW = "FlowMatchEulerDiscreteScheduler"
DYNAMIC = (FLOW, {"shift": 3.0, "use_dynamic_shifting": True})
FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": False,
}  # fmt: skip
SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
    "out_channels": 4, "pos_embed_max_size": 16,
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8, "attention_head_dim": 4, "cross_attention_dim": 16,
}  # fmt: skip
XL = ("UNet2DConditionModel", {
    **UNET, "cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 16 + 6 * 4, "transformer_layers_per_block": (1, 1),
})  # fmt: skip
DDIM = ("DDIMScheduler", {**tiny.SD_TABLE, "set_alpha_to_one": True, "timestep_spacing": "trailing"})
SMALL = {"height": 16, "width": 16}


def flux_call(**more: Any) -> dict[str, Any]:
    return {"prompt_embeds": noise(1, 5, 32), "pooled_prompt_embeds": noise(1, 16, seed=1), **SMALL, **more}


def picture() -> Tensor:
    return noise(1, 3, 16, 16, seed=2).sigmoid()


def half_mask() -> Tensor:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    return mask


def sd3_call(**more: Any) -> dict[str, Any]:
    return {**both(prompt_embeds=noise(1, 5, 32), pooled_prompt_embeds=noise(1, 32, seed=1)), **SMALL, **more}


def motion() -> Any:
    from diffusers import MotionAdapter

    return tiny.seeded(
        lambda: MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_norm_num_groups=2,
            motion_num_attention_heads=2,
        )
    )


def with_vae(channels: int = 4, **changes: Any) -> dict[str, Callable[[], Any]]:
    return {"vae": lambda: tiny.vae(channels, **changes)}


TRIED = {
    "FluxPipeline": Tiny(("FluxTransformer2DModel", FLUX), DYNAMIC, flux_call, parts=with_vae()),
    "FluxImg2ImgPipeline": Tiny(
        ("FluxTransformer2DModel", FLUX), DYNAMIC, lambda: flux_call(image=picture(), strength=0.6),
        parts=with_vae(shift_factor=0.1),
    ),
    "FluxInpaintPipeline": Tiny(
        ("FluxTransformer2DModel", FLUX), DYNAMIC,
        lambda: flux_call(image=picture(), mask_image=half_mask(), strength=0.8), parts=with_vae(shift_factor=0.1),
    ),
    "StableDiffusion3Pipeline": Tiny(("SD3Transformer2DModel", SD3), (FLOW, {"shift": 3.0}), sd3_call, parts=with_vae()),
    "StableDiffusion3Img2ImgPipeline": Tiny(
        ("SD3Transformer2DModel", SD3), (FLOW, {"shift": 3.0}), lambda: sd3_call(image=picture(), strength=0.6),
        parts=with_vae(shift_factor=0.1),
    ),
    "QwenImagePipeline": Tiny(
        ("QwenImageTransformer2DModel", {
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 1, "joint_attention_dim": 16, "guidance_embeds": False, "axes_dims_rope": (8, 4, 4),
        }), (FLOW, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}),
        lambda: {**both(prompt_embeds=noise(1, 5, 16), prompt_embeds_mask=torch.ones(1, 5).long()), **SMALL},
    ),
    "WanPipeline": Tiny(
        ("WanTransformer3DModel", {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 32,
        }), (FLOW, {"shift": 3.0}), lambda: {**both(prompt_embeds=noise(1, 5, 16)), **SMALL, "num_frames": 5},
    ),
    "LTXPipeline": Tiny(
        ("LTXVideoTransformer3DModel", {
            "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 1, "caption_channels": 16,
        }), (FLOW, {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}),
        lambda: {
            **both(prompt_embeds=noise(1, 5, 16), prompt_attention_mask=torch.ones(1, 5)), "height": 32, "width": 32,
            "num_frames": 9,
        },
    ),
    "CogView4Pipeline": Tiny(
        ("CogView4Transformer2DModel", {
            "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2,
            "out_channels": 4, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
        }), (FLOW, {"use_dynamic_shifting": True, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"}),
        lambda: {**both(prompt_embeds=noise(1, 16, 16)), **SMALL},
    ),
    "HunyuanVideoPipeline": Tiny(
        ("HunyuanVideoTransformer3DModel", {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "guidance_embeds": True,
            "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
        }), (FLOW, {"shift": 7.0}), lambda: {
            "prompt_embeds": noise(1, 5, 16), "pooled_prompt_embeds": noise(1, 8), "num_frames": 5,
            "prompt_attention_mask": torch.ones(1, 5), **SMALL,
        },
    ),
    "MochiPipeline": Tiny(
        ("MochiTransformer3DModel", {
            "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
            "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4,
            "max_sequence_length": 16,
        }), (FLOW, {"invert_sigmas": True}), lambda: {
            **both(prompt_embeds=noise(1, 5, 16), prompt_attention_mask=torch.ones(1, 5).bool()), **SMALL,
            "num_frames": 7,
        },
    ),
    "Lumina2Pipeline": Tiny(
        ("Lumina2Transformer2DModel", {
            "sample_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 8, "num_layers": 1,
            "num_refiner_layers": 1, "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2), "cap_feat_dim": 8,
        }), (FLOW, {"shift": 6.0}), lambda: {
            **both(prompt_embeds=noise(1, 5, 8), prompt_attention_mask=torch.ones(1, 5).bool()), **SMALL,
        },
    ),
    "AuraFlowPipeline": Tiny(
        ("AuraFlowTransformer2DModel", {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 16,
            "out_channels": 4, "pos_embed_max_size": 64,
        }), (FLOW, {"shift": 1.73}), lambda: {
            **both(prompt_embeds=noise(1, 5, 16), prompt_attention_mask=torch.ones(1, 5)), **SMALL,
        },
    ),
    "ChromaPipeline": Tiny(
        ("ChromaTransformer2DModel", {
            "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4),
            "approximator_hidden_dim": 16, "approximator_layers": 1, "approximator_num_channels": 16,
        }), (FLOW, {"use_beta_sigmas": True}), lambda: {
            **both(prompt_embeds=noise(1, 5, 16), prompt_attention_mask=torch.ones(1, 5)), **SMALL,
        },
    ),
    "CogVideoXPipeline": Tiny(
        ("CogVideoXTransformer3DModel", {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
            "text_embed_dim": 16, "num_layers": 1, "sample_width": 2, "sample_height": 2, "sample_frames": 9,
            "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 16,
        }), ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
        lambda: {**both(prompt_embeds=noise(1, 16, 16)), **SMALL, "num_frames": 5},
    ),
    "StableDiffusionXLImg2ImgPipeline": Tiny(
        XL, DDIM, lambda: {
            **both(prompt_embeds=noise(1, 5, 32), pooled_prompt_embeds=noise(1, 16)), "image": picture(), "strength": 0.6,
        }, "unet", {**with_vae(), "text_encoder_2": lambda: tiny.text_encoder(True)},
    ),
    "StableDiffusionXLPipeline": Tiny(
        XL, DDIM, lambda: {**both(prompt_embeds=noise(1, 5, 32), pooled_prompt_embeds=noise(1, 16)), **SMALL}, "unet",
        {**with_vae(), "text_encoder_2": lambda: tiny.text_encoder(True)},
    ),
    "StableDiffusionXLInpaintPipeline": Tiny(
        XL, DDIM, lambda: {
            **both(prompt_embeds=noise(1, 5, 32), pooled_prompt_embeds=noise(1, 16)), "image": picture(),
            "mask_image": half_mask(), "strength": 0.8, **SMALL,
        }, "unet", {**with_vae(), "text_encoder_2": lambda: tiny.text_encoder(True)},
    ),
    "StableDiffusionPAGPipeline": Tiny(
        ("UNet2DConditionModel", UNET), DDIM, lambda: {**both(prompt_embeds=noise(1, 5, 16)), **SMALL}, "unet", with_vae(),
    ),
    "AnimateDiffPipeline": Tiny(
        ("UNet2DConditionModel", UNET), DDIM, lambda: {
            **both(prompt_embeds=noise(1, 5, 16)), "num_frames": 2, **SMALL,
        }, "unet", {**with_vae(), "motion_adapter": motion},
    ),
    "PixArtSigmaPipeline": Tiny(
        ("PixArtTransformer2DModel", {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 1,
            "sample_size": 8, "patch_size": 2, "cross_attention_dim": 16, "caption_channels": 16,
            "use_additional_conditions": False,
        }), DDIM, lambda: {
            **both(prompt_embeds=noise(1, 5, 16), prompt_attention_mask=torch.ones(1, 5)), "negative_prompt": None,
            "use_resolution_binning": False, **SMALL,
        },
    ),
    "SanaPipeline": Tiny(
        ("SanaTransformer2DModel", {
            "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
            "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 8,
        }), (FLOW, {"shift": 3.0}), lambda: {
            **both(prompt_embeds=noise(1, 5, 8), prompt_attention_mask=torch.ones(1, 5)), "negative_prompt": None,
            "use_resolution_binning": False, "height": 64, "width": 64,
        },
    ),
    "LattePipeline": Tiny(
        ("LatteTransformer3DModel", {
            "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 2,
            "caption_channels": 16, "in_channels": 4, "cross_attention_dim": 16, "out_channels": 8,
            "attention_bias": True, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "video_length": 2,
        }), DDIM, lambda: {
            **both(prompt_embeds=noise(1, 5, 16)), "negative_prompt": None, "video_length": 2, "height": 64, "width": 64,
            "clean_caption": False,
        },
    ),
    "SkyReelsV2Pipeline": Tiny(
        ("SkyReelsV2Transformer3DModel", {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1, "rope_max_seq_len": 32,
        }), (FLOW, {"shift": 8.0}), lambda: {**both(prompt_embeds=noise(1, 5, 16)), **SMALL, "num_frames": 5},
    ),
    "Flux2Pipeline": Tiny(
        ("Flux2Transformer2DModel", {
            "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 16, "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        }), DYNAMIC, lambda: {"prompt_embeds": noise(1, 5, 16), **SMALL},
    ),
    "FluxKontextPipeline": Tiny(
        ("FluxTransformer2DModel", FLUX), DYNAMIC,
        lambda: flux_call(image=picture(), max_area=16 * 16, _auto_resize=False), parts=with_vae(shift_factor=0.1),
    ),
    "ZImagePipeline": Tiny(
        ("ZImageTransformer2DModel", {
            "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 1,
            "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": (8, 4, 4),
            "axes_lens": (256, 32, 32),
        }), (FLOW, {"shift": 3.0}), lambda: {
            "prompt_embeds": [noise(5, 16)], "negative_prompt_embeds": [noise(5, 16, seed=1)], **SMALL,
        },
    ),
    "BriaPipeline": Tiny(
        ("BriaTransformer2DModel", {
            "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (0, 4, 4),
        }), (FLOW, {"shift": 3.0}), lambda: {**both(prompt_embeds=noise(1, 5, 16)), **SMALL}, parts=with_vae(),
    ),
}  # fmt: skip
