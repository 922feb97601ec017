"""Train a model on one's own images: the data, network, loss and training loop, and the saved model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..distributed.ranks import Ranks
from ..errors import BadInput, check_choice
from ..files import holds_lock, refuse_inside
from ..loading import load
from ..model.model import Model
from ..nets.source_unet import SourceUNet
from ..nets.unet import UNet
from ..performance.autotune import autotune, format_runtime, parse_runtime
from ..storage.provenance import model_hash
from ..train.checkpoint import saved_run
from ..train.crops import crops, open_crops
from ..train.data import Batches, Data, open_data
from ..train.fit import Fit
from ..train.messages import print_once
from ..train.trained_module import OPTIMISERS, check_eight_bit
from ..train_processes import TrainSettings
from ..utils.random import preserve_rng_state
from .fine_tune import FineTuned, open_origin, origin_data
from .train_config import TrainConfig
from .train_pipeline import train_pipeline
from .train_process import process_recipe, training_structure, with_sources
from .training_run import check_output_folder, last_log_entry, saved_model_at

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .train_config import TrainOptions

__all__ = ["TrainConfig", "train_model"]

PAIR_OPTIONS = ("process", "source", "degrade", "crop")


@holds_lock("out")
@preserve_rng_state()
def train_model(
    data: str | Path | Data | Tensor,
    out: str | Path,
    config: TrainConfig | None = None,
    *,
    device: str | None = None,
    name: str | None = None,
    show: bool = True,
    base: Any = None,
    **options: Unpack[TrainOptions],
) -> Model:
    """Train a U-Net with v-prediction on the cosine path `x_t = cos(pi t/2) x + sin(pi t/2) eps`, and save it.

    With `init_from`, a saved model is trained further, with its own network, schedule and prediction. With `base`, the
    network of a text-to-image pipeline is trained instead, on images with captions (`train_pipeline`).

    The EMA of the weights becomes the model. The same call resumes from the checkpoint in `out` of a stopped run.
    Under torchrun each process takes an equal part of every batch, and the main process writes (`train.fit.Fit`).

    Args:
        data: the data, or the path of a folder, zip or array (`open_data`); with `init_from` also samples (n, *S).
        out: the folder of the model, its checkpoint and its log.
        config: budget, network and optimiser. Default: `TrainConfig()`.
        device: `cpu`, `cuda`, ... Default: a GPU if there is one.
        name: of the model. Default: that of the folder.
        show: show a progress bar, if stderr is a terminal.
        base: a text-to-image model or pipeline, its folder or hub id; in place of `config.base`.
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
    refuse_inside(out, data)
    base = config.base if base is None else base
    if config.cache is not None:
        refuse_inside(config.cache, data, "cache")
    if isinstance(data, Tensor) and (base is not None or config.init_from is None):
        raise BadInput("a tensor of samples is for init_from: give a path, or hasten.train.Data.of(images)")
    if base is not None:
        assert not isinstance(data, Tensor)
        if stray := next((name for name in (*PAIR_OPTIONS, "init_from") if getattr(config, name) is not None), None):
            raise BadInput(f"{stray} is for models of pixels: leave it out, or base")
        return train_pipeline(data, Path(out), config, base, device=device, name=name, show=show)
    others: dict[str, Any] = dict.fromkeys(("cache", "lora", "lora_targets"))
    for key, unset in {"init": "base", "gradient_checkpointing": False, **others}.items():
        if getattr(config, key) != unset:
            raise BadInput(f"{key} is for a network of diffusers: set base to the pipeline to train")
    steps, minutes, seed, batch_size = config.steps, config.minutes, config.seed, config.batch_size
    ranks = Ranks.start(device)
    origin = None if config.init_from is None else open_origin(config, ranks)
    lr = (1e-3 if origin is None else 1e-4) if config.lr is None else config.lr
    if origin is None:
        assert not isinstance(data, Tensor)
        source = opened(data, config)
    else:
        source = origin_data(data, origin, config)
    if source.captions is not None:
        print_once(
            f"{source.source or 'the data'}: the captions are not used, since a model of pixels has no text encoder: "
            "--base PIPELINE (base=) trains the network of a text-to-image pipeline on them"
        )
        source = replace(source, captions=None)
    if source.conditions is not None:
        raise BadInput(
            f"{source.source or 'the data'}: a model of pixels reads labels only, and the data has the conditions "
            f"{', '.join(source.conditions([0]))}: drop them with replace(data, conditions=None), or set base= to a "
            "pipeline that reads them"
        )
    recipe = process_recipe(config) if origin is None else FineTuned(origin)
    if config.source is None and config.degrade is None and hasattr(recipe, "degradation"):
        config = replace(config, degrade=recipe.degradation)
    source = with_sources(source, config, recipe)
    out = Path(out)
    if steps is None and minutes is None:
        minutes = 30.0
    check_choice("optimizer", config.optimizer, OPTIMISERS)
    check_eight_bit(config.optimizer, ranks.device)
    previous = ranks.on_main_process(lambda: saved_run(out / "checkpoint.pt"))
    torch.manual_seed(seed)
    dropped = config.label_drop if source.labels is not None else 0.0
    make_unet = functools.partial(unet_for, source, config.widths, config.blocks, config.patch)
    denoiser = recipe.denoiser(source, make_unet)
    net: Any = denoiser.net
    if origin is None:  # without label dropout the null label is not trained
        denoiser.null_label = net.classes if getattr(net, "classes", 0) and dropped else None
    elif denoiser.null_label is None:
        dropped = 0.0
    precision = previous.get("precision") if config.precision == "auto" else None
    precision = precision or ranks.on_main_process(
        lambda: training_precision(denoiser, source, config.precision, batch_size, ranks.device, origin)
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
    structure = training_structure(config, origin is not None)
    chosen = TrainSettings(lr, config.optimizer, dropped, batch_size, ranks.device, seed, structure, ranks)
    recipe.check_structure(denoiser, chosen)
    trained = recipe.modules(denoiser, source, chosen)
    settings: dict[str, Any] = {"label_drop": dropped}
    if origin is None:
        settings["network"] = getattr(net, "config", {})
    else:
        settings["from"] = ranks.on_main_process(lambda: model_hash(origin))
    made = {name: getattr(config, name) for name in PAIR_OPTIONS}
    made |= {"structure": None if structure is None else asdict(structure)}
    settings |= {name: value for name, value in made.items() if value is not None}
    batches = Batches(source, batch_size, seed=seed, flip=config.flip and not config.crop)
    averages = fit(trained, batches, out, show, settings)
    if finished and (saved := ranks.on_main_process(lambda: saved_model_at(out, previous["step"]))):
        return load(saved)  # with what was added to it since, such as plans
    averaged = recipe.averaged_denoiser(averages)
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
        **{name: value for name, value in made.items() if value is not None},
    }
    model = Model(
        denoiser=averaged.eval().requires_grad_(False).cpu(),
        name=name or out.resolve().name,
        shape=source.shape,
        classes=source.classes,
        guidance_scale=1.5 if source.classes and dropped else 1.0,
        card=card,
    )
    model = recipe.finish(averages, model)
    if ranks.is_main_process:
        model.save(out)
    ranks.barrier()
    return model


