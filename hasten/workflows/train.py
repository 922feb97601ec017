"""Train a model on one's own images: the data, network, loss and training loop, and the saved model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import torch

from ..denoiser import Denoiser
from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..files import describe_contents, holds_lock, refuse_inside
from ..loading import load
from ..model.model import Model
from ..nets.unet import UNet
from ..performance.autotune import autotune, format_runtime, parse_runtime
from ..predictions import V
from ..schedules.continuous import VPCosine
from ..train.checkpoint import read_log, saved_run
from ..train.data import Batches, Data, open_data
from ..train.fit import Fit
from ..train.losses import DenoisingLoss
from ..train.player import TrainedModule
from ..utils.config import Config
from ..utils.random import preserve_rng_state

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class TrainConfig(Config):
    """How to train a model.

    Args:
        steps, minutes: the budget, whichever comes first; 30 minutes if neither is given.
        size, channels, label: how the data are read, see `open_data`.
        widths: channels of each resolution, finest first; None: by the side of the images.
        blocks: residual blocks a resolution. patch: side of the squares that the network takes as one pixel.
        batch_size: images a step. lr: peak learning rate of AdamW.
        label_drop: fraction of the labels that are dropped, so that the model can be guided, 0 to 1.
        flip: mirror images at random.
        precision: `fp32`, `bf16` (autocast), with `+high` (TF32 on GPUs), `+medium` or `+channels_last` as wanted;
            `auto`: what is faster on this device, or that of the run that is resumed.
        seed: of the weights, the order of the images and the noise.
        grad_accumulation: parts of a batch that are computed one after another, to need less memory.
        fsdp: shard the network among the processes of torchrun, where it is too large for one.
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
    lr: float = 1e-3
    label_drop: float = 0.1
    flip: bool = False
    precision: str = "auto"
    seed: int = 0
    grad_accumulation: int = 1
    fsdp: bool = False

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
    lr: float
    label_drop: float
    flip: bool
    precision: str
    seed: int
    grad_accumulation: int
    fsdp: bool


@holds_lock("out")
@preserve_rng_state()
def train_model(
    data: str | Path | Data,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    device: str | None = None,
    name: str | None = None,
    show: bool = True,
    **options: Unpack[TrainOptions],
) -> Model:
    """Train a U-Net with v-prediction on the cosine path `x_t = cos(pi t/2) x + sin(pi t/2) eps`, and save it.

    The network's averaged weights become the model. Labels are dropped at the rate `label_drop`, so that a model of
    classes can be guided. The same call resumes from the checkpoint in `out` where an earlier one was stopped. Under
    torchrun, each process takes its part of every batch, and the main one writes.

    Args:
        data: as `open_data` reads it.
        config: budget, network and optimiser; None: the defaults. options: fields of it.
        device: None: a GPU where there is one. name: of the model; None: of the folder. show: a progress bar on a
            terminal.

    Returns:
        The model, as it is saved in `out`.

    Raises:
        BadInput: for data or settings that cannot be used, where `out` lies inside the data, holds another model or
            the run of other data or settings, or is written by another process.
        HastenError: where the loss stops being finite.
        KeyboardInterrupt: at Ctrl-C, with a line that says what was saved.

    References:
        Salimans, Ho 2022, arXiv:2202.00512 (v-prediction); Ho, Salimans 2022, arXiv:2207.12598 (label dropout).
    """
    config = TrainConfig.of(config, options)
    steps, minutes, seed, batch_size, lr = config.steps, config.minutes, config.seed, config.batch_size, config.lr
    refuse_inside(out, data)
    source = (
        data
        if isinstance(data, Data)
        else open_data(data, size=config.size, channels=config.channels, label=config.label)
    )
    out = Path(out)
    if steps is None and minutes is None:
        minutes = 30.0
    ranks = Ranks.start(device)
    previous = ranks.on_main_process(lambda: saved_run(out / "checkpoint.pt"))
    torch.manual_seed(seed)
    net = build_network(source, config.widths, config.blocks, config.patch)
    dropped = (
        config.label_drop if source.labels is not None else 0.0
    )  # without it the network never sees the null label
    denoiser = Denoiser(net, VPCosine(offset=0.0), V())
    denoiser.null_label = net.classes if net.classes and dropped else None
    loss = DenoisingLoss(label_drop=dropped)
    precision = previous.get("precision") if config.precision == "auto" else None
    precision = precision or ranks.on_main_process(
        lambda: training_precision(denoiser, source, config.precision, batch_size, ranks.device)
    )
    fit = Fit(
        steps=steps,
        minutes=minutes,
        precision=precision,
        seed=seed,
        device=device,
        accumulate=config.grad_accumulation,
        shard=config.fsdp,
    )
    finished = bool(previous) and fit.progress(previous["step"], previous["seconds"]) >= 1
    ranks.on_main_process(lambda: check_output_folder(out, finished))
    trained = TrainedModule("model", denoiser, lambda batch: loss(denoiser, batch), lr=lr)
    settings = {"network": net.config, "label_drop": dropped}
    averaged = fit([trained], Batches(source, batch_size, seed=seed, flip=config.flip), out, show, settings)["model"]
    if finished and (saved := ranks.on_main_process(lambda: saved_model_at(out, previous["step"]))):
        return load(saved)  # with what was found for it since, such as plans
    assert isinstance(averaged, Denoiser)
    card: dict[str, Any] = {
        "data": source.source,
        "images": len(source),
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "precision": precision,
        "label_drop": dropped,
        "flip": config.flip,
        "last": last_log_entry(out / "log.jsonl"),
    }
    model = Model(
        denoiser=averaged.eval().requires_grad_(False).cpu(),
        name=name or out.resolve().name,
        shape=source.shape,
        classes=source.classes,
        guidance_scale=1.5 if source.classes and dropped else 1.0,
        card=card,
    )
    if ranks.is_main_process:
        model.save(out)
    ranks.barrier()
    return model


