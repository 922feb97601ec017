"""Base class of the processes that can be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..distributed.ranks import Ranks
from ..errors import BadInput
from ..model.model import Model
from ..pick import format_spec
from ..processes import Process
from ..train.losses import DenoisingLoss
from ..train.process_loss import ProcessLoss
from ..train.sadm import Sadm, with_structure
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
        structure: options of the structure term, see `train.sadm`; None: none.
        ranks: the processes that share a batch; None: this one.
    """

    lr: float = 1e-3
    optimizer: str = "adamw"
    label_drop: float = 0.0
    batch_size: int = 64
    device: torch.device | None = None
    seed: int = 0
    structure: Sadm | None = None
    ranks: Ranks | None = None


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

    def batch_loss(self, denoiser: Denoiser, settings: TrainSettings) -> DenoisingLoss | ProcessLoss:
        """The loss of the default `modules`: by default that of the denoiser's schedule."""
        loss: Any = ProcessLoss if isinstance(denoiser.schedule, Process) else DenoisingLoss
        made: DenoisingLoss | ProcessLoss = loss(label_drop=settings.label_drop)
        return made

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        """What the training loop trains: by default the denoiser, as the module `model`, with `batch_loss`, and where
        the run has a structure term, its encoder."""
        loss = self.batch_loss(denoiser, settings)

        def plain(batch: dict[str, Tensor]) -> Tensor:
            return loss(denoiser, batch)

        trained = TrainedModule("model", denoiser, plain, lr=settings.lr, optimiser=settings.optimizer)
        if settings.structure is None:
            return [trained]
        assert isinstance(loss, DenoisingLoss)  # as `check_structure` found
        options, ranks, seed = settings.structure, settings.ranks, settings.seed
        return with_structure(trained, loss, denoiser, data.shape, options, ranks, seed=seed)

    def check_structure(self, denoiser: Denoiser, settings: TrainSettings) -> None:
        """Raise BadInput if a structure term is asked for and cannot be had."""
        if settings.structure is None:
            return
        own = type(self).modules is not TrainProcess.modules
        if own or not isinstance(self.batch_loss(denoiser, settings), DenoisingLoss):
            raise BadInput(
                f"structure compares clean samples and estimates of them, which {format_spec(self)} trains in another "
                "way: leave it out, or use the processes diffusion or conditional"
            )

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
