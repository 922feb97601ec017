"""`hasten train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import BadInput
from ._common import command_for, explicit_options, processes
from ._processes import on_all_processes
from ._train_kinds import task_options, train_kind
from ._train_tasks import SOUND_TASKS, train_sound
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
    base: str | None = None,
    init: str | None = None,
    from_: str | None = None,
    structure: str | None = None,
    caption: str | None = None,
    cache: Path | None = None,
    cache_dtype: str | None = None,
    widths: str | None = None,
    blocks: int | None = None,
    patch: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    optimizer: str | None = None,
    label_drop: float | None = None,
    flip: bool = False,
    grad_accumulation: int | None = None,
    gradient_checkpointing: bool = False,
    fsdp: bool = False,
    lora: int | None = None,
    lora_targets: str | None = None,
    process: str | None = None,
    source: Path | None = None,
    degrade: str | None = None,
    task: str | None = None,
    crop: int | None = None,
    preset: str | None = None,
    text: str | None = None,
    seed: int | None = None,
    precision: str | None = None,
    kind: str = "model",
    factor: int | None = None,
    latent_channels: int | None = None,
    perceptual: str | None = None,
    gan_weight: float | None = None,
    device: str = "auto",
    json: bool = False,
) -> dict[str, Any]:
    """Train a diffusion model on a folder of images, or a text-to-image pipeline on images with captions, and save it.

    Sub-folders are classes, or a file beside the images gives them: labels.csv, metadata.csv, metadata.jsonl or
    dataset.json. What is read, and what is ignored, is printed. Ctrl-C saves a checkpoint, from which the same command
    resumes, also on another number of processes: under torchrun, each takes its part of every batch. Steps and minutes
    may be more than before; other images or settings are refused.

    With --base PIPELINE the network of a text-to-image pipeline is trained on captions: a column text, caption or
    prompt of metadata.jsonl or metadata.csv, or a .txt beside each image. Latents and text embeddings are computed
    once.

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
        base: A text-to-image pipeline (a folder, a hub id, or a bundled name) whose network is trained on the captions.
            For kind decoder: the autoencoder's folder, or that of a pipeline that has one.
        init: With --base, base to continue from the network's weights, or random to train it from scratch. Default:
            base. For kind autoencoder: the one to continue from, its folder or that of a pipeline.
        from_: A model to fine-tune on the data: a bundled name, a folder or a hub id. Its network, schedule and
            prediction are kept; the data must have its shape and classes.
        structure: Weight of the structure term, relative to the loss, such as 0.1: the relations of a batch's samples
            are trained too (SADM). Or its options, such as weight=0.1,times=own (see docs/structure.md). Default: 0.
        caption: The column that holds the captions; txt for the files beside the images, none to read none.
        cache: The folder of the latents and text embeddings of --base. Default: encoded in the folder of the run.
        cache_dtype: Their numbers, fp16 or fp32. Default: fp16.
        widths: Channels of each resolution, comma-separated, such as 64,128. Default: by the size of the images.
        blocks: Residual blocks a resolution. Default: 1.
        patch: Side of the squares that the network takes as one pixel.
        batch_size: Images a step. Default: 64.
        lr: Peak learning rate. Default: 1e-3; with --from 1e-4; with --base 1e-5, or 1e-4 from scratch and for a LoRA.
        optimizer: adamw, muon, or to need less memory on CUDA, with bitsandbytes: adamw8bit, paged-adamw8bit. Default:
            adamw.
        label_drop: Fraction of the labels or captions that are dropped, so that the model can be guided. Default: 0.1.
        flip: Mirror images at random; with --crop also turn them by 90 degrees.
        grad_accumulation: Parts of a batch that are computed one after another, to need less memory.
        gradient_checkpointing: Recompute activations in the backward pass, to need less memory (networks of diffusers).
        fsdp: Shard the network among the processes of torchrun, where it is too large for one.
        lora: With --base, rank of a LoRA that is trained in place of all weights, such as 16. It is written as a file
            of its own, which diffusers loads, beside the pipeline with the LoRA merged.
        lora_targets: The layers that it adapts: attention, conv, all, or names of modules, comma-separated. Default:
            attention where the network has such layers, else all.
        process: The forward process and its options, such as i2sb:beta_max=1 (see docs/processes.md). Default: ordinary
            diffusion.
        source: For processes on pairs: the folder of the source images, with the file names of the data.
        degrade: For processes on pairs: makes the sources from the data, by downscale:factor=4, blur:std=2,
            jpeg:quality=10, mask:fraction=0.5 or grey. For super-resolution, what the small images are beside reduced,
            such as low_resolution:factor=4,blur=2,noise=10,jpeg=40.
        task: super-resolution: the process super_resolution with --factor, on random crops (see
            docs/super-resolution.md). vocoder: a network that makes sound from mel spectrograms, on recordings
            (metadata.csv beside wavs/, see docs/speech.md). speech: an acoustic model, which reads text aloud, on
            recordings with their text. Default: models that draw images.
        preset: For the task speech: small, for CPUs, paper (ProDiff's 15 million weights in the denoiser) or tiny.
            Default: small.
        text: For the task speech: phonemes, of English, or characters, of languages in Latin letters. Default:
            phonemes.
        crop: Train on random crops of this side, of images of any sizes. Default: for super-resolution 128.
        seed: Of the weights, the order of the images and the noise. Default: 0.
        precision: fp32, bf16 (autocast), or auto, which takes what is faster on this device. With +high (TF32 on GPUs),
            +medium or +channels_last, such as fp32+high, also the precision of matrix products and the memory layout.
        kind: model, a diffusion model; autoencoder, of images for latent diffusion; decoder, a light one for the
            latents of --base. An autoencoder has the options minutes, steps, size, channels, widths, blocks,
            batch_size, lr, flip, grad_accumulation, seed, precision and those below, and more in --config
            (AutoencoderConfig, DecoderConfig).
        factor: For super-resolution: how many times larger the images become, 2, 4, 8, ...; default: 4. For kind
            autoencoder: how often the image's side is the latent's, a power of two. Default: 4, from 128
            pixels 8.
        latent_channels: For kind autoencoder. Default: 8.
        perceptual: For an autoencoder or decoder: file or folder with the weights of LPIPS or its shift-tolerant form.
        gan_weight: For an autoencoder or decoder: weight of a patch discriminator. Default: 0, none. For a vocoder:
            weight of its discriminators. Default: 0.5.
        device: auto, cpu, cuda, cuda:1, mps or xpu.
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
        "factor": factor,
        "latent_channels": latent_channels,
        "perceptual": perceptual,
        "gan_weight": gan_weight,
    }  # fmt: skip
    spoken = {"preset": preset, "text": text}
    options = explicit_options(
        steps=steps, minutes=minutes, size=size, channels=channels, label=label, widths=channel_list, blocks=blocks,
        patch=patch, batch_size=batch_size, lr=lr, optimizer=optimizer, label_drop=label_drop, flip=flip or None,
        precision=precision, seed=seed, grad_accumulation=grad_accumulation, fsdp=fsdp or None, base=base, init=init,
        caption=caption, cache=None if cache is None else str(cache), cache_dtype=cache_dtype,
        gradient_checkpointing=gradient_checkpointing or None, lora=lora, lora_targets=lora_targets, process=process,
        source=None if source is None else str(source), degrade=degrade, crop=crop,
        init_from=from_, structure=structure,
    )  # fmt: skip
    if task in SOUND_TASKS:
        if kind != "model":
            raise BadInput(f"--task {task} has no kinds: leave out --kind {kind}")
        return train_sound(task, data, out, config, {**options, **parts, **spoken}, device, json)
    if stray := next((name for name, value in spoken.items() if value is not None), None):
        raise BadInput(f"--{stray} is for --task speech")
    if task is not None:
        options, parts["factor"] = task_options(task, factor, options), None
    if kind != "model":
        return train_kind(kind, data, out, config, {**options, **parts}, device, json)
    if stray := next((name for name, value in parts.items() if value is not None), None):
        or_task = ", or --task super-resolution" if stray == "factor" else ""
        raise BadInput(f"--{stray.replace('_', '-')} is for --kind autoencoder or decoder{or_task}")
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
    text = f"{out}: {last.get('step')} steps on {model.card['images']} images; try {command_for(model, out)}"
    print_result(result, text, json)
    return result
