"""Fine-tuning: `hasten train --from MODEL` trains a saved model on other images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapters.diffusers.library import network_of
from ..denoiser import Denoiser
from ..distillers._memory import to_float32
from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..loading import load
from ..model.model import Model
from ..model.sources import refuse_process
from ..nets.prequantized import check_original_weights
from ..nets.quantized import layers
from ..pick import pick
from ..storage.checks import check_trainable
from ..storage.model_folder import check_savable
from ..train.data import Data, open_data
from ..train_processes._base import MakeUNet, TrainProcess, TrainSettings
from .distill_data import training_samples
from .train_config import TrainConfig

__all__ = ["FineTuned", "open_origin", "origin_data"]

NEW_NETWORK = ("widths", "blocks", "patch")
OTHER_START = ("process", "source", "degrade", "crop", "base", "lora")
KEPT = ("pipeline", "network", "scheduler", "parameters")  # of the card


class FineTuned(TrainProcess):
    """The process of a saved model: its network, schedule and prediction, with the loss that it was trained with.

    Args:
        origin: the model to begin from, which is left unchanged.
    """

    def __init__(self, origin: Model) -> None:
        self.origin = origin
        self.process: TrainProcess = pick("train_processes", origin.card.get("process") or "diffusion")

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        denoiser = copy.deepcopy(self.origin.denoiser)
        to_float32(denoiser)
        return denoiser.requires_grad_(True)

    def batch_loss(self, denoiser: Denoiser, settings: TrainSettings) -> Any:
        return self.process.batch_loss(denoiser, settings)

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        """The origin with the trained network; what was measured on the old weights is not kept."""
        card = {key: self.origin.card[key] for key in (*KEPT, "process") if key in self.origin.card}
        card |= {**model.card, "from": self.origin.name}
        fresh: dict[str, Any] = {"plan": None, "plans": {}, "statistics": {}, "parts": {}, "sha256": None}
        pipeline = copy.copy(self.origin.pipeline)  # which shares its components; the original is unchanged
        if pipeline is not None:
            net: Any = model.denoiser.net
            setattr(pipeline, network_of(pipeline)[0], net.net)
        return replace(
            self.origin, denoiser=model.denoiser, name=model.name, card=card, pipeline=pipeline, **fresh
        )  # fmt: skip


def open_origin(config: TrainConfig, ranks: Ranks) -> Model:
    """The model that a run begins from.

    Raises:
        BadInput: for a model that this training is not for, and options that do not go with it.
    """
    name = str(config.init_from)
    default = TrainConfig()
    for key in (*NEW_NETWORK, *OTHER_START):
        if getattr(config, key) != getattr(default, key):
            raise BadInput(f"{key} does not go with --from (init_from): the model keeps its own network and process")
    with ranks.main_process_first():
        model = load(Path(name) if Path(name).exists() else name)
    if model.conditioning is not None:
        raise BadInput(
            f"{model.name} takes prompts, and --from (init_from) is for models that take none: --base (base) trains "
            "the network of a text-to-image pipeline on captions"
        )
    refuse_process(model, "fine-tuning")
    kind = str(model.card.get("process") or "diffusion").partition(":")[0]
    if model.start is not None or model.source_shape is not None or kind != "diffusion":
        raise BadInput(f"{model.name} is a model of the process {kind}: --from (init_from) is for ordinary diffusion")
    net = model.denoiser.net
    if next(layers(net), None) is not None or getattr(net, "runs_elsewhere", False):
        raise BadInput(f"{model.name} is quantised or exported, which cannot be trained: name the original")
    check_original_weights(model.denoiser, f"{model.name} cannot be trained", "name the original")
    if "distilled" in model.card or model.denoiser.net_takes_guidance or model.denoiser.step_counts is not None:
        raise BadInput(
            f"{model.name} is a distilled student, which this training would undo: begin from the model that it was "
            "distilled from"
        )
    check_savable(model)
    check_trainable(model.name, model.denoiser, tuple(model.shape), model.cond(2))
    return model


def origin_data(data: str | Path | Data | Tensor, origin: Model, config: TrainConfig) -> Data:
    """The data as samples of the model's shape, with labels as its classes, matched by name.

    Raises:
        BadInput: for samples of another shape, or other classes.
    """
    pixels = origin.shape if origin.decoder is None else origin.decoder.pixels(origin.shape)
    channels, height, width = pixels if len(pixels) == 3 else (None, None, None)
    if config.size is not None and (config.size, config.size) != (height, width):
        raise BadInput(f"{origin.name} is trained on images of {width}x{height}: leave out size, or set it to that")
    if config.channels not in (None, channels):
        raise BadInput(f"{origin.name} has images of {channels} channels: leave out channels, or set it to that")
    if config.label is not None and isinstance(data, (str, Path)) and height and width:
        data = open_data(data, size=(height, width), channels=channels, label=config.label)
    return training_samples(origin, data)
