"""Image autoencoders of `diffusers`: built, opened, and with a smaller decoder in place of their own."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, check_int
from ...utils.logs import errors_only
from .conditions import Latents
from .library import INDEX, diffusers, without_loading_bars

__all__ = [
    "LIGHT_DECODER",
    "build_autoencoder",
    "build_light_decoder",
    "check_same_encoder",
    "check_encoder_norms",
    "default_light_groups",
    "default_light_widths",
    "distilled_from",
    "encoder_norms",
    "open_autoencoder",
    "reduction_factor",
    "replace_decoder",
]

LIGHT_DECODER = "decoder.json"  # beside the weights of a light decoder: what it was distilled from, and its quality
CLASSES = ("AutoencoderKL", "AsymmetricAutoencoderKL")
DECODERS = (*CLASSES, "AutoencoderTiny")
MAX_GROUPS = 16  # of group normalisation, in autoencoders that are built here


def reduction_factor(vae: Any) -> int:
    """The ratio of the sides of images and latents."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def build_autoencoder(channels: int, side: int, widths: Sequence[int], layers: int, latent_channels: int) -> Any:
    """An untrained `AutoencoderKL` without attention.

    Args:
        channels: of the images.
        side: of the images, for its config.
        widths: channels at each resolution, finest first; one more than the factor's power of two.
        layers: residual blocks at each resolution of the encoder; the decoder has one more.
        latent_channels: of the latents.

    Raises:
        BadInput: for widths that are no positive multiples of 4, or other numbers below 1.
    """
    check_widths(widths, 4, "group normalisation needs that")
    check_int("layers", layers, 1)
    check_int("latent_channels", latent_channels, 1)
    levels = len(widths)
    return diffusers().AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=math.gcd(MAX_GROUPS, *widths),
        sample_size=side,
        mid_block_add_attention=False,
    )


def open_autoencoder(path: str | Path, classes: Sequence[str] = CLASSES) -> Any:
    """The image autoencoder in a folder, or that of a pipeline's folder, in float32.

    Args:
        path: of the folder.
        classes: of diffusers, that it may have.

    Raises:
        BadInput: if there is none that diffusers loads, or one of another class.
    """
    folder = Path(path)
    if (folder / INDEX).is_file():
        folder = folder / "vae"
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"{path} holds no autoencoder of diffusers (no {file.name}), and no pipeline with one")
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"cannot read {file}: {error}") from error
    if name not in classes:
        raise BadInput(f"{folder} holds a {name}: this takes {' or '.join(classes)}")
    try:
        # AsymmetricAutoencoderKL warns of entries of the config that it writes itself
        with without_loading_bars(), errors_only("diffusers.configuration_utils"):
            return getattr(diffusers(), name).from_pretrained(str(folder)).float().eval().requires_grad_(False)
    except Exception as error:  # of many kinds: missing or damaged files
        message = " ".join(str(error).split())[:200]
        raise BadInput(f"diffusers cannot load {folder}: {message}") from error


