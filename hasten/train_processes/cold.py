"""Train cold diffusion."""

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
class TrainCold(TrainProcess):
    """A restoration network for a blur or a growing mask, trained by the absolute error, all but without noise.

    Args:
        corruption: `blur` or `mask`.
        blur_max: blur at t = 1, in pixels. None: the longer side, which leaves little more than the mean.
        edge: width of the edge of the mask, in pixels.
        noise: standard deviation of the noise, the same at all times: without any, equal means give equal images.

    References:
        Bansal et al. 2022, arXiv:2208.09392.
    """

    corruption: str = "blur"
    blur_max: float | None = None
    edge: float = 4.0
    noise: float = 0.002

    def __post_init__(self) -> None:
        check_numbers(self)
        self._process((1, 1))

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        return Denoiser(unet(), fitted_to(self._process(tuple(data.shape)), data), ResidualPrediction())

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        return replace(model, sampler="soft:form=cold", times="uniform", steps=50)

    def _process(self, shape: tuple[int, ...]) -> Soft:
        """The process for samples of this shape."""
        blur = float(max(shape[-2:])) if self.blur_max is None else self.blur_max
        return Soft(shape, self.corruption, blur, self.edge, self.noise, self.noise, objective="l1")
