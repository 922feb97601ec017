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
from ..train.trained_module import TrainedModule
from ..utils.config import Config
from ..utils.random import preserve_rng_state

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class TrainConfig(Config):
    """The budget, network and optimiser of a training run (`train_model`).

    Args:
        steps: budget of steps.
        minutes: budget of training time; whichever budget is used up first ends the run. Default: 30 without `steps`.
        size: side in pixels that images are resized to (`open_data`).
        channels: 1 or 3 (`open_data`).
        label: the column or array of labels (`open_data`).
        widths: channels at each resolution, finest first. Default: by the side of the images.
        blocks: residual blocks at each resolution.
        patch: side of the patches of pixels that are folded into channels. Default: 2 from a side of 24, else 1.
        batch_size: images in a batch, over all processes.
        lr: AdamW's peak learning rate.
        label_drop: probability that a label is dropped, for classifier-free guidance; in [0, 1].
        flip: mirror images horizontally with probability 1/2.
        precision: `fp32` or `bf16` (autocast), with `+high` (TF32 on GPUs), `+medium` or `+channels_last`; `auto`: that
            of the run to resume, or the faster one on this device.
        seed: of the weights, the order of the images and the noise.
        grad_accumulation: micro-batches that a process splits its batch into, to need less memory.
        fsdp: shard the network among the processes, if it is too large for one device.
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

    The EMA of the weights becomes the model. The same call resumes from the checkpoint in `out` of a stopped run.
    Under torchrun each process takes an equal part of every batch, and the main process writes (`train.fit.Fit`).

    Args:
        data: the data, or the path of a folder, zip or array (`open_data`).
        out: the folder of the model, its checkpoint and its log.
        config: budget, network and optimiser. Default: `TrainConfig()`.
        device: `cpu`, `cuda`, ... Default: a GPU if there is one.
        name: of the model. Default: that of the folder.
        show: show a progress bar, if stderr is a terminal.
        options: fields of `TrainConfig`.

    Returns:
        The model as it is saved in `out`, on the CPU.

    Raises:
        BadInput: for data or settings that cannot be used; if `out` is inside the data, holds another model or a run of
            other data or settings, or is written to by another process.
        HastenError: if the loss is not finite.
        KeyboardInterrupt: at Ctrl-C, after a checkpoint is written.

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
    net = unet_for(source, config.widths, config.blocks, config.patch)
    # without label dropout the null label is not trained
    dropped = config.label_drop if source.labels is not None else 0.0
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
        return load(saved)  # with what was added to it since, such as plans
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


def unet_for(data: Data, widths: Sequence[int] | None, blocks: int, patch: int | None) -> UNet:
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


def training_precision(denoiser: Denoiser, data: Data, precision: str, batch_size: int, device: torch.device) -> str:
    """The precision in its normal form; for `auto` the faster of `fp32` and `bf16`, by timing the forward pass."""
    if precision != "auto":
        return format_runtime(parse_runtime(precision))
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
