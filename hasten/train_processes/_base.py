"""Base class of the processes that can be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..denoiser import Denoiser
from ..model.model import Model
from ..processes import Process
from ..train.losses import DenoisingLoss
from ..train.process_loss import ProcessLoss
from ..train.sources import Data
from ..train.trained_module import TrainedModule

__all__ = ["TrainProcess", "TrainSettings"]

MakeUNet = Callable[..., nn.Module]


@dataclass(frozen=True)
class TrainSettings:
    """What a training run sets for every process.

    Args:
        lr: peak learning rate.
        optimizer: see `TrainConfig`.
        label_drop: probability that the label of a sample is dropped; 0 without labels.
        batch_size: over all processes.
        device: of the training; None: the CPU.
        seed: of the run.
    """

    lr: float = 1e-3
    optimizer: str = "adamw"
    label_drop: float = 0.0
    batch_size: int = 64
    device: torch.device | None = None
    seed: int = 0


class TrainProcess:
    """How a model of one process is built, trained and finished: a frozen dataclass, picked by its file's name.

    `needs_source`: it trains on pairs, of which the batch has the sources as `source`. `takes_source`: it can.
    """

    needs_source: ClassVar[bool] = False
    takes_source: ClassVar[bool] = False

    @property
    def unpaired(self) -> bool:
        """Whether the sources are another set, of which each image of a batch gets a random one."""
        return False

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        """The network with its schedule and prediction, before training.

        Args:
            data: to train on; `data.conditions` gives the sources, if there are any.
            unet: `unet(**options)` makes the U-Net that the run asks for, with further options of `UNet` (such as
                `out_channels`), or of `SourceUNet` where `source_channels` is among them.
        """
        raise NotImplementedError

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        """What the training loop trains: by default the denoiser, as the module `model`, with the loss of its
        schedule."""
        loss: Any = ProcessLoss if isinstance(denoiser.schedule, Process) else DenoisingLoss
        loss = loss(label_drop=settings.label_drop)
        return [
            TrainedModule(
                "model", denoiser, lambda batch: loss(denoiser, batch), lr=settings.lr, optimiser=settings.optimizer
            )
        ]

    def averaged_denoiser(self, averaged: Mapping[str, nn.Module]) -> Denoiser:
        """The denoiser of the model to save, by default the average of `model`."""
        denoiser = averaged["model"]
        assert isinstance(denoiser, Denoiser)
        return denoiser

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        """The model to save, by default with the sampler of its process.

        Args:
            averaged: the averages of the trained modules, by name.
            model: with `averaged_denoiser` as its denoiser.
        """
        schedule = model.denoiser.schedule
        if not isinstance(schedule, Process):
            return model
        return replace(model, sampler=schedule.sampler, times="uniform")
