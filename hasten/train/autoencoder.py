"""The loss of a variational autoencoder for latent diffusion, and that of a smaller decoder for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from .patch_gan import PatchGan

__all__ = ["AutoencoderLoss", "DecoderLoss"]

Perceptual = Callable[[Tensor, Tensor], Tensor]


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
        gan: its decoder's term is added, or None.

    Raises:
        BadInput: for a negative weight.

    References:
        Kingma, Welling 2013, arXiv:1312.6114; Rombach et al. 2021, arXiv:2112.10752 (autoencoders for diffusion).
    """

    def __init__(
        self,
        kl: float = 1e-3,
        l1: float = 0.0,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 0.1,
        gan: PatchGan | None = None,
    ) -> None:
        check_loss_weights(kl=kl, l1=l1, perceptual_weight=perceptual_weight)
        self.kl, self.l1, self.perceptual, self.perceptual_weight = kl, l1, perceptual, perceptual_weight
        self.gan = gan

    def __call__(self, autoencoder: nn.Module, x: Tensor, batch: dict[str, Tensor] | None = None) -> Tensor:
        """The loss of a diffusers `AutoencoderKL`, a scalar.

        Args:
            autoencoder: the network.
            x: images (B, C, H, W) in [-1, 1].
            batch: receives `reconstruction`, for the discriminator.
        """
        posterior = autoencoder.encode(x).latent_dist  # type: ignore[operator]
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        out = decode_latents(autoencoder, sample_posterior(mean, logvar))
        loss = self.reconstruction(x, out) + self.kl * posterior_divergence(mean, logvar)
        return self.with_gan(autoencoder, out, loss, batch)

    def reconstruction(self, x: Tensor, out: Tensor) -> Tensor:
        """The terms that compare images with their reconstructions, a scalar."""
        loss = (out - x).square().mean()
        if self.l1:
            loss = loss + self.l1 * (out - x).abs().mean()
        if self.perceptual is not None:
            loss = loss + self.perceptual_weight * self.perceptual(x, out)
        return loss

    def with_gan(self, autoencoder: Any, out: Tensor, loss: Tensor, batch: dict[str, Tensor] | None) -> Tensor:
        """The loss with the adversarial term, if there is one."""
        if batch is not None:
            batch["reconstruction"] = out.detach()
        if self.gan is None:
            return loss
        return loss + self.gan.decoder_term(out, loss, autoencoder.decoder.conv_out.weight)


class DecoderLoss:
    """The loss of a smaller decoder D' for the latents of an autoencoder with the decoder D:

        images(x, D'(z)) + teacher mean (D(m) - D'(z))^2,    z ~ q(z|x) with the mean m

    and, where the smaller autoencoder has an encoder of its own, with mean m' and log variance l' for m and l,

        + encoder mean (m' - m)^2 + encoder / 10 mean (l' - l)^2

    Args:
        images: what compares images with reconstructions; its `kl` is not used.
        teacher: weight of the difference from the full decoder's output, >= 0.
        targets: images (B, C, H, W) -> m and log variance (B, c, h, w), D(m) (B, C, H, W), for batches that do not have
            them as `mean`, `logvar` and `target`.
        encoder: weight of the difference of the encoders, >= 0; 0 where they are the same.

    Raises:
        BadInput: for a negative weight.

    References:
        Zhao et al. 2023, arXiv:2311.16567 (a pruned decoder); Bohan 2023, "Tiny autoencoder for Stable Diffusion"
        (distilled from the full decoder's outputs).
    """

    def __init__(
        self,
        images: AutoencoderLoss,
        teacher: float,
        targets: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        encoder: float = 0.0,
    ) -> None:
        check_loss_weights(teacher=teacher, encoder=encoder)
        self.images, self.teacher, self.targets, self.encoder = images, teacher, targets, encoder

    def __call__(self, autoencoder: Any, batch: dict[str, Tensor]) -> Tensor:
        """The loss of the autoencoder with the smaller decoder on images `x` (B, C, H, W), a scalar."""
        x = batch["x"]
        if "target" in batch:
            mean, logvar, target = (batch[name].float() for name in ("mean", "logvar", "target"))
        else:
            mean, logvar, target = self.targets(x)
        out = decode_latents(autoencoder, sample_posterior(mean, logvar))
        loss = self.images.reconstruction(x, out) + self.teacher * (out - target).square().mean()
        if self.encoder:
            own = autoencoder.encode(x).latent_dist
            loss = loss + self.encoder * (own.mean.float() - mean).square().mean()
            loss = loss + 0.1 * self.encoder * (own.logvar.float() - logvar).square().mean()
        return self.images.with_gan(autoencoder, out, loss, batch)


def posterior_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """The mean over all dimensions of `KL(N(mean, exp(logvar)) || N(0, 1))`, a scalar."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def sample_posterior(mean: Tensor, logvar: Tensor) -> Tensor:
    """Samples of N(mean, exp(logvar))."""
    return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)


def decode_latents(autoencoder: Any, z: Tensor) -> Tensor:
    """The images of latents by an autoencoder of diffusers, float32."""
    return autoencoder.decode(z).sample.float()


def check_loss_weights(**weights: float) -> None:
    """Raise BadInput for a weight that is negative."""
    for name, value in weights.items():
        if not value >= 0:
            raise BadInput(f"{name} must be 0 or more, got {value}")
