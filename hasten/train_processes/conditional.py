"""Train diffusion from noise that reads a second image: the baseline of bridges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..denoiser import Denoiser
from ..predictions import V
from ..schedules.continuous import VPCosine
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess


@dataclass(frozen=True)
class Conditional(TrainProcess):
    """Ordinary diffusion from noise, with the source image concatenated to the input of the network.

    References:
        Saharia et al. 2021, arXiv:2104.07636.
    """

    needs_source: ClassVar[bool] = True
    takes_source: ClassVar[bool] = True

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        return Denoiser(unet(source_channels=data.shape[0]), VPCosine(offset=0.0), V())
