"""Which pipelines of `diffusers` are a network with prompts or classes and an image decoder, as `load` takes them.

A pipeline is more than its network: a ControlNet, an adapter, an image that is a condition, a guidance of its own. What
`load` cannot ask for is refused, by name, and not left out.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import BadInput

__all__ = ["check_loadable"]

# Pipelines whose images from noise are those of their network alone. Image-to-image and inpainting pipelines (whose
# network takes the noisy image alone) also draw from noise, at a strength of 1.
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
    """Raises BadInput for a pipeline whose images need more than its network, prompts or classes, and decoder."""
    name = type(pipe).__name__
    bases = [base.__name__ for base in type(pipe).__mro__]
    beside = sorted(
        part for part, value in pipe.components.items()
        if value is not None and part not in PARTS and isinstance(value, nn.Module)
    )  # fmt: skip
    beside = [f"{'an' if part[0] in 'aeiou' else 'a'} {part}" for part in beside]
    if beside:
        raise BadInput(f"{name} has {' and '.join(beside)}, which load would leave out: {INSTEAD}")
    if type(pipe).__module__.startswith("diffusers.") and not KINDS & set(bases):
        raise BadInput(
            f"{name} does more than ask its {slot} from prompts or classes, which load would drop: {INSTEAD}"
        )
    check_conditions(name, slot, net.config, hasattr(pipe, "_get_add_time_ids"))
    decoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    channels = getattr(getattr(decoder, "config", None), "latent_channels", None)
    if channels is not None and int(channels) != int(net.config.in_channels):
        raise wants_image(slot, net.config.in_channels, channels)
    if hasattr(pipe, "encode_prompt") and not any(getattr(pipe, f"text_encoder{k}", None) for k in ("", "_2", "_3")):
        raise BadInput(
            f"{name} has no text encoder, so load cannot make conditions of prompts: load it with its text encoders, "
            f"or, with prompt_embeds, {INSTEAD}"
        )


def check_conditions(name: str, slot: str, config: Any, sizes: bool) -> None:
    """Refuse a network that wants a condition that no prompt and no class gives.

    sizes: whether the pipeline knows SDXL's sizes and crops.
    """
    conditional = "cross_attention_dim" in config
    kind = config.get("class_embed_type")
    if kind or (conditional and config.get("num_class_embeds")):
        said = repr(kind) if kind else f"of {config.get('num_class_embeds')} classes beside text"
        raise BadInput(f"the {slot} of {name} wants a class embedding ({said}), which load has no value for: {INSTEAD}")
    added = config.get("addition_embed_type")
    if added not in (None, "text", "text_time") or (added == "text_time" and not sizes):
        raise BadInput(
            f"the {slot} of {name} wants an added embedding {added!r}, which load has no value for: {INSTEAD}"
        )
    hidden = config.get("encoder_hid_dim_type")
    if hidden == "ip_image_proj":
        raise BadInput(
            f"{name} has an IP-Adapter, which wants an image: pipe.unload_ip_adapter() before load, or {INSTEAD}"
        )
    if hidden not in (None, "text_proj"):
        raise BadInput(f"the {slot} of {name} is told an image ({hidden}), which load has no value for: {INSTEAD}")


def wants_image(slot: str, takes: int, has: int) -> BadInput:
    return BadInput(
        f"the {slot} takes {takes} channels and samples have {has}: it wants an image beside the noisy one; use it "
        "through its pipeline (hasten.as_scheduler, hasten.accelerate)"
    )