def build_network(data: Data, widths: Sequence[int] | None, blocks: int, patch: int | None) -> UNet:
    """A U-Net for these images. By default it has one more resolution for every doubling of the side beyond 32."""
    channels, height, width = data.shape
    side = max(height, width)
    if widths is None:
        widths = (64, 128) if side <= 32 else (64, 128, 192) if side <= 64 else (64, 128, 192, 256)
    if patch is None:
        patch = 2 if side >= 24 else 1
    try:
        net = UNet(channels, widths=widths, blocks=blocks, patch=patch, classes=len(data.classes or ()))
    except ValueError as e:
        raise BadInput(str(e)) from e
    if height % net.multiple or width % net.multiple:
        near = max(round(side / net.multiple), 1) * net.multiple
        raise BadInput(
            f"images of {height}x{width} do not fit a network of patch {patch} and {len(widths)} levels, "
            f"which needs sides that are multiples of {net.multiple}: set --size {near}, or other widths and patch"
        )
    return net


def training_precision(denoiser: Denoiser, data: Data, runtime: str, batch_size: int, device: torch.device) -> str:
    """What was asked for, or `fp32` or `bf16`, as a timing of the forward pass finds."""
    if runtime != "auto":
        return format_runtime(parse_runtime(runtime))
    x = torch.randn(min(batch_size, 64), *data.shape, device=device)
    return format_runtime(autotune(denoiser.to(device), x, f"train {denoiser.net}")).split("+")[0]


def last_log_entry(log: Path) -> dict[str, Any]:
    """The last entry of a training log: step, seconds, loss; {} without one."""
    entries = read_log(log)
    return entries[-1] if entries else {}


def check_output_folder(out: Path, finished: bool) -> None:
    """Raise BadInput if training would overwrite what `out` holds. finished: the run in it is complete."""
    content = describe_contents(out)
    if content is not None and not (out / "checkpoint.pt").is_file():
        raise BadInput(f"{out} holds {content} already: choose another folder, or remove it")
    card = saved_card(out)
    changed = [key for key in ("tuned", "quantized", "distilled", "exported") if key in card]
    if changed and not finished:
        raise BadInput(f"{out} holds a model that was {changed[0]} since: train in another folder, or remove it")
    if content == "a pipeline of diffusers":
        raise BadInput(f"{out} holds {content} already: choose another folder, or remove it")


def saved_card(out: Path) -> dict[str, Any]:
    """The card of the model in a folder; {} without a model."""
    try:
        card = json.loads((out / "model.json").read_text(encoding="utf-8"))["card"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return card if isinstance(card, dict) else {}


def saved_model_at(out: Path, step: int) -> str | None:
    """The folder if its model is that of step `step`, else None."""
    last = saved_card(out).get("last")
    return str(out) if isinstance(last, dict) and last.get("step") == step else None
