"""The loss of a variational autoencoder that draws images."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nets.vae import VAE

__all__ = ["vae_loss"]


def vae_loss(vae: VAE, x: Tensor, label: Tensor | None = None, variance: float | None = None) -> Tensor:
    """Minus the evidence lower bound a dimension, in nats up to a constant, a scalar:

        |x - D(u)|^2 / (2 D variance) + KL(q(u | x) || N(0, I)) / D,    u ~ q(u | x)

    The posteriors are added to the running moments of the network (`VAE.observe`).

    Args:
        vae: the network.
        x: samples (B, *S), of D numbers each.
        label: (B,).
        variance: of the decoder's Gaussian; None: the best one for the batch, its mean squared error, with which the
            first term is `log(error) / 2` (Rybkin, Daniilidis, Levine 2020, arXiv:2006.13202).
    """
    mean, logvar = vae.encode(x, label)
    mean, logvar = mean.float(), logvar.float()
    vae.observe(mean.detach(), logvar.detach(), label)
    u = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    error = (vae.decode(u, label).float() - x.float()).square().mean()
    fit = 0.5 * torch.log(error + 1e-8) if variance is None else error / (2 * variance)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1).mean()
    return fit + divergence / x[0].numel()
