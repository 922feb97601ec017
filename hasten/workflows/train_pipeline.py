"""Train the network of a text-to-image pipeline on captioned images, and save it as a pipeline again."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.diffusers.library import network_of
from ..denoiser import Denoiser
from ..distillers._memory import checkpoint_gradients, to_float32
from ..distributed.ranks import Ranks
from ..errors import BadInput, check_choice
from ..loading import load
from ..model.lora import lora_file
from ..model.model import Model
from ..nets.lora import add_lora, fold_lora, lora_factors
from ..nets.prequantized import quantized_by
from ..nets.quantized import layers
from ..performance.autotune import autotune, format_runtime, parse_runtime
from ..storage.checks import check_trainable
from ..storage.lora_files import FILE as LORA_FILE
from ..storage.lora_files import write_lora
from ..storage.model_folder import check_savable
from ..storage.provenance import model_hash
from ..train.checkpoint import saved_run
from ..train.data import Batches, Data, open_data
from ..train.encoded import check_encodable, encode_captioned, image_size
from ..train.fit import Fit
from ..train.losses import DenoisingLoss
from ..train.sadm import with_structure
from ..train.trained_module import OPTIMISERS, TrainedModule, check_eight_bit
from .lora import check_lora
from .train_config import TrainConfig
from .train_process import training_structure
from .training_run import check_output_folder, last_log_entry, remove_earlier_model, saved_model_at

__all__ = ["train_pipeline"]

INITS = ("base", "random")
LR = {"base": 1e-5, "random": 1e-4, "lora": 1e-4}
KEPT = ("pipeline", "network", "scheduler", "parameters")  # of the card of the base
# Fields of `TrainConfig` that describe a new network of pixels.
NEW_NETWORK = ("channels", "label", "widths", "blocks", "patch")


def train_pipeline(
    data: str | Path | Data,
    out: Path,
    config: TrainConfig,
    base: Any,
    *,
    device: str | None = None,
    name: str | None = None,
    show: bool = True,
) -> Model:
    """Train the network of a text-to-image pipeline on captioned images with its own schedule and prediction.

    The latents of the images and the embeddings of their captions are computed once and kept on disk
    (`train.encoded.encode_captioned`); autoencoder and text encoders do not change. The loss is the unweighted squared
    error of what the network predicts (noise, v, flow), at times uniform on the schedule. The EMA of the weights
    becomes the network of the saved pipeline, which diffusers opens too. The same call resumes a stopped run.

    Args:
        data: images with captions, or their path (`open_data`), at the pipeline's own size.
        out: the folder of the pipeline, the checkpoint and the log.
        config: budget, optimiser and data; fields for a new network of pixels are refused.
        base: a model, a pipeline of diffusers, its folder or hub id; what is passed is left unchanged.
        device: Default: a GPU if there is one.
        name: of the model. Default: that of the folder.
        show: show a progress bar, if stderr is a terminal.

    Returns:
        The model as it is saved in `out`, on the CPU.

    Raises:
        BadInput: for a base that takes no prompts or cannot be trained, and for data without captions.

    References:
        Rombach et al. 2022, arXiv:2112.10752 (latents); Ho, Salimans 2022, arXiv:2207.12598 (caption dropout).
    """
    check_choice("init", config.init, INITS)
    for key in NEW_NETWORK:
        if getattr(config, key) != getattr(TrainConfig(), key):
            raise BadInput(f"{key} is for a new network of pixels: with base, the pipeline has its own network")
    check_choice("optimizer", config.optimizer, OPTIMISERS)
    ranks = Ranks.start(device)
    check_eight_bit(config.optimizer, ranks.device)
    with ranks.main_process_first():
        model = base if isinstance(base, Model) else load(base, "cpu" if isinstance(base, (str, Path)) else None)
    model = replace(model, denoiser=copy.deepcopy(model.denoiser))
    to_float32(model.denoiser)
    check_base_pipeline(model)
    check_lora(model, None, config.lora, config.lora_targets, config.fsdp)
    if config.lora is not None and config.init != "base":
        raise BadInput("a LoRA changes the weights that are there: it goes with init=base")
    source = captioned_data(data, model, config)
    previous = ranks.on_main_process(lambda: saved_run(out / "checkpoint.pt"))
    identity = ranks.on_main_process(lambda: model_hash(model))
    minutes = 30.0 if config.steps is None and config.minutes is None else config.minutes
    fit = Fit(
        steps=config.steps,
        minutes=minutes,
        seed=config.seed,
        device=device,
        accumulate=config.grad_accumulation,
        shard=config.fsdp,
    )
    finished = bool(previous) and fit.progress(previous["step"], previous["seconds"]) >= 1
    ranks.on_main_process(lambda: check_output_folder(out, finished))
    encoded = encoded_data(model, source, Path(config.cache or out / "encoded"), config, ranks)
    torch.manual_seed(config.seed)
    denoiser = model.denoiser.requires_grad_(True)
    if config.init == "random":
        initialise(denoiser.net)
    if config.lora is not None:
        add_lora(denoiser.net, config.lora, targets=config.lora_targets, seed=config.seed)
    if config.gradient_checkpointing:
        checkpoint_gradients(denoiser.net)
    precision = previous.get("precision") if config.precision == "auto" else None
    precision = precision or ranks.on_main_process(lambda: fastest_precision(model, encoded, config, ranks.device))
    assert encoded.conditions is not None
    loss = DenoisingLoss(
        label_drop=config.label_drop,
        null_conditions=encoded.null_conditions,
        conditions=tuple(encoded.conditions([0])),
    )
    lr = LR["lora" if config.lora is not None else config.init] if config.lr is None else config.lr
    trained = TrainedModule("model", denoiser, lambda batch: loss(denoiser, batch), lr=lr, optimiser=config.optimizer)
    structure = training_structure(config, config.init == "base")
    modules = [trained]
    settings: dict[str, Any] = {"base": identity, "init": config.init, "label_drop": config.label_drop}
    if structure is not None:
        settings["structure"] = asdict(structure)
        modules = with_structure(trained, loss, denoiser, tuple(model.shape), structure, ranks, seed=config.seed)
    if config.lora is not None:
        settings |= {"lora": config.lora, "lora_targets": config.lora_targets}
    batches = Batches(encoded, config.batch_size, seed=config.seed)
    averaged = replace(fit, precision=precision)(modules, batches, out, show, settings)["model"]
    assert isinstance(averaged, Denoiser)
    if finished and (saved := ranks.on_main_process(lambda: saved_model_at(out, previous["step"]))):
        return load(saved)  # with what was added to it since, such as plans
    card: dict[str, Any] = {
        **{key: model.card[key] for key in KEPT if key in model.card},
        "data": source.source,
        "images": len(source),
        "captions": len(set(source.captions or ())),
        "base": model.name,
        "init": config.init,
        "batch_size": config.batch_size,
        "lr": lr,
        "seed": config.seed,
        "precision": precision,
        "label_drop": config.label_drop,
        "flip": config.flip,
        "last": last_log_entry(out / "log.jsonl"),
        **({} if config.lora is None else {"lora_rank": config.lora}),
        **({} if structure is None else {"structure": asdict(structure)}),
    }
    fresh: dict[str, Any] = {"plan": None, "plans": {}, "statistics": {}, "parts": {}}  # those of other weights
    pipeline = copy.copy(model.pipeline)  # which shares its components; the original is unchanged
    averaged = averaged.eval().requires_grad_(False).cpu()
    lora = None if config.lora is None else lora_file(model, lora_factors(averaged.net))
    fold_lora(averaged.net)
    if config.gradient_checkpointing:
        checkpoint_gradients(averaged.net, False)
    setattr(pipeline, network_of(pipeline)[0], averaged.net.net)
    result = replace(
        model,
        denoiser=averaged,
        pipeline=pipeline,
        name=name or out.resolve().name,
        card=card,
        **fresh,
    )
    if ranks.is_main_process:
        remove_earlier_model(out)
        result.save(out)
        if lora is not None:
            write_lora(lora, out / LORA_FILE)
    ranks.barrier()
    return result


def check_base_pipeline(model: Model) -> None:
    """Raise BadInput unless the network of the model can be trained on captions and saved as a pipeline."""
    net: Any = model.denoiser.net
    if model.conditioning is None:
        raise BadInput(
            f"{model.name} takes no prompts: base is a text-to-image pipeline (without base, a new network is trained)"
        )
    integers = [name for name, p in net.named_parameters() if not p.is_floating_point()]
    if next(layers(net), None) is not None or integers or quantized_by(net) is not None:
        raise BadInput(f"the network of {model.name} is quantised and cannot be trained: set base to the original")
    if "distilled" in model.card or model.denoiser.net_takes_guidance:
        raise BadInput(
            f"{model.name} is a distilled student, which this training would undo: set base to the model that it was "
            "distilled from"
        )
    out, own = getattr(net.config, "out_channels", None), getattr(net.config, "in_channels", None)
    if out is not None and out != own:
        raise BadInput(f"the network of {model.name} predicts a variance too, which this training does not support")
    if not check_savable(model):
        raise BadInput(f"{model.name} cannot be saved as a pipeline of diffusers: set base to one that can")
    cond = model.conditioning.cond(2, "")
    cond = {name: value.to(model.device) for name, value in cond.items()}
    check_trainable(model.name, model.denoiser, tuple(model.shape), cond)


def captioned_data(data: str | Path | Data, model: Model, config: TrainConfig) -> Data:
    """The images with their captions, of the size that the pipeline makes."""
    channels, height, width = image_size(model)
    if config.size is not None and (config.size, config.size) != (height, width):
        raise BadInput(f"{model.name} is trained on images of {width} x {height}: leave out size, or set it to that")
    if not isinstance(data, Data):
        data = open_data(data, size=(height, width), channels=channels, label="none", caption=config.caption)
    check_encodable(model, data)
    return data


def encoded_data(model: Model, source: Data, folder: Path, config: TrainConfig, ranks: Ranks) -> Data:
    """The data as latents and text embeddings, which the main process computes where they are not there yet."""

    def encoded() -> Data:
        return encode_captioned(model, source, folder, dtype=config.cache_dtype, flip=config.flip)

    def compute() -> bool:
        parts = [part for part in (model.conditioning, model.decoder) if part is not None]
        for part in parts:
            part.to(ranks.device)
        try:
            return len(encoded()) > 0
        finally:
            for part in parts:
                part.to(before)

    before = model.device
    ranks.on_main_process(compute)
    return encoded()


def initialise(net: Any) -> None:
    """Give a network of diffusers random weights, as its class initialises them."""
    inner = net.net
    new = type(inner).from_config(inner.config)
    inner.load_state_dict(new.state_dict())


def fastest_precision(model: Model, data: Data, config: TrainConfig, device: torch.device) -> str:
    """The precision in its normal form; for `auto` the faster of `fp32` and `bf16`, by timing the forward pass."""
    if config.precision != "auto":
        return format_runtime(parse_runtime(config.precision))
    size = min(config.batch_size, 16)
    assert data.conditions is not None
    cond: dict[str, Any] = {name: value.to(device) for name, value in data.conditions([0] * size).items()}
    x = torch.randn(size, *data.shape, device=device)
    identity = f"train {type(model.denoiser.net).__name__} {sum(p.numel() for p in model.denoiser.parameters())}"
    return format_runtime(autotune(model.denoiser.to(device), x, identity, **cond)).split("+")[0]
