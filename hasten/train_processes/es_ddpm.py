"""Early stop: a chain that is cut at T' and begins from the images of a generator, diffused once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_numbers
from ..model.model import Model
from ..nets.vae import VAE
from ..predictions import V
from ..schedules.continuous import VPCosine
from ..schedules.truncated import Truncated
from ..train.sources import Data
from ..train.trained_module import TrainedModule
from ._base import MakeUNet, TrainProcess, TrainSettings
from ._vae import vae_module, with_vae

__all__ = ["ESDDPM"]


@dataclass(frozen=True)
class ESDDPM(TrainProcess):
    """A denoiser trained on t <= T' only, and a small variational autoencoder beside it that draws what it begins from.

    Sampling: `starts.early_stop`, `z_T' = alpha D(u) + sigma e` and then any sampler from T'; the decoder D costs a
    small fraction of an evaluation. The error of its images contracts on the way. Not for a generator that misses whole
    parts of the data: what is not there at T' does not come back.

    Args:
        time: T', on the cosine path alpha = cos(pi t / 2).
        generator: the folder of a model, or a bundled name, that draws the images in place of an autoencoder.
        latent: numbers in a latent of the autoencoder.
        widths: of the autoencoder.
        direct: train the decoder to give z_T' itself: its Gaussian has the variance sigma^2 / alpha^2 of the noise that
            is added, so that the latent leaves out what that noise hides.
        vae_lr: peak learning rate of the autoencoder.

    Raises:
        BadInput: for a time outside (0, 1), and other values out of range.

    References:
        Lyu, Xu, Yang, Lin, Dai 2022, arXiv:2205.12524.
    """

    time: float = 0.5
    generator: str = ""
    latent: int = 32
    widths: tuple[int, ...] = (32, 64)
    direct: bool = False
    vae_lr: float = 1e-3

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 < self.time < 1:
            raise BadInput(f"es_ddpm needs 0 < time < 1, found {self.time}")
        if self.latent < 1 or not self.widths or min(self.widths) < 1 or not self.vae_lr > 0:
            raise BadInput("es_ddpm needs latent and widths of at least 1 and vae_lr above 0")

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        """The network on the cosine path up to T', v-prediction."""
        return Denoiser(unet(), Truncated(VPCosine(offset=0.0), self.time), V())

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        """The denoiser, and the autoencoder unless a generator is given."""
        model = super().modules(denoiser, data, settings)
        if self.generator:
            return model
        vae = VAE(data.shape, self.latent, len(data.classes or ()), self.widths)
        q = float(denoiser.schedule.q(self.time))
        variance = q**2 if self.direct else None
        return [*model, vae_module(vae, variance, self.vae_lr)]

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        """The model with its part "generator", which sampling begins from."""
        how: Any = {"times": "trailing", "steps": 5}
        if self.generator:
            return replace(model, start=f"early_stop:generator={self.generator}", **how)
        return replace(model, start="early_stop", parts=with_vae(averaged, model), **how)
