"""`Process`: a forward process that two numbers at a time do not describe."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..predictions import spread
from ..schedules.base import Schedule

__all__ = ["Process", "coefficient"]


class Process(Schedule):
    """A forward process `q(z_t | x)`, or for a bridge `q(z_t | x, source)`; subclasses are frozen dataclasses.

    `alpha`, `sigma` and `lam` are the coefficients of the denoiser's prediction, `z_t = alpha w + sigma e`, where w is
    what the denoiser estimates (`clean`) and e the noise that is then in z_t. Samplers for `x_t = alpha x + sigma eps`
    refuse a process; its own name it in `SamplerBase.processes`.

    A bridge overrides `begin`, which gives the state at the first time from the source.

    `sampler`: the default sampler, as `pick` reads it. `bridge`: whether the far end is an image of a second set, the
    source, in place of noise.
    """

    ordinary: ClassVar[bool] = False
    sampler: ClassVar[str] = ""
    bridge: ClassVar[bool] = False

    def corrupt(self, x: Tensor, t: Tensor, eps: Tensor, source: Tensor | None = None) -> Tensor:
        """A draw of `q(z_t | x)`, (B, *S).

        Args:
            x: clean samples (B, *S).
            t: times () or (B,), float64.
            eps: standard normal noise (B, *S).
            source: of a bridge, its far end (B, *S).
        """
        raise NotImplementedError

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """What the denoiser estimates at time t, (B, *S): by default x itself."""
        return x

    def loss(
        self, denoiser: Any, x: Tensor, t: Tensor, eps: Tensor, cond: dict[str, Any], source: Tensor | None = None
    ) -> Tensor:
        """The loss of each sample, (B,) float32: by default the mean squared error of the raw output against the
        prediction's target for `w = clean(x, t)` and the noise `(z_t - alpha w) / sigma`.

        Args:
            denoiser: whose network is trained.
            x: clean samples (B, *S).
            t: times (B,), float64.
            eps: standard normal noise (B, *S).
            cond: conditions of the network.
            source: of a bridge, its far end (B, *S).
        """
        z = self.corrupt(x, t, eps, source)
        raw = denoiser.raw(z, t, **cond)
        alpha, sigma = (value.to(x.dtype).to(x.device) for value in (self.alpha(t), self.sigma(t)))
        w = self.clean(x, t)
        noise = (z - spread(alpha, x) * w) / spread(sigma, x)
        error = raw.float() - denoiser.prediction.target(w, noise, alpha, sigma).float()
        return error.square().flatten(1).mean(1)


def coefficient(value: Tensor, like: Tensor) -> Tensor:
    """Numbers () or (B,), computed in float64, in the dtype of `like` (B, *S) and broadcast to it."""
    return spread(torch.as_tensor(value).to(like.dtype).to(like.device), like)
