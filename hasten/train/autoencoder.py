"""The loss of a variational autoencoder for latent diffusion, and the layout of its network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput

__all__ = ["AutoencoderLoss"]


class AutoencoderLoss:
    """`mean (x - D(z))^2 + l1 mean |x - D(z)| + kl mean KL(q(z|x) || N(0, 1))`, `z ~ q(z|x)`.

    Each mean is over all dimensions and the batch, so that `kl` does not depend on the size of the images. With a
    latent of a fraction r of the image's dimensions, the noise of the posterior costs a squared error of about
    `kl / 2` a pixel where `kl` binds: 1e-3 is a floor of 39 dB for images in [-1, 1].

    Args:
        kl: weight of the Kullback-Leibler divergence, >= 0.
        l1: weight of the absolute error, >= 0.
        perceptual: `(images, reconstructions) -> scalar` added with the weight `perceptual_weight`, or None.
        perceptual_weight: >= 0.

    Raises:
        BadInput: for a negative weight.

    References:
        Kingma, Welling 2013, arXiv:1312.6114; Rombach et al. 2021, arXiv:2112.10752 (autoencoders for diffusion).
    """

    def __init__(
        self, kl: float = 1e-3, l1: float = 0.0, perceptual: Any = None, perceptual_weight: float = 0.1
    ) -> None:
        for name, value in (("kl", kl), ("l1", l1), ("perceptual_weight", perceptual_weight)):
            if not value >= 0:
                raise BadInput(f"{name} must be 0 or more, got {value}")
        self.kl, self.l1, self.perceptual, self.perceptual_weight = kl, l1, perceptual, perceptual_weight

    def __call__(self, autoencoder: nn.Module, x: Tensor) -> Tensor:
        """The loss of a diffusers `AutoencoderKL` on images (B, C, H, W) in [-1, 1], a scalar."""
        posterior = autoencoder.encode(x).latent_dist  # type: ignore[operator]
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        out = autoencoder.decode(z).sample.float()  # type: ignore[operator]
        loss = (out - x).square().mean()
        if self.l1:
            loss = loss + self.l1 * (out - x).abs().mean()
        if self.perceptual is not None:
            loss = loss + self.perceptual_weight * self.perceptual(x, out)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return loss + self.kl * divergence
