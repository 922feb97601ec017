"""Which pipelines of `diffusers` are a network with prompts or classes and an image decoder, as `load` supports.

A pipeline may be more than its network: a ControlNet, an adapter, an image as a condition, a guidance of its own. What
`load` does not support is refused by name, not dropped.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import BadInput

__all__ = ["check_loadable"]

# Pipelines whose samples from noise are those of their network alone. Image-to-image and inpainting pipelines (whose
# network takes only the noisy image) also sample from noise, at a strength of 1.
KINDS = {
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline",
    "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline",
    "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", "AltDiffusionPipeline",
    "AltDiffusionImg2ImgPipeline", "IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline", "DDPMPipeline",
    "DDIMPipeline", "PNDMPipeline", "LDMPipeline", "DiTPipeline",
}  # fmt: skip
PARTS = {
    "unet", "transformer", "scheduler", "vae", "vqvae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer",
    "tokenizer_2", "tokenizer_3", "safety_checker", "feature_extractor", "watermark", "watermarker", "image_encoder",
}  # fmt: skip
INSTEAD = "use the pipeline itself, with hasten.as_scheduler(...) or hasten.accelerate(pipe, ...)"


def check_loadable(pipe: Any, slot: str, net: nn.Module) -> None:
    """Refuse a pipeline that needs more than its network, prompts or classes, and decoder.

    Args:
        pipe: the pipeline.
        slot: name of its network's component.
        net: the network.

    Raises:
        BadInput: with the reason.
    """
    name = type(pipe).__name__
    bases = [base.__name__ for base in type(pipe).__mro__]
    components = sorted(pipe.components.items())
    extra = [part for part, value in components if part not in PARTS and isinstance(value, nn.Module)]
    if extra:
        parts = " and ".join(f"{'an' if part[0] in 'aeiou' else 'a'} {part}" for part in extra)
        raise BadInput(f"{name} has {parts}, which load would drop: {INSTEAD}")
    if type(pipe).__module__.startswith("diffusers.") and not KINDS & set(bases):
        raise BadInput(
            f"{name} does more than sample its {slot} from prompts or classes, which load would drop: {INSTEAD}"
        )
    config: Any = net.config
    check_conditions(name, slot, config, hasattr(pipe, "_get_add_time_ids"))
    decoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    channels = getattr(getattr(decoder, "config", None), "latent_channels", None)
    if channels is not None and int(channels) != int(config.in_channels):
        raise needs_image(slot, config.in_channels, channels)
    if hasattr(pipe, "encode_prompt") and not any(getattr(pipe, f"text_encoder{k}", None) for k in ("", "_2", "_3")):
        raise BadInput(
            f"{name} has no text encoder, so load cannot make conditions of prompts: load it with its text encoders, "
            f"or, with prompt_embeds, {INSTEAD}"
        )


def check_conditions(name: str, slot: str, config: Any, sizes: bool) -> None:
    """Refuse a network with a condition that neither prompts nor classes provide.

    Args:
        name: of the pipeline.
        slot: name of its network's component.
        config: of the network.
        sizes: whether the pipeline computes SDXL's sizes and crops.

    Raises:
        BadInput: with the condition.
    """
    conditional = "cross_attention_dim" in config
    kind = config.get("class_embed_type")
    if kind or (conditional and config.get("num_class_embeds")):
        which = repr(kind) if kind else f"of {config.get('num_class_embeds')} classes beside text"
        raise BadInput(
            f"the {slot} of {name} needs a class embedding ({which}), which load has no value for: {INSTEAD}"
        )
    added = config.get("addition_embed_type")
    if added not in (None, "text", "text_time") or (added == "text_time" and not sizes):
        raise BadInput(
            f"the {slot} of {name} needs an added embedding {added!r}, which load has no value for: {INSTEAD}"
        )
    hidden = config.get("encoder_hid_dim_type")
    if hidden == "ip_image_proj":
        raise BadInput(
            f"{name} has an IP-Adapter, which needs an image: pipe.unload_ip_adapter() before load, or {INSTEAD}"
        )
    if hidden not in (None, "text_proj"):
        raise BadInput(
            f"the {slot} of {name} is conditioned on an image ({hidden}), which load has no value for: {INSTEAD}"
        )


def needs_image(slot: str, takes: int, has: int) -> BadInput:
    """The error for a network with further input channels."""
    return BadInput(
        f"the {slot} takes {takes} channels and samples have {has}: it needs an image beside the noisy one; use it "
        "through its pipeline (hasten.as_scheduler, hasten.accelerate)"
    )
