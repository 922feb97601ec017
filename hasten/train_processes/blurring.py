"""Train blurring diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..denoiser import Denoiser
from ..errors import check_choices, check_numbers
from ..model.model import Model
from ..predictions import prediction_from
from ..processes.blurring import Blurring
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess


@dataclass(frozen=True)
class TrainBlurring(TrainProcess):
    """Diffusion in which high frequencies fade before noise covers the low ones.

    Args:
        sigma_max: blur at t = 1, in pixels; the paper's 20 is for sides of 32 and 128, 0 is ordinary diffusion.
        d_min: what remains of every frequency, in (0, 1].
        prediction: `v` or `eps`, of the blurred image.

    References:
        Hoogeboom, Salimans 2022, arXiv:2209.05557.
    """

    sigma_max: float = 20.0
    d_min: float = 0.001
    prediction: str = "v"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_choices(self, prediction=("v", "eps"))
        Blurring((1, 1), self.sigma_max, self.d_min)

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        process = Blurring(tuple(data.shape), self.sigma_max, self.d_min)
        return Denoiser(unet(), process, prediction_from(self.prediction))

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        return replace(model, sampler="blurring", times="uniform", steps=50)
