"""What the training of an autoencoder and of a light decoder share: data, losses, quality, files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import zoo
from ..adapters.diffusers.autoencoders import open_autoencoder
from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..files import describe_contents, write_file
from ..metrics.difference import WINDOW, image_difference, structural_similarity
from ..nets.lpips import load_perceptual
from ..nets.patch_discriminator import PatchDiscriminator
from ..train.data import Data, open_data, to_float
from ..train.fit import Ema, Fit
from ..train.patch_gan import PatchGan
from ..train.trained_module import TrainedModule
from ..utils.devices import as_float64

MEASURED = 4096  # images of which the latents' standard deviation is measured
HELD_OUT = 1000  # images that PSNR and SSIM are measured on, at most
BLOCK = 16  # images encoded or decoded at once


def open_base(name: str | Path) -> Any:
    """The autoencoder in a folder, or of a pipeline, by its folder or bundled name (`open_autoencoder`)."""
    cards = zoo.cards()
    return open_autoencoder(cards[str(name)].folder if str(name) in cards else name)


def open_images(data: str | Path | Data, size: int | None, channels: int | None) -> Data:
    """The training images, without labels."""
    return data if isinstance(data, Data) else open_data(data, size=size, channels=channels, label="none")


def check_free(out: Path) -> None:
    """Raise BadInput if the folder holds anything that training would overwrite."""
    if (out / "checkpoint.pt").is_file():
        return  # of this run, or of another, which the training loop refuses
    content = describe_contents(out) or ("a network of diffusers" if (out / "config.json").is_file() else None)
    if content is not None:
        raise BadInput(f"{out} holds {content} already: choose another folder, or remove it")


def check_sides(data: Data, factor: int) -> None:
    """Raise BadInput for images whose sides are no multiples of the factor."""
    _, height, width = data.shape
    if height % factor or width % factor:
        near = max(round(max(height, width) / factor), 1) * factor
        raise BadInput(
            f"images of {height}x{width} do not fit a factor of {factor}: set --size {near}, or another factor"
        )


def loss_terms(
    config: Any, data: Data, device: torch.device, log: Callable[[str], None]
) -> tuple[nn.Module | None, PatchGan | None]:
    """The perceptual and the adversarial term of a config, None where it has none of them."""
    perceptual = None
    if config.perceptual is None:
        log("no perceptual term: no weights are given (perceptual)")
    else:
        perceptual = load_perceptual(config.perceptual).to(device)
        perceptual.check_side(min(data.shape[1:]))
    if not config.gan_weight:
        return perceptual, None
    side = min(data.shape[1:])
    if side < 8:
        raise BadInput(f"a patch discriminator needs images of at least 8 pixels, got {side}: set gan_weight 0")
    discriminator = PatchDiscriminator(data.shape[0], side)
    return perceptual, PatchGan(discriminator, config.gan_weight, config.gan_adaptive)


def discriminators(gan: PatchGan | None, config: Any) -> list[TrainedModule]:
    """The discriminator as it is trained, if there is one."""
    if gan is None:
        return []
    betas = (0.5, 0.9)
    return [
        TrainedModule(
            "discriminator", gan.discriminator, gan.discriminator_loss, 2e-4, betas, 0.0, start=config.gan_start
        )
    ]


def loss_settings(config: Any) -> dict[str, Any]:
    """What of a config changes the loss."""
    names = ("kl", "l1", "teacher", "perceptual", "perceptual_weight", "gan_weight", "gan_start", "gan_adaptive")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def fit_for(config: Any, device: str | None) -> Fit:
    """The training loop of a config."""
    minutes = 30.0 if config.steps is None and config.minutes is None else config.minutes
    return Fit(
        steps=config.steps,
        minutes=minutes,
        warmup=200 if config.steps is None else min(200, config.steps // 10),
        precision=config.precision,
        ema=Ema("power", gamma=12.0),
        seed=config.seed,
        device=device,
        accumulate=config.grad_accumulation,
        log_steps=25,
    )


def plain_config(vae: Any) -> dict[str, Any]:
    """The config of a network of diffusers, as JSON holds it, without the scale and names of files."""
    hidden = ("scaling_factor", "sample_size")
    config = {key: value for key, value in dict(vae.config).items() if not key.startswith("_") and key not in hidden}
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return plain


def blocks_of(data: Data, count: int) -> Iterator[Tensor]:
    """`count` images, spread evenly over the data, as (n, C, H, W) in [-1, 1], a block at a time."""
    count = min(count, len(data))
    indices = [k * len(data) // count for k in range(count)]
    for first in range(0, count, BLOCK):
        yield to_float(data.images(indices[first : first + BLOCK]))


@torch.no_grad()
def latent_deviation(vae: Any, data: Data, count: int = MEASURED) -> float:
    """The standard deviation of all entries of the posterior's means of the data, about their mean.

    Raises:
        BadInput: if the latents are constant.
    """
    weight = next(vae.parameters())
    total, squares, n = 0.0, 0.0, 0
    for x in blocks_of(data, count):
        z = as_float64(vae.encode(x.to(weight.device, weight.dtype)).latent_dist.mode())
        total, squares, n = total + float(z.sum()), squares + float(z.square().sum()), n + z.numel()
    variance = squares / n - (total / n) ** 2
    if not variance > 1e-12:
        raise BadInput("the latents are constant: train longer, or with a smaller kl")
    return math.sqrt(variance)


@torch.no_grad()
def reconstruction_quality(vae: Any, data: Data, count: int = HELD_OUT, encoder: Any = None) -> dict[str, float]:
    """PSNR in dB (mean over images) and SSIM of the reconstructions of the posterior's mean, and the number of images.

    SSIM is omitted for images smaller than its window. `encoder` is the autoencoder that encodes; None: `vae`.
    """
    weight = next(vae.parameters())
    psnr, ssim, n = 0.0, 0.0, 0
    comparable = min(data.shape[1:]) >= WINDOW
    for x in blocks_of(data, count):
        z = (encoder or vae).encode(x.to(weight.device, weight.dtype)).latent_dist.mode()
        out = vae.decode(z).sample.float().cpu().clamp(-1, 1)
        psnr += len(x) * image_difference(out, x)["psnr"]
        ssim += float(structural_similarity(out, x).sum()) if comparable else 0.0
        n += len(x)
    return {"psnr": psnr / n, **({"ssim": ssim / n} if comparable else {}), "measured": n}


def spell_quality(quality: Mapping[str, Any]) -> str:
    """PSNR and SSIM as text."""
    ssim = f", SSIM {quality['ssim']:.3f}" if "ssim" in quality else ""
    return f"PSNR {quality['psnr']:.2f} dB{ssim}"


def held_out_images(data: str | Path | Data, source: Data, size: int | None) -> tuple[Data, str]:
    """The images of the split `test` or `val`, else the training images, and what they are, in words."""
    splittable = not isinstance(data, Data) and (Path(data).is_dir() or Path(data).suffix.lower() in (".zip", ".npz"))
    if splittable and not isinstance(data, Data):
        for split in ("test", "val"):
            try:
                other = open_data(data, split, size or source.shape[1:], source.shape[0], "none", report=False)
            except BadInput as error:
                if not any(words in str(error) for words in ("split", "no images", "no array of images")):
                    raise  # it is there, but cannot be read
                continue
            return other, f"{min(len(other), HELD_OUT):,} held-out images ({split})"
    return source, f"{min(len(source), HELD_OUT):,} of the training images (there is no split test or val)"


def save_autoencoder(vae: Any, out: Path, file: str, card: Mapping[str, Any], ranks: Ranks) -> None:
    """Write an autoencoder of diffusers and its card, from the main process."""
    if ranks.is_main_process:
        vae.cpu().save_pretrained(str(out))
        write_file(out / file, (json.dumps(card, indent=1) + "\n").encode())
    ranks.barrier()
