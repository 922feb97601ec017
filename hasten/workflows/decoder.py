"""Distil a light decoder for the latents of an autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..adapters.diffusers.autoencoders import LIGHT_DECODER, build_light_decoder, encoder_norms, reduction_factor
from ..distributed.ranks import Ranks
from ..errors import BadInput, check_int
from ..files import holds_lock, refuse_inside
from ..performance.cost import macs
from ..progress import ignore_messages
from ..train.autoencoder import AutoencoderLoss, DecoderLoss
from ..train.data import Batches, Data, to_float
from ..train.trained_module import TrainedModule
from ..utils.config import Config
from ..utils.random import preserve_rng_state
from .reconstruction import (
    BLOCK,
    check_free,
    check_sides,
    discriminators,
    fit_for,
    held_out_images,
    loss_settings,
    loss_terms,
    open_base,
    open_images,
    plain_config,
    reconstruction_quality,
    save_autoencoder,
    spell_quality,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

MEMORY = 2**31  # bytes of latents and decoded images that are computed once and kept


@dataclass(frozen=True)
class DecoderConfig(Config):
    """The budget, network, loss and optimiser of the distillation of a decoder (`distill_decoder`).

    Args:
        steps: budget of steps.
        minutes: budget of training time; whichever budget is used up first ends the run. Default: 30 without `steps`.
        size: side in pixels that images are resized to (`open_data`).
        widths: channels of the decoder at each resolution, finest first (`build_light_decoder`). Default: half of the
            full decoder's.
        layers: it has one more residual block than this at each resolution. Default: one less than the full one.
        groups: of the normalisation (`build_light_decoder`). Default: the full autoencoder's, unless these would leave
            one channel to a group. With others, the encoder is distilled too.
        teacher: weight of the squared difference from the full decoder's output (`DecoderLoss`).
        l1: weight of the absolute error.
        perceptual: file or folder with the weights of a perceptual distance (`load_perceptual`). Default: no such term.
        perceptual_weight: its weight.
        gan_weight: weight of a patch discriminator's term; 0 for none.
        gan_start: fraction of the budget after which discriminator and term start, in [0, 1).
        gan_adaptive: balance the term's gradient with the rest's at the last layer (`PatchGan`).
        batch_size: images in a batch, over all processes.
        lr: AdamW's peak learning rate.
        optimiser: `muon` or `adamw`.
        precision: `fp32` or `bf16` (autocast), with `+high`, `+medium` or `+channels_last`.
        seed: of the weights, the order of the images and the latents' noise.
        grad_accumulation: micro-batches that a process splits its batch into, to need less memory.
    """

    steps: int | None = None
    minutes: float | None = None
    size: int | None = None
    widths: Sequence[int] | None = None
    layers: int | None = None
    groups: int | None = None
    teacher: float = 1.0
    l1: float = 0.0
    perceptual: str | None = None
    perceptual_weight: float = 0.1
    gan_weight: float = 0.0
    gan_start: float = 0.5
    gan_adaptive: bool = True
    batch_size: int = 16
    lr: float = 1e-3
    optimiser: str = "muon"
    precision: str = "fp32+channels_last"
    seed: int = 0
    grad_accumulation: int = 1


class DecoderOptions(TypedDict, total=False):
    """The fields of `DecoderConfig` as keyword arguments."""

    steps: int | None
    minutes: float | None
    size: int | None
    widths: Sequence[int] | None
    layers: int | None
    groups: int | None
    teacher: float
    l1: float
    perceptual: str | None
    perceptual_weight: float
    gan_weight: float
    gan_start: float
    gan_adaptive: bool
    batch_size: int
    lr: float
    optimiser: str
    precision: str
    seed: int
    grad_accumulation: int


@holds_lock("out")
@preserve_rng_state()
def distill_decoder(
    base: str | Path | Any,
    data: str | Path | Data,
    out: str | Path,
    config: DecoderConfig | None = None,
    *,
    device: str | None = None,
    show: bool = True,
    log: Callable[[str], None] = ignore_messages,
    **options: Unpack[DecoderOptions],
) -> dict[str, Any]:
    """Distil a smaller decoder for the latents of an autoencoder, and save it for diffusers and hasten.

    The latents of the data and the full decoder's images of them are computed once before training, if they fit into
    2 GiB, else for each batch. The EMA of the weights is saved in `out`: an `AsymmetricAutoencoderKL` with the base's
    encoder (or, where its normalisation has other groups, one that is distilled from it), for
    `pipe.vae = AsymmetricAutoencoderKL.from_pretrained(out)` and `Model.with_decoder(out)`, with `decoder.json`. The
    same call resumes from the checkpoint in `out` of a stopped run.

    Args:
        base: folder of an `AutoencoderKL` or of a pipeline that has one (or its bundled name), or the autoencoder.
        data: images like those that are decoded: the data, or the path of a folder, zip or array (`open_data`).
        out: the folder of the decoder, its checkpoint and its log.
        config: budget, network, loss and optimiser. Default: `DecoderConfig()`.
        device: `cpu`, `cuda`, ... Default: a GPU if there is one.
        show: show a progress bar, if stderr is a terminal.
        log: called with a line about what is done.
        options: fields of `DecoderConfig`.

    Returns:
        What `decoder.json` holds: `light` and `full` with psnr, ssim, macs (of one image) and parameters, of the full
        encoder's latents; measured_on, settings; where the encoder is distilled, `with_light_encoder`: psnr and ssim,
        and `encoder_norms`, of the encoder that it was distilled from.

    Raises:
        BadInput: for data, an autoencoder or settings that cannot be used, or if `out` holds a run of others.
        HastenError: if the loss is not finite.
        KeyboardInterrupt: at Ctrl-C, after a checkpoint is written.

    References:
        Zhao et al. 2023, arXiv:2311.16567 (MobileDiffusion); Bohan 2023, "Tiny autoencoder for Stable Diffusion".
    """
    config = DecoderConfig.of(config, options)
    refuse_inside(out, data)
    out, ranks = Path(out), Ranks.start(device)
    ranks.on_main_process(lambda: check_free(Path(out)))
    vae = open_base(base) if isinstance(base, (str, Path)) else base
    vae = vae.to(ranks.device).eval().requires_grad_(False)
    torch.manual_seed(check_int("seed", config.seed, 0))
    light = build_light_decoder(vae, config.widths, config.layers, config.groups)
    source = open_images(data, config.size, vae.config.in_channels)
    check_sides(source, reduction_factor(vae))
    perceptual, gan = loss_terms(config, source, ranks.device, log)
    images = AutoencoderLoss(0.0, config.l1, perceptual, config.perceptual_weight, gan)
    own_encoder = light.config.norm_num_groups != vae.config.norm_num_groups
    loss = DecoderLoss(images, config.teacher, lambda x: targets_of(vae, x), float(own_encoder))
    if own_encoder:
        log(
            f"normalisation in {light.config.norm_num_groups} groups, not {vae.config.norm_num_groups}: distils the "
            "encoder too"
        )
    trained = [
        TrainedModule("decoder", light, lambda batch: loss(light, batch), config.lr, optimiser=config.optimiser),
        *discriminators(gan, config),
    ]
    settings = {"network": plain_config(light), "loss": loss_settings(config)}
    cached = with_targets(vae, source, config, log) if ranks.world == 1 else source
    batches = Batches(cached, config.batch_size, seed=config.seed)
    averaged: Any = fit_for(config, device)(trained, batches, out, show, settings)["decoder"]
    averaged.eval()
    held_out, name = held_out_images(data, source, config.size)
    z = torch.zeros(1, vae.config.latent_channels, *(side // reduction_factor(vae) for side in source.shape[1:]))
    card: dict[str, Any] = {
        kind: {
            **reconstruction_quality(net, held_out, encoder=vae),
            "macs": macs(net.decode, z.to(ranks.device)),
            "parameters": sum(p.numel() for n, p in net.decoder.named_parameters() if "condition_encoder" not in n),
        }
        for kind, net in (("full", vae), ("light", averaged))
    }
    if own_encoder:
        card |= {"with_light_encoder": reconstruction_quality(averaged, held_out), "encoder_norms": encoder_norms(vae)}
    card |= {
        "measured_on": name,
        "images": len(source),
        "shape": list(source.shape),
        "settings": {**config.to_dict(), "data": source.source},
    }
    ratio = card["full"]["macs"] / card["light"]["macs"]
    for kind in ("full", "light"):
        log(f"{kind} decoder: {card[kind]['macs'] / 1e6:.1f} million multiply-accumulates, {spell_quality(card[kind])}")
    if own_encoder:
        log(f"with the distilled encoder: {spell_quality(card['with_light_encoder'])}")
    log(f"{ratio:.1f}x fewer multiply-accumulates; measured on {name}")
    save_autoencoder(averaged, out, LIGHT_DECODER, card, ranks)
    return card


@torch.no_grad()
def targets_of(vae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and log variance of the posterior of images, and the images that the full decoder makes of the mean."""
    weight = next(vae.parameters())
    posterior = vae.encode(x.to(weight.device, weight.dtype)).latent_dist
    return posterior.mean.float(), posterior.logvar.float(), vae.decode(posterior.mean).sample.float()


