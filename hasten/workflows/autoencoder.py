"""Train an image autoencoder for latent diffusion on one's own images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from ..adapters.diffusers.autoencoders import build_autoencoder, reduction_factor
from ..distributed.ranks import Ranks
from ..errors import BadInput, check_int
from ..files import holds_lock, refuse_inside
from ..progress import ignore_messages
from ..train.autoencoder import AutoencoderLoss
from ..train.data import Batches, Data
from ..train.trained_module import TrainedModule
from ..utils.config import Config
from ..utils.random import preserve_rng_state
from .reconstruction import (
    check_free,
    check_sides,
    discriminators,
    fit_for,
    held_out_images,
    latent_deviation,
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

CARD = "autoencoder.json"  # beside the weights: settings and quality


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """The budget, network, loss and optimiser of the training of an autoencoder (`train_autoencoder`).

    Args:
        steps: budget of steps.
        minutes: budget of training time; whichever budget is used up first ends the run. Default: 30 without `steps`.
        size: side in pixels that images are resized to (`open_data`).
        channels: 1 or 3 (`open_data`).
        factor: ratio of the sides of images and latents, a power of two. Default: that of `widths`, else 4 for images
            of less than 128 pixels, and 8.
        latent_channels: of the latents. Default: 8.
        widths: channels at each resolution, finest first. Default: 16, 32, 64, 64, ...; from 128 pixels twice that.
        layers: residual blocks at each resolution of the encoder; the decoder has one more. Default: 1.
        kl: weight of the Kullback-Leibler divergence (`AutoencoderLoss`).
        l1: weight of the absolute error.
        perceptual: file or folder with the weights of a perceptual distance (`load_perceptual`). Default: no such term.
        perceptual_weight: its weight.
        gan_weight: weight of a patch discriminator's term; 0 for none.
        gan_start: fraction of the budget after which discriminator and term start, in [0, 1).
        gan_adaptive: balance the term's gradient with the rest's at the last layer (`PatchGan`).
        batch_size: images in a batch, over all processes.
        lr: AdamW's peak learning rate.
        optimiser: `muon` or `adamw`.
        flip: mirror images horizontally with probability 1/2.
        precision: `fp32` or `bf16` (autocast), with `+high`, `+medium` or `+channels_last`.
        seed: of the weights, the order of the images and the latents' noise.
        grad_accumulation: micro-batches that a process splits its batch into, to need less memory.
    """

    steps: int | None = None
    minutes: float | None = None
    size: int | None = None
    channels: int | None = None
    factor: int | None = None
    latent_channels: int | None = None
    widths: Sequence[int] | None = None
    layers: int | None = None
    kl: float = 1e-3
    l1: float = 0.1
    perceptual: str | None = None
    perceptual_weight: float = 0.1
    gan_weight: float = 0.0
    gan_start: float = 0.5
    gan_adaptive: bool = True
    batch_size: int = 16
    lr: float = 1e-3
    optimiser: str = "muon"
    flip: bool = False
    precision: str = "fp32+channels_last"
    seed: int = 0
    grad_accumulation: int = 1


class AutoencoderOptions(TypedDict, total=False):
    """The fields of `AutoencoderConfig` as keyword arguments."""

    steps: int | None
    minutes: float | None
    size: int | None
    channels: int | None
    factor: int | None
    latent_channels: int | None
    widths: Sequence[int] | None
    layers: int | None
    kl: float
    l1: float
    perceptual: str | None
    perceptual_weight: float
    gan_weight: float
    gan_start: float
    gan_adaptive: bool
    batch_size: int
    lr: float
    optimiser: str
    flip: bool
    precision: str
    seed: int
    grad_accumulation: int


@holds_lock("out")
@preserve_rng_state()
def train_autoencoder(
    data: str | Path | Data,
    out: str | Path,
    config: AutoencoderConfig | None = None,
    *,
    init: str | Path | None = None,
    device: str | None = None,
    show: bool = True,
    log: Callable[[str], None] = ignore_messages,
    **options: Unpack[AutoencoderOptions],
) -> dict[str, Any]:
    """Train a diffusers `AutoencoderKL`, and save it with the scaling factor that gives its latents unit variance.

    The EMA of the weights is saved in `out`, which `AutoencoderKL.from_pretrained(out)` loads, with `autoencoder.json`.
    The same call resumes from the checkpoint in `out` of a stopped run. PSNR and SSIM are those of reconstructions of
    the posterior's mean, on the data's split `test` or `val`, else on the training images.

    Args:
        data: the data, or the path of a folder, zip or array (`open_data`).
        out: the folder of the autoencoder, its checkpoint and its log.
        config: budget, network, loss and optimiser. Default: `AutoencoderConfig()`.
        init: folder of an `AutoencoderKL`, or of a pipeline that has one (or its bundled name), to continue from.
        device: `cpu`, `cuda`, ... Default: a GPU if there is one.
        show: show a progress bar, if stderr is a terminal.
        log: called with a line about what is done.
        options: fields of `AutoencoderConfig`.

    Returns:
        What `autoencoder.json` holds: scaling_factor, psnr, ssim, measured_on, parameters, settings.

    Raises:
        BadInput: for data or settings that cannot be used, or if `out` holds a run of others.
        HastenError: if the loss is not finite.
        KeyboardInterrupt: at Ctrl-C, after a checkpoint is written.

    References:
        Rombach et al. 2021, arXiv:2112.10752; Esser, Rombach, Ommer 2021, arXiv:2012.09841 (the discriminator).
    """
    config = AutoencoderConfig.of(config, options)
    refuse_inside(out, data)
    out, ranks = Path(out), Ranks.start(device)
    ranks.on_main_process(lambda: check_free(Path(out)))
    torch.manual_seed(check_int("seed", config.seed, 0))
    initial = None if init is None else open_base(init)
    source = open_images(data, config.size, config.channels if initial is None else initial.config.in_channels)
    vae = network_for(source, config) if initial is None else continued(initial, config)
    check_sides(source, reduction_factor(vae))
    perceptual, gan = loss_terms(config, source, ranks.device, log)
    loss = AutoencoderLoss(config.kl, config.l1, perceptual, config.perceptual_weight, gan)
    trained = [
        TrainedModule(
            "vae", vae.requires_grad_(True), lambda b: loss(vae, b["x"], b), config.lr, optimiser=config.optimiser
        ),
        *discriminators(gan, config),
    ]
    settings = {
        "network": plain_config(vae),
        "loss": loss_settings(config),
        "init": None if init is None else str(init),
    }
    batches = Batches(source, config.batch_size, seed=config.seed, flip=config.flip)
    averaged: Any = fit_for(config, device)(trained, batches, out, show, settings)["vae"]
    averaged.eval()
    deviation = latent_deviation(averaged, source)
    averaged.register_to_config(scaling_factor=1 / deviation, sample_size=max(source.shape[1:]))
    held_out, name = held_out_images(data, source, config.size)
    card = {
        "scaling_factor": 1 / deviation,
        **reconstruction_quality(averaged, held_out),
        "measured_on": name,
        "parameters": sum(p.numel() for p in averaged.parameters()),
        "images": len(source),
        "shape": list(source.shape),
        "settings": {**config.to_dict(), "data": source.source, **({"init": str(init)} if init else {})},
    }
    log(f"latents have the standard deviation {deviation:.4g}: the scaling factor is {1 / deviation:.4g}")
    log(f"{spell_quality(card)} on {name}")
    save_autoencoder(averaged, out, CARD, card, ranks)
    return card


def network_for(data: Data, config: AutoencoderConfig) -> Any:
    """The untrained autoencoder for these images."""
    channels, height, width = data.shape
    side = min(height, width)
    widths = config.widths
    if widths is None:
        factor = (4 if side < 128 else 8) if config.factor is None else check_int("factor", config.factor, 1)
        if factor & (factor - 1):
            near = 2 ** max(round(factor).bit_length() - 1, 0)
            raise BadInput(f"factor must be a power of two, got {factor}: the nearest are {near} and {2 * near}")
        first = 16 if side < 128 else 32
        widths = [min(first * 2**k, 4 * first) for k in range(factor.bit_length())]
    elif config.factor is not None and config.factor != 2 ** (len(widths) - 1):
        raise BadInput(
            f"{len(widths)} widths halve the sides {len(widths) - 1} times, a factor of {2 ** (len(widths) - 1)}, "
            f"not {config.factor}"
        )
    return build_autoencoder(channels, max(height, width), widths, config.layers or 1, config.latent_channels or 8)


def continued(vae: Any, config: AutoencoderConfig) -> Any:
    """The autoencoder to continue from, if the config asks for no other network."""
    if type(vae).__name__ != "AutoencoderKL":
        raise BadInput(f"init must be an AutoencoderKL, found {type(vae).__name__}")
    own = {
        "widths": list(vae.config.block_out_channels),
        "layers": vae.config.layers_per_block,
        "latent_channels": vae.config.latent_channels,
        "factor": reduction_factor(vae),
        "channels": vae.config.in_channels,
    }
    for name, value in own.items():
        requested = getattr(config, name)
        requested = list(requested) if isinstance(requested, (list, tuple)) else requested
        if requested not in (None, value):
            raise BadInput(f"init has the {name} {value}, the config asks for {requested}: leave {name} out")
    return vae
