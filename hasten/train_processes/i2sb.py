"""Train an I2SB bridge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..denoiser import Denoiser
from ..errors import check_numbers
from ..predictions import Eps
from ..processes.i2sb import I2SB
from ..train.sources import Data
from ._base import MakeUNet, TrainProcess


@dataclass(frozen=True)
class TrainI2SB(TrainProcess):
    """A bridge from degraded images to clean ones, which begins from the degraded image in place of noise.

    Args:
        beta_max, beta_min, noise: see `processes.i2sb.I2SB`.
        concat: the network reads the degraded image too, at every step.

    References:
        Liu et al. 2023, arXiv:2302.05872.
    """

    beta_max: float = 0.3
    beta_min: float = 0.1
    noise: bool = True
    concat: bool = False
    needs_source: ClassVar[bool] = True
    takes_source: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self)
        I2SB(self.beta_min, self.beta_max, self.noise)

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        net = unet(source_channels=data.shape[0]) if self.concat else unet()
        return Denoiser(net, I2SB(self.beta_min, self.beta_max, self.noise), Eps())
