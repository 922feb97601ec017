"""What the processes that are trained as `processes.Soft` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from ..denoiser import Denoiser
from ..errors import check_numbers
from ..model.model import Model
from ..predictions import ResidualPrediction
from ..processes.soft import Soft
from ..train.data import to_float
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess

MAX_IMAGES = 4096  # whose corrupted versions the prior is fitted to


class SoftTraining(TrainProcess):
    """Residual prediction on a `Soft` process with the prior of the data; subclasses define `_process`.

    `sampler`, `steps`: what the trained model recommends.
    """

    sampler: ClassVar[str] = "soft"
    steps: ClassVar[int] = 50

    def __post_init__(self) -> None:
        check_numbers(self)
        self._process((1, 1))  # which checks the fields

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        return Denoiser(unet(), fitted_to(self._process(tuple(data.shape)), data), ResidualPrediction())

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        return replace(model, sampler=self.sampler, times="uniform", steps=self.steps)

    def _process(self, shape: tuple[int, ...]) -> Soft:
        """The process for samples of this shape."""
        raise NotImplementedError


def fitted_to(process: Soft, data: Data) -> Soft:
    """The process with the prior of up to 4,096 images of the data, in a fixed random order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:MAX_IMAGES]
    return process.fitted(to_float(data.images(order.sort().values))) if len(order) > 1 else process
