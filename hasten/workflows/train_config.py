"""`TrainConfig`: the budget, network, data and optimiser of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypedDict

from ..utils.config import Config


@dataclass(frozen=True)
class TrainConfig(Config):
    """The budget, network and optimiser of a training run (`train_model`).

    Args:
        steps: budget of steps.
        minutes: budget of training time; whichever budget is used up first ends the run. Default: 30 without `steps`.
        size: side in pixels that images are resized to (`open_data`).
        channels: 1 or 3 (`open_data`).
        label: the column or array of labels (`open_data`).
        base: a text-to-image pipeline, its folder or hub id: its network is trained on the captions of the images.
        init: `base`, start from the network's weights, or `random`, train it from scratch.
        init_from: a model to begin from (fine-tuning), its folder, hub id or bundled name: its network, schedule and
            prediction are kept, and the data must have its shape and classes.
        structure: weight of the structure term, relative to the loss, such as 0.1, or its options as text, such as
            `"weight=0.1,times=own"` (`train.sadm.Sadm`).
        caption: the column of captions (`open_data`).
        cache: the folder of the latents and text embeddings of `base`. Default: `encoded` in the folder of the run.
        cache_dtype: their numbers, `fp16` or `fp32`.
        widths: channels at each resolution, finest first. Default: by the side of the images.
        blocks: residual blocks at each resolution.
        patch: side of the patches of pixels that are folded into channels. Default: 2 from a side of 24, else 1.
        batch_size: images in a batch, over all processes.
        lr: AdamW's peak learning rate. Default: 1e-3; with `init_from` 1e-4; with `base` 1e-5, or 1e-4 from
            scratch and for a LoRA.
        optimizer: `adamw`; `adamw8bit` or `paged-adamw8bit`, of bitsandbytes on CUDA, to need less memory; `muon`.
        label_drop: probability that a label or caption is dropped, for classifier-free guidance; in [0, 1].
        flip: mirror images horizontally with probability 1/2; of crops, any of the eight symmetries of the square.
        precision: `fp32` or `bf16` (autocast), with `+high` (TF32 on GPUs), `+medium` or `+channels_last`; `auto`: that
            of the run to resume, or the faster one on this device.
        seed: of the weights, the order of the images and the noise.
        grad_accumulation: micro-batches that a process splits its batch into, to need less memory.
        fsdp: shard the network among the processes, if it is too large for one device.
        gradient_checkpointing: recompute activations in the backward pass, to need less memory; for networks of
            diffusers that have it.
        lora: rank of a LoRA of `base` that is trained in place of all weights, and saved in a file of its own beside
            the pipeline, which has it merged. None: all weights.
        lora_targets: layers of the LoRA, see `hasten.nets.lora.target_layers`.
        process: the forward process, as `pick` reads it from `hasten.train_processes`, such as `"i2sb:beta_max=1"`.
            Default: ordinary diffusion, `x_t = alpha x + sigma eps`.
        source: the folder of the sources of pairs, with the file names of the data.
        degrade: makes the sources from the data instead: `"downscale:factor=4"`, `"blur:std=2"`, `"jpeg:quality=10"`,
            `"mask:fraction=0.5"` or `"grey"`; for `super_resolution`,
            `"low_resolution:factor=4,blur=2,noise=10,jpeg=40"`.
        crop: side of random crops of the images, which may then be of any sizes; for models of pixels without classes.
    """

    steps: int | None = None
    minutes: float | None = None
    size: int | None = None
    channels: int | None = None
    label: str | None = None
    widths: Sequence[int] | None = None
    blocks: int = 1
    patch: int | None = None
    batch_size: int = 64
    lr: float | None = None
    optimizer: str = "adamw"
    label_drop: float = 0.1
    flip: bool = False
    precision: str = "auto"
    seed: int = 0
    grad_accumulation: int = 1
    fsdp: bool = False
    base: str | None = None
    init: str = "base"
    init_from: str | None = None
    structure: float | str | None = None
    caption: str | None = None
    cache: str | None = None
    cache_dtype: str = "fp16"
    gradient_checkpointing: bool = False
    lora: int | None = None
    lora_targets: str | None = None
    process: str | None = None
    source: str | None = None
    degrade: str | None = None
    crop: int | None = None

    renamed: ClassVar[Mapping[str, str]] = {
        "runtime": "precision",
        "accumulate": "grad_accumulation",
        "shard": "fsdp",
    }


class TrainOptions(TypedDict, total=False):
    """The fields of `TrainConfig` as keyword arguments."""

    steps: int | None
    minutes: float | None
    size: int | None
    channels: int | None
    label: str | None
    widths: Sequence[int] | None
    blocks: int
    patch: int | None
    batch_size: int
    lr: float | None
    optimizer: str
    label_drop: float
    flip: bool
    precision: str
    seed: int
    grad_accumulation: int
    fsdp: bool
    init: str
    init_from: str | None
    structure: float | str | None
    caption: str | None
    cache: str | None
    cache_dtype: str
    gradient_checkpointing: bool
    lora: int | None
    lora_targets: str | None
    process: str | None
    source: str | None
    degrade: str | None
    crop: int | None
