"""Train rectified flow between two sets of images."""

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
class RectifiedFlow(TrainProcess):
    """Straight lines from the images of one set to those of another, whose mean velocity the network learns.

    Reflow, which makes the paths straighter for few steps: `hasten translate` the sources with the first model, then
    train another on these pairs with coupling=paired.

    Args:
        coupling: which source goes with which image: "none", any; "ot", the cheapest assignment within each batch; or
            "paired", by file name.

    References:
        Liu, Gong, Liu 2022, arXiv:2209.03003; Tong et al. 2023, arXiv:2302.00482 (ot).
    """

    coupling: str = "none"
    needs_source: ClassVar[bool] = True
    takes_source: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_coupling(self.coupling)

    @property
    def unpaired(self) -> bool:
        """The two sets are not paired."""
        return self.coupling != "paired"

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        return Denoiser(unet(), Interpolant(), Flow())

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        return coupled_modules(denoiser, settings, self.coupling)

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        return replace(model, sampler="interpolant", times="trailing", steps=10)
