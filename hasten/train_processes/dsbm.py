"""Train a diffusion Schroedinger bridge by iterative Markovian fitting (DSBM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice, check_int
from ..model.model import Model
from ..predictions import Eps
from ..processes.dsbm import DSBM
from ..train.coupling import COUPLINGS
from ..train.sources import Data
from ..train.trained_module import TrainedModule
from ._base import MakeUNet, TrainProcess, TrainSettings
from ._directions import Directions


@dataclass(frozen=True)
class TrainDSBM(TrainProcess):
    """A stochastic process between two sets of images that stays near Brownian motion, and so keeps of the source what
    it can.

    Both directions are trained, first on the pairs of each batch, then in turn on pairs that the other one simulates.
    Both ends stay those of the data at every iteration.

    Args:
        noise: standard deviation of the Brownian motion: small keeps more of the source, large mixes more.
        first: training steps on the pairs of batches, for both directions.
        inner: training steps of one direction until the other's turn.
        reuse: training steps for which one simulated batch is used.
        steps: of the simulation, and of the sampler afterwards.
        coupling: of the first pairs, "none" or "ot".

    References:
        Shi, De Bortoli, Campbell, Doucet 2023, arXiv:2303.16852.
    """

    noise: float = 0.5
    first: int = 2000
    inner: int = 1000
    reuse: int = 5
    steps: int = 20
    coupling: str = "none"
    needs_source: ClassVar[bool] = True
    takes_source: ClassVar[bool] = True
    directions: ClassVar[type[Directions]] = Directions

    def __post_init__(self) -> None:
        for name, low in (("first", 0), ("inner", 1), ("reuse", 1), ("steps", 1)):
            check_int(name, getattr(self, name), low)
        check_choice("coupling", self.coupling, COUPLINGS[:2])
        if self.inner % self.reuse:
            raise BadInput(f"inner={self.inner} must be a multiple of reuse={self.reuse}")
        DSBM(self.noise)

    @property
    def unpaired(self) -> bool:
        """The two sets are not paired."""
        return True

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        # the sources have no labels
        return Denoiser(unet(classes=0), DSBM(self.noise), Eps())

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        both = self.directions(denoiser, self.first, self.inner, self.reuse, self.steps, self.coupling)
        return [TrainedModule("model", both, both, lr=settings.lr, optimiser=settings.optimizer)]

    def averaged_denoiser(self, averaged: Mapping[str, nn.Module]) -> Denoiser:
        both = averaged["model"]
        assert isinstance(both, Directions)
        return both.to_data

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        return replace(model, sampler="dsbm", times="trailing", steps=self.steps, classes=None, guidance_scale=1.0)
