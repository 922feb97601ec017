"""Diffusion that refines the images of a variational autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choices, check_numbers
from ..model.model import Model
from ..nets.vae import VAE
from ..predictions import V
from ..schedules.continuous import VPCosine
from ..train.losses import DenoisingLoss
from ..train.sources import Data
from ..train.trained_module import TrainedModule
from ._base import MakeUNet, TrainProcess, TrainSettings
from ._vae import vae_module, with_vae

__all__ = ["TrainDiffuseVAE"]


@dataclass(frozen=True)
class TrainDiffuseVAE(TrainProcess):
    """Ordinary diffusion from noise whose network reads x_hat, the reconstruction of the image by an autoencoder.

    In training x_hat = D(u), u ~ q(u | x); in sampling u is drawn (`starts.diffuse_vae`). Both are trained at once.

    form "concat": x_hat is concatenated to the network's input. form "shifted" is the process
    `z_t = alpha x + x_hat + sigma eps`: in z_t - x_hat it is the ordinary one exactly, so that any sampler runs it, and
    the network reads `z_t + x_hat` beside x_hat in place of z_t.

    Not where the latents decide little: then the network learns to ignore them.

    Args:
        form: "concat" or "shifted".
        latent: numbers in a latent of the autoencoder.
        vae_widths: of the autoencoder.
        vae_lr: peak learning rate of the autoencoder.

    Raises:
        BadInput: for an unknown form, and values out of range.

    References:
        Pandey, Mukherjee, Rai, Kumar 2022, arXiv:2201.00308.
    """

    form: str = "concat"
    latent: int = 32
    vae_widths: tuple[int, ...] = (32, 64)
    vae_lr: float = 1e-3

    def __post_init__(self) -> None:
        check_choices(self, form=("concat", "shifted"))
        check_numbers(self)
        if self.latent < 1 or not self.vae_widths or min(self.vae_widths) < 1 or not self.vae_lr > 0:
            raise BadInput("diffuse_vae needs latent and vae_widths of at least 1 and vae_lr above 0")

    def denoiser(self, data: Data, unet: MakeUNet) -> Denoiser:
        """The network with the input `source` on the cosine path, v-prediction."""
        net = unet(source_channels=data.shape[0], shifted=self.form == "shifted")
        return Denoiser(net, VPCosine(offset=0.0), V())

    def modules(self, denoiser: Denoiser, data: Data, settings: TrainSettings) -> list[TrainedModule]:
        """The autoencoder, and the denoiser that reads its reconstructions."""
        vae = VAE(data.shape, self.latent, len(data.classes or ()), self.vae_widths)
        loss = DenoisingLoss(label_drop=settings.label_drop)

        def model_loss(batch: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                mean, logvar = vae.encode(batch["x"], batch.get("label"))
                u = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
                source = vae.decode(u, batch.get("label"))
            return loss(denoiser, {**batch, "source": source.to(batch["x"])})

        model = TrainedModule("model", denoiser, model_loss, lr=settings.lr, optimiser=settings.optimizer)
        return [vae_module(vae, None, self.vae_lr), model]

    def finish(self, averaged: Mapping[str, nn.Module], model: Model) -> Model:
        """The model with its part "generator", whose images it refines."""
        return replace(model, start="diffuse_vae", parts=with_vae(averaged, model))