def with_targets(vae: Any, data: Data, config: DecoderConfig, log: Callable[[str], None]) -> Data:
    """The data with the targets of all images as conditions, float16; unchanged where they would not fit in memory, or
    the run is too short to use them all."""
    mean, _, target = targets_of(vae, to_float(data.images([0])))
    size = 2 * len(data) * (2 * mean.numel() + target.numel())
    short = config.steps is not None and config.steps * config.batch_size < len(data)
    if size > MEMORY or short:
        return data
    log(f"computing the latents and decoded images of {len(data):,} images")
    shapes = {"mean": mean.shape[1:], "logvar": mean.shape[1:], "target": target.shape[1:]}
    tensors = {name: torch.empty(len(data), *shape, dtype=torch.float16) for name, shape in shapes.items()}
    for first in range(0, len(data), BLOCK):
        indices = list(range(first, min(first + BLOCK, len(data))))
        for tensor, values in zip(tensors.values(), targets_of(vae, to_float(data.images(indices))), strict=True):
            tensor[first : first + BLOCK] = values.cpu().half()
    if not all(math.isfinite(float(tensor.float().abs().amax())) for tensor in tensors.values()):
        raise BadInput("the autoencoder's latents or images are not finite, or too large for float16")
    return replace(data, conditions=lambda indices: {name: tensor[indices] for name, tensor in tensors.items()})
