"""Train a stochastic interpolant between two sets of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..denoiser import Denoiser
from ..model.model import Model
from ..predictions import Flow
from ..processes.interpolant import Interpolant
from ..train.sources import Data
from ..train.trained_module import TrainedModule
from ._base import MakeUNet, TrainProcess, TrainSettings
from ._coupled import check_coupling, coupled_modules


@dataclass(frozen=True)
class TrainInterpolant(TrainProcess):
    """Lines between two sets with noise between the ends, which smooths what lies there.

    Args:
        curve, noise, diffusion: see `processes.interpolant.Interpolant`; with `diffusion` the sampler is stochastic.
        coupling: "none", "ot" or "paired", as for rectified_flow.

    References:
        Albergo, Boffi, Vanden-Eijnden 2023, arXiv:2303.08797.
    """

    curve: str = "brownian"
    noise: float = 0.5
    diffusion: float = 0.0
    coupling: str = "none"
    needs_source: ClassVar[bool] = True
    takes_source: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_coupling(self.coupling)
        Interpolant(self.curve, self.noise, self.diffusion)  # checks them

    @property
    def unpaired(self) -> bool:
        """The two sets are not paired."""
        return self.coupling != "paired"

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        return Denoiser(unet(), Interpolant(self.curve, self.noise, self.diffusion), Flow())

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        return coupled_modules(denoiser, settings, self.coupling)

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        return replace(model, sampler="interpolant", times="trailing", steps=20)
