"""The autoencoder that is trained beside a denoiser, as its part "generator"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..model.model import Model
from ..nets.vae import VAE
from ..train.trained_module import TrainedModule
from ..train.vae import vae_loss

__all__ = ["PART", "vae_module", "with_vae"]

PART = "generator"  # of the model, and of the checkpoint


def vae_module(vae: VAE, variance: float | None, lr: float) -> TrainedModule:
    """The autoencoder as a trained module; `variance` as for `vae_loss`."""
    return TrainedModule(PART, vae, lambda batch: vae_loss(vae, batch["x"], batch.get("label"), variance), lr=lr)


def with_vae(averaged: Mapping[str, nn.Module], model: Model) -> dict[str, nn.Module]:
    """The parts of the model and the averaged autoencoder, on the CPU, ready to draw images."""
    vae: Any = averaged[PART]
    vae = vae.cpu().eval().requires_grad_(False)
    vae.set_latents()
    return {**model.parts, PART: vae}