def opened(data: str | Path | Data, config: TrainConfig) -> Data:
    """The data of a config, or crops of it.

    Raises:
        BadInput: for options that crops do not have.
    """
    if config.crop is None:
        if isinstance(data, Data):
            return data
        return open_data(data, size=config.size, channels=config.channels, label=config.label, caption=config.caption)
    if given := next((name for name in ("size", "label", "caption") if getattr(config, name) is not None), None):
        raise BadInput(f"{given} is for whole images: leave it out, or crop")
    if isinstance(data, Data):
        return crops(data, config.crop, config.flip)
    return open_crops(data, config.crop, channels=config.channels, flip=config.flip)


def unet_for(
    data: Data, widths: Sequence[int] | None, blocks: int, patch: int | None, **options: Any
) -> UNet | SourceUNet:
    """A U-Net for these images. By default it has one more resolution for every doubling of the side beyond 32.

    options: further ones of `UNet`; with `source_channels` among them, a `SourceUNet`.
    """
    channels, height, width = data.shape
    side = max(height, width)
    if widths is None:
        widths = (64, 128) if side <= 32 else (64, 128, 192) if side <= 64 else (64, 128, 192, 256)
    if patch is None:
        patch = 2 if side >= 24 else 1
    try:
        common = {"widths": widths, "blocks": blocks, "patch": patch, "classes": len(data.classes or ())}
        kind: Any = SourceUNet if "source_channels" in options else UNet
        net: UNet | SourceUNet = kind(channels, **{**common, **options})
    except ValueError as e:
        raise BadInput(str(e)) from e
    if height % net.multiple or width % net.multiple:
        near = max(round(side / net.multiple), 1) * net.multiple
        raise BadInput(
            f"images of {height}x{width} do not fit a network of patch {patch} and {len(widths)} levels, "
            f"which needs sides that are multiples of {net.multiple}: set --size {near}, or other widths and patch"
        )
    return net


def training_precision(
    denoiser: Denoiser,
    data: Data,
    precision: str,
    batch_size: int,
    device: torch.device,
    origin: Model | None = None,
) -> str:
    """The precision in its normal form; for `auto` the faster of `fp32` and `bf16`, by timing the forward pass."""
    if precision != "auto":
        return format_runtime(parse_runtime(precision))
    x = torch.randn(min(batch_size, 64), *data.shape, device=device)
    small = x[:, :1, :: denoiser.source_factor, :: denoiser.source_factor]
    cond: dict[str, Any] = (
        {"source": small.expand(-1, denoiser.source_channels, -1, -1)} if denoiser.source_channels else {}
    )
    if origin is not None:  # some networks cannot do without a label
        cond = {name: value.to(device) for name, value in origin.cond(len(x)).items()}
    return format_runtime(autotune(denoiser.to(device), x, f"train {denoiser.net}", **cond)).split("+")[0]
