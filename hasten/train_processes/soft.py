"""Train soft diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import check_numbers
from ..predictions import ResidualPrediction
from ..processes.soft import Soft
from ..train.data import to_float
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess

MAX_IMAGES = 4096  # whose blurred versions the prior is fitted to


@dataclass(frozen=True)
class TrainSoft(TrainProcess):
    """A blur or a growing mask with a little noise, trained by soft score matching.

    Args:
        corruption: `blur` or `mask`.
        blur_max: blur at t = 1, in pixels. None: a third of the longer side.
        edge: width of the edge of the mask, in pixels.
        noise_min, noise_max: of the noise, for images in [-1, 1].
        floor: weight of the error that the corruption hides.

    References:
        Daras, Delbracio, Talebi, Dimakis, Milanfar 2022, arXiv:2209.05442.
    """

    corruption: str = "blur"
    blur_max: float | None = None
    edge: float = 4.0
    noise_min: float = 0.02
    noise_max: float = 1.0
    floor: float = 0.01

    def __post_init__(self) -> None:
        check_numbers(self)
        Soft((1, 1), **self._options(1.0))

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        process = Soft(tuple(data.shape), **self._options(max(data.shape[-2:]) / 3))
        return Denoiser(unet(), fitted_to(process, data), ResidualPrediction())

    def _options(self, blur: float) -> dict[str, Any]:
        """The fields of the process."""
        return {
            "corruption": self.corruption,
            "blur_max": blur if self.blur_max is None else self.blur_max,
            "edge": self.edge,
            "noise_min": self.noise_min,
            "noise_max": self.noise_max,
            "floor": self.floor,
        }


def fitted_to(process: Soft, data: Data) -> Soft:
    """The process with the prior of up to 4,096 images of the data, in a fixed random order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:MAX_IMAGES]
    return process.fitted(to_float(data.images(order.sort().values))) if len(order) > 1 else process