def default_light_widths(vae: Any) -> tuple[int, ...]:
    """Half the widths of an autoencoder's decoder, rounded up to multiples of its groups."""
    groups = int(vae.config.norm_num_groups)
    return tuple(groups * -(-width // (2 * groups)) for width in vae.config.block_out_channels)


def default_light_groups(vae: Any, widths: Sequence[int]) -> int:
    """The groups of an autoencoder's normalisation; where they would leave one channel to a group, groups of 8.

    Groups of one channel take the mean and scale of each channel from the features, also from those that become pixels.
    """
    groups = int(vae.config.norm_num_groups)
    return groups if min(widths) > groups else max(math.gcd(*widths, *vae.config.block_out_channels) // 8, 1)


def build_light_decoder(
    vae: Any, widths: Sequence[int] | None = None, layers: int | None = None, groups: int | None = None
) -> Any:
    """The autoencoder with a smaller, untrained decoder: an `AsymmetricAutoencoderKL`, which diffusers loads.

    Its encoder is exactly that of `vae`: where that has no attention, the attention of the new class adds zero. Weights
    of the decoder that have the name and shape of the old decoder's start from these. The layers for inpainting masks
    that the class has are zero. Only the decoder requires gradients.

    With other `groups` than `vae` has, the encoder has them too (the class has one number for both), and requires
    gradients: it has to learn the latents of `vae`'s again.

    Args:
        vae: an `AutoencoderKL`.
        widths: channels of the decoder at each resolution, finest first, multiples of `vae`'s `norm_num_groups`.
            Default: half of `vae`'s.
        layers: the decoder has one more residual block than this at each resolution. Default: one less than `vae`.
        groups: of its normalisation. Default: `default_light_groups`.

    Raises:
        BadInput: for a `vae` that the class cannot express (a shift or a mean of the latents, tiled blocks of another
            kind), and for numbers that do not fit.
    """
    config = vae.config
    if type(vae).__name__ != "AutoencoderKL":
        raise BadInput(f"a light decoder is distilled from an AutoencoderKL, found {type(vae).__name__}")
    shifted = [name for name in ("shift_factor", "latents_mean", "latents_std") if config.get(name)]
    if shifted:
        raise BadInput(f"the autoencoder has a {shifted[0]}, which AsymmetricAutoencoderKL does not support")
    kinds = {*config.down_block_types, *config.up_block_types}
    if kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        raise BadInput(f"the autoencoder has blocks {', '.join(sorted(kinds))}: DownEncoderBlock2D only are supported")
    old = tuple(config.block_out_channels)
    widths = default_light_widths(vae) if widths is None else tuple(widths)
    layers = max(int(config.layers_per_block) - 1, 0) if layers is None else check_int("layers", layers, 0)
    check_widths(widths, 1, "")
    groups = default_light_groups(vae, widths) if groups is None else check_int("groups", groups, 1)
    check_widths((*widths, *old), groups, "the groups of the normalisation")
    if len(widths) != len(old):
        raise BadInput(f"the decoder needs {len(old)} widths, one for each resolution of {old}, got {len(widths)}")
    light = diffusers().AsymmetricAutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=tuple(config.down_block_types),
        down_block_out_channels=old,
        layers_per_down_block=config.layers_per_block,
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        up_block_out_channels=widths,
        layers_per_up_block=layers,
        act_fn=config.act_fn,
        latent_channels=config.latent_channels,
        norm_num_groups=groups,
        sample_size=config.sample_size,
        scaling_factor=config.scaling_factor,
    )
    _copy_encoder(vae, light)
    own = dict(light.decoder.named_parameters())
    with torch.no_grad():
        for name, weight in vae.decoder.named_parameters():
            if name in own and own[name].shape == weight.shape:
                own[name].copy_(weight)
        _copy_or_identity(light.post_quant_conv, vae.post_quant_conv)
        for weight in light.decoder.condition_encoder.parameters():
            weight.zero_()
    light.requires_grad_(False)
    light.decoder.requires_grad_(True)
    light.decoder.condition_encoder.requires_grad_(False)
    light.post_quant_conv.requires_grad_(True)
    if groups != config.norm_num_groups:
        light.encoder.requires_grad_(True)
        light.quant_conv.requires_grad_(True)
    return light


def _copy_encoder(vae: Any, light: Any) -> None:
    """Give `light` the encoder of `vae`."""
    missing, unexpected = light.encoder.load_state_dict(vae.encoder.state_dict(), strict=False)
    added = [name for name in missing if not name.startswith("mid_block.attentions.")]
    if added or unexpected:
        raise BadInput(f"the autoencoder's encoder has other layers than diffusers' own: {(added + unexpected)[0]}")
    with torch.no_grad():
        for attention in light.encoder.mid_block.attentions if missing else ():
            for weight in attention.to_out[0].parameters():
                weight.zero_()
        _copy_or_identity(light.quant_conv, vae.quant_conv)


def _copy_or_identity(conv: nn.Conv2d, other: nn.Conv2d | None) -> None:
    """Give a 1x1 convolution the weights of another, or those of the identity."""
    if other is not None:
        conv.load_state_dict(other.state_dict())
        return
    assert conv.bias is not None
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)


def check_widths(widths: Sequence[int], multiple: int, why: str) -> None:
    """Raise BadInput unless all widths are positive multiples of a number."""
    if not widths:
        raise BadInput("widths are the channels at each resolution, such as 16,32,64: got none")
    for width in widths:
        check_int("widths", width, 1)
        if width % multiple:
            near = max(multiple, round(width / multiple) * multiple)
            raise BadInput(f"widths must be multiples of {multiple} ({why}), got {width}: the nearest is {near}")


def check_same_encoder(vae: Any, other: Any, where: str) -> None:
    """Raise BadInput if two autoencoders have different latents before scaling: other encoders, or other factors.

    Args:
        vae: of the model.
        other: whose decoder is to take the place of `vae`'s.
        where: the folder of `other`, for the message.
    """
    check_same_shapes(vae, other, where)
    weights = dict(vae.encoder.named_parameters())
    for name, weight in other.encoder.named_parameters():
        known = weights.get(name)
        if known is None and name.startswith("mid_block.attentions.") and not (".to_out." in name and weight.any()):
            continue  # attention that adds zero
        if known is None or known.shape != weight.shape or not close_weights(known, weight):
            raise BadInput(f"{where} has another encoder than the model's autoencoder ({name}): its latents differ")


def encoder_norms(vae: Any) -> list[float]:
    """The norms of an autoencoder's encoder weights in order of their names: which encoder a decoder is for."""
    return [float(weight.detach().float().norm()) for _, weight in sorted(vae.encoder.named_parameters())]


def check_encoder_norms(vae: Any, norms: Sequence[float], where: str) -> None:
    """Raise BadInput if a decoder is for the latents of another encoder than an autoencoder's (`encoder_norms`)."""
    mine = encoder_norms(vae)
    if len(mine) != len(norms) or not torch.allclose(torch.tensor(mine), torch.tensor(norms), rtol=1e-2, atol=1e-2):
        raise BadInput(f"{where} is a decoder for the latents of another autoencoder than the model's")


def close_weights(a: Tensor, b: Tensor) -> bool:
    """Whether weights of one shape are equal up to rounding to half precision."""
    return torch.allclose(a.detach().float().cpu(), b.detach().float().cpu(), rtol=1e-2, atol=1e-3)


def check_same_shapes(vae: Any, other: Any, where: str) -> None:
    """Raise BadInput if two autoencoders have latents or images of different channels, or different factors."""
    for name in ("latent_channels", "in_channels"):
        mine, theirs = vae.config.get(name), other.config.get(name)
        if mine != theirs:
            raise BadInput(f"{where} is for latents of other autoencoders: {name} {theirs}, the model has {mine}")
    if (mine := reduction_factor(vae)) != (theirs := reduction_factor(other)):
        raise BadInput(f"{where} enlarges latents {theirs} times, the model's autoencoder {mine} times")


def replace_decoder(decoder: Latents, pipeline: Any, folder: str | Path) -> tuple[Latents, Any]:
    """The image decoder of a model with the autoencoder in a folder in place of its own, and its pipeline with that.

    Args:
        decoder: of the model, unchanged.
        pipeline: of the model, unchanged; or None.
        folder: of an `AsymmetricAutoencoderKL` or `AutoencoderKL` with the same encoder, or with one that was distilled
            from it (the model's own goes on encoding), whose scale becomes that of the model; or of an
            `AutoencoderTiny` for such latents, which has its own scale, and whose encoder cannot be compared.

    Raises:
        BadInput: for an autoencoder of other latents.
    """
    mine, encoder = decoder.encoder or decoder.vae, None
    other = open_autoencoder(folder, DECODERS)
    if type(other).__name__ == "AutoencoderTiny":
        check_same_shapes(mine, other, str(folder))
    else:
        if (norms := distilled_from(folder)) is None:
            check_same_encoder(mine, other, str(folder))
        else:
            check_same_shapes(mine, other, str(folder))
            check_encoder_norms(mine, norms, str(folder))
            encoder = mine
        shared = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
        other.register_to_config(**{name: mine.config[name] for name in shared if mine.config.get(name) is not None})
    with errors_only("diffusers.models.modeling_utils"):  # it warns even where it keeps no module in float32
        other.to(mine.device, mine.dtype)
    if pipeline is not None:
        pipeline = copy.copy(pipeline)  # which shares its components; setattr on it leaves the original unchanged
        pipeline.vae = other
    return Latents(other, decoder.rows, encoder), pipeline


def distilled_from(folder: str | Path) -> list[float] | None:
    """The norms of the encoder that a light autoencoder's own was distilled from; None where it is that one."""
    file = Path(folder) / LIGHT_DECODER
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("encoder_norms") if file.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"cannot read {file}: {error}") from error
