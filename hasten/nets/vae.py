"""A small variational autoencoder with a vector of latents: a generator that is trained in minutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import group_norm

SCALE = 4  # of the two convolutions of stride 2


class VAE(nn.Module):
    """Encoder q(u | x, label) = N(mean, exp(logvar)) and decoder D(u, label) of a latent vector u of L numbers.

    `forward(noise)` draws images: u = m_c + L_c noise with the Gaussian of each class that `set_latents` sets to the
    posteriors of the training data ("ex-post"; at first the standard normal one), then D(u). Convolutions for images
    of any size (C, H, W), perceptrons for other samples.

    Args:
        shape: S of a sample.
        latent: L.
        classes: 0 for none. Label `classes` is the null class; `label=None` is the null class for all.
        widths: channels at half and at a quarter of the resolution; perceptrons have the last, times four.

    References:
        Kingma, Welling 2013, arXiv:1312.6114; Ghosh et al. 2019, arXiv:1903.12436 (ex-post density).
    """

    centre: Tensor
    factor: Tensor
    count: Tensor
    first: Tensor
    second: Tensor

    def __init__(
        self, shape: Sequence[int], latent: int = 32, classes: int = 0, widths: Sequence[int] = (32, 64)
    ) -> None:
        super().__init__()
        self.config = {"shape": list(shape), "latent": latent, "classes": classes, "widths": list(widths)}
        self.shape, self.classes = tuple(shape), classes
        self.latent_shape = (latent,)
        first, second = widths[0], widths[-1]
        self.encoder: nn.Module
        self.decoder: nn.Module
        if len(shape) == 3:
            self.small = (second, math.ceil(shape[1] / SCALE), math.ceil(shape[2] / SCALE))
            self.encoder = nn.Sequential(
                nn.Conv2d(shape[0], first, 3, padding=1, stride=2), nn.SiLU(),
                nn.Conv2d(first, second, 3, padding=1, stride=2), group_norm(second), nn.SiLU(),
                nn.Conv2d(second, second, 3, padding=1), nn.SiLU(), nn.Flatten(),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.Unflatten(1, self.small), nn.Conv2d(second, second, 3, padding=1), group_norm(second), nn.SiLU(),
                nn.Upsample(scale_factor=2), nn.Conv2d(second, first, 3, padding=1), group_norm(first), nn.SiLU(),
                nn.Upsample(scale_factor=2), nn.Conv2d(first, first, 3, padding=1), nn.SiLU(),
                nn.Conv2d(first, shape[0], 3, padding=1),
            )  # fmt: skip
        else:
            size, width = math.prod(shape), 4 * second
            self.small = (width, 1, 1)
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.SiLU())
            self.decoder = nn.Sequential(
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size), nn.Unflatten(1, self.shape)
            )
        features = math.prod(self.small)
        self.to_posterior = nn.Linear(features, 2 * latent)
        self.from_latent = nn.Linear(latent, features)
        self.label_in = nn.Embedding(classes + 1, 2 * latent)
        self.label_out = nn.Embedding(classes + 1, features)
        self.register_buffer("centre", torch.zeros(classes + 1, latent))
        self.register_buffer("factor", torch.eye(latent).repeat(classes + 1, 1, 1))
        self.register_buffer("count", torch.zeros(classes + 1))
        self.register_buffer("first", torch.zeros(classes + 1, latent))
        self.register_buffer("second", torch.zeros(classes + 1, latent, latent))

    def encode(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, L) of the posterior of samples (B, *S)."""
        h = self.to_posterior(self.encoder(x)) + self.label_in(self._labels(x, label))
        mean, logvar = h.chunk(2, 1)
        return mean, logvar.clamp(-20, 10)

    def decode(self, u: Tensor, label: Tensor | None = None) -> Tensor:
        """Samples (B, *S) for latents (B, L)."""
        x = self.decoder(F.silu(self.from_latent(u) + self.label_out(self._labels(u, label))))
        return x[..., : self.shape[1], : self.shape[2]] if len(self.shape) == 3 else x

    def forward(self, noise: Tensor, label: Tensor | None = None, **cond: Any) -> Tensor:
        """Samples (B, *S) drawn with standard normal noise (B, L); other conditions than the label are not used."""
        k = self._labels(noise, label)
        u = self.centre[k] + torch.einsum("bij,bj->bi", self.factor[k], noise.to(self.centre.dtype))
        return self.decode(u, label).to(noise.dtype)

    @torch.no_grad()
    def observe(self, mean: Tensor, logvar: Tensor, label: Tensor | None = None, decay: float = 0.998) -> None:
        """Add posteriors (B, L) of labels (B,) to the running moments that `set_latents` reads, in place."""
        rows = torch.zeros(len(mean), self.classes + 1, dtype=self.count.dtype, device=mean.device)
        rows[:, self.classes] = 1
        if label is not None and self.classes:
            rows[torch.arange(len(mean), device=mean.device), label] = 1
        mean, variance = mean.to(rows), logvar.to(rows).exp()
        second = torch.einsum("bc,bi,bj->cij", rows, mean, mean) + torch.diag_embed(rows.T @ variance)
        for moment, value in ((self.count, rows.sum(0)), (self.first, rows.T @ mean), (self.second, second)):
            moment.mul_(decay).add_(value)

    @torch.no_grad()
    def set_latents(self) -> None:
        """Set the Gaussians that `forward` draws latents from to the observed ones: the covariance is that of the means
        plus the mean posterior variance. A class of too few samples has the Gaussian of all."""
        latent = self.centre.shape[1]
        few = self.count <= 2 * latent
        few[self.classes] = False
        k = torch.where(few, self.classes, torch.arange(self.classes + 1, device=few.device))
        n = self.count[k].clamp_min(1e-6)[:, None]
        centre, second = self.first[k] / n, self.second[k] / n[..., None]
        covariance = second - centre[:, :, None] * centre[:, None] + 1e-6 * torch.eye(latent).to(second)
        self.centre.copy_(centre)
        self.factor.copy_(torch.linalg.cholesky(covariance))

    @torch.no_grad()
    def fit_latents(self, x: Tensor, label: Tensor | None = None) -> None:
        """`observe` and `set_latents` for samples (n, *S) of labels (n,) alone."""
        mean, logvar = self.encode(x.to(self.centre), label)
        self.observe(mean, logvar, label, decay=0.0)
        self.set_latents()

    def _labels(self, x: Tensor, label: Tensor | None) -> Tensor:
        """The labels, or the null class for all."""
        if label is None or not self.classes:
            return torch.full((len(x),), self.classes, dtype=torch.long, device=x.device)
        return label
