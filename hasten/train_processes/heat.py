"""Train inverse heat dissipation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..denoiser import Denoiser
from ..errors import check_numbers
from ..model.model import Model
from ..predictions import ResidualPrediction
from ..processes.soft import Soft
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess
from .soft import fitted_to


@dataclass(frozen=True)
class TrainHeat(TrainProcess):
    """A blur with noise of one level, whose steps restore a little and add a little more noise.

    Args:
        blur_max: blur at t = 1, in pixels. None: seven tenths of the longer side, 20 for 28.
        noise: standard deviation of the noise; the paper's .01 for images in [0, 1] is .02 in [-1, 1].

    References:
        Rissanen, Heinonen, Solin 2022, arXiv:2206.13397.
    """

    blur_max: float | None = None
    noise: float = 0.02

    def __post_init__(self) -> None:
        check_numbers(self)
        self._process((1, 1))

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        return Denoiser(unet(), fitted_to(self._process(tuple(data.shape)), data), ResidualPrediction())

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        return replace(model, sampler="soft:form=naive,noise=1.25", times="uniform", steps=100)

    def _process(self, shape: tuple[int, ...]) -> Soft:
        """The process for samples of this shape."""
        blur = 0.7 * max(shape[-2:]) if self.blur_max is None else self.blur_max
        return Soft(shape, blur_max=blur, noise_min=self.noise, noise_max=self.noise)
