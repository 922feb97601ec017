"""`hasten train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ._common import explicit_options, processes
from ._processes import on_all_processes
from ._train_kinds import train_kind
from .terminal import print_result


@on_all_processes
def train(
    data: Path,
    *,
    out: Path,
    config: Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    label: str | None = None,
    widths: str | None = None,
    blocks: int | None = None,
    patch: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    label_drop: float | None = None,
    flip: bool = False,
    grad_accumulation: int | None = None,
    fsdp: bool = False,
    seed: int | None = None,
    precision: str | None = None,
    kind: str = "model",
    base: str | None = None,
    init: str | None = None,
    factor: int | None = None,
    latent_channels: int | None = None,
    perceptual: str | None = None,
    gan_weight: float | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Train a diffusion model on a folder of images and save it.

    Sub-folders are classes, or a file beside the images gives them: labels.csv, metadata.csv, metadata.jsonl or
    dataset.json. What is read, and what is ignored, is printed. Ctrl-C saves a checkpoint, from which the same command
    resumes, also on another number of processes: under torchrun, each takes its part of every batch. Steps and minutes
    may be more than before; other images or settings are refused.

    Args:
        data: A folder or zip of images, a folder of IDX files, a .npy or a .npz.
        out: The folder of the run, in which the model is saved.
        config: A TrainConfig file (TOML or JSON); the options below override its fields.
        minutes: Training time. Without steps, 30.
        steps: Training steps; with minutes, whichever comes first.
        size: Crop and resize the images to this side.
        channels: 1 or 3. Default: what the images have.
        label: The column of the file of labels (or the array of an .npz) that holds the class; folders for the class
            folders, none to train without classes.
        widths: Channels of each resolution, comma-separated, such as 64,128. Default: by the size of the images.
        blocks: Residual blocks a resolution. Default: 1.
        patch: Side of the squares that the network takes as one pixel.
        batch_size: Images a step. Default: 64.
        lr: Peak learning rate. Default: 1e-3.
        label_drop: Fraction of the labels that are dropped, so that the model can be guided. Default: 0.1.
        flip: Mirror images at random.
        grad_accumulation: Parts of a batch that are computed one after another, to need less memory.
        fsdp: Shard the network among the processes of torchrun, where it is too large for one.
        seed: Of the weights, the order of the images and the noise. Default: 0.
        precision: fp32, bf16 (autocast), or auto, which takes what is faster on this device. With +high (TF32 on GPUs),
            +medium or +channels_last, such as fp32+high, also the precision of matrix products and the memory layout.
        kind: model, a diffusion model; autoencoder, of images for latent diffusion; decoder, a light one for the
            latents of --base. An autoencoder has the options minutes, steps, size, channels, widths, blocks,
            batch_size, lr, flip, grad_accumulation, seed, precision and those below, and more in --config
            (AutoencoderConfig, DecoderConfig).
        base: For kind decoder: the autoencoder's folder, or that of a diffusers pipeline that has one.
        init: For kind autoencoder: the one to continue from, its folder or that of a pipeline.
        factor: For kind autoencoder: how often the image's side is the latent's, a power of two. Default: 4, from 128
            pixels 8.
        latent_channels: For kind autoencoder. Default: 8.
        perceptual: For an autoencoder or decoder: file or folder with the weights of LPIPS or its shift-tolerant form.
        gan_weight: For an autoencoder or decoder: weight of a patch discriminator. Default: 0, none.
        device: auto, cpu, cuda or cuda:1.
        json: Print the result as JSON.

    Returns:
        The folder, the data, the number of steps and images.
    """
    from ..workflows.train import TrainConfig, train_model

    try:
        channel_list = [int(w) for w in widths.split(",")] if widths else None
    except ValueError as e:
        raise BadInput(f"widths are whole numbers, comma-separated, such as 64,128, got {widths!r}") from e
    parts = {
        "base": base, "init": init, "factor": factor, "latent_channels": latent_channels, "perceptual": perceptual,
        "gan_weight": gan_weight,
    }  # fmt: skip
    options = explicit_options(
        steps=steps, minutes=minutes, size=size, channels=channels, label=label, widths=channel_list, blocks=blocks,
        patch=patch, batch_size=batch_size, lr=lr, label_drop=label_drop, flip=flip or None, precision=precision,
        seed=seed, grad_accumulation=grad_accumulation, fsdp=fsdp or None,
    )  # fmt: skip
    if kind != "model":
        return train_kind(kind, data, out, config, {**options, **parts}, device, json)
    if stray := next((name for name, value in parts.items() if value is not None), None):
        raise BadInput(f"--{stray.replace('_', '-')} is for --kind autoencoder or decoder")
    request = (TrainConfig() if config is None else TrainConfig.load(config, "train")).replace(**options)
    model = train_model(data, out, request, device=str(processes(device).device))
    result = {
        "folder": str(out),
        "shape": list(model.shape),
        "classes": model.classes,
        "parameters": sum(p.numel() for p in model.denoiser.parameters()),
        **model.card,
    }
    last = model.card["last"]
    print_result(
        result, f"{out}: {last.get('step')} steps on {model.card['images']} images; try hasten sample {out}", json
    )
    return result
