"""Diffusion Schroedinger bridges between two sets of images that are not paired."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput
from ._pinned import PinnedDiffusion

__all__ = ["DSBM", "mean_matching_target"]


@dataclass(frozen=True)
class DSBM(PinnedDiffusion):
    """Brownian motion `dz = noise dw` between two sets, as a mixture of Brownian bridges:

        q(z_t | x_0, y) = N((1 - t) x_0 + t y, noise^2 t (1 - t))

    The denoiser estimates E[x_0 | z_t] without seeing y, so that sampling is a Markov process from the sources to the
    images: with pairs (x_0, y) that training draws anew from the process of the opposite direction, it tends to the
    Schroedinger bridge, the process with both marginals nearest to the Brownian motion. For the prediction alpha = 1
    and sigma = noise sqrt(t).

    Args:
        noise: standard deviation of the Brownian motion over its whole time, > 0: small values keep more of the source.

    Raises:
        BadInput: for a noise that is not positive.

    References:
        Shi, De Bortoli, Campbell, Doucet 2023, arXiv:2303.16852.
    """

    noise: float = 1.0
    sampler: ClassVar[str] = "dsbm"

    def __post_init__(self) -> None:
        if not 0 < self.noise < math.inf:
            raise BadInput(f"DSBM needs noise > 0, found {self.noise}")

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.noise * torch.sqrt(t)

    def _time(self, lam: Tensor) -> Tensor:
        return torch.exp(-2 * lam) / self.noise**2


def mean_matching_target(mean: Callable[[Any], Any], z: Any, later: Any) -> Any:
    """What the opposite direction regresses on `later`: `later + mean(z) - mean(later)`.

    A chain goes from z to `later = mean(z) + noise`; the mean of its time reversal at `later` is the regression of
    this.

    Args:
        mean: of the next state given a state, (B, *S) -> (B, *S).
        z, later: two successive states of the chain (B, *S).

    References:
        De Bortoli, Thornton, Heng, Doucet 2021, arXiv:2106.01357, proposition 3.
    """
    return later + mean(z) - mean(later)
