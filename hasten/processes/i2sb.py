"""I2SB: a Schroedinger bridge between pairs of a clean and a degraded image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BadInput
from ..schedules.base import _float64
from ._base import Process, coefficient

__all__ = ["I2SB"]


@dataclass(frozen=True)
class I2SB(Process):
    """The Brownian bridge from a clean x_0 at t = 0 to its degraded x_1 at t = 1:

        q(z_t | x_0, x_1) = N((W_t x_0 + V_t x_1) / V, (V_t W_t / V) I),   V_t = int_0^t beta,   W_t = V - V_t

    where sqrt(beta) is linear from sqrt(beta_min) at t = 0 towards sqrt(beta_max) at t = 1 up to t = 1/2, and mirrored
    beyond. The denoiser estimates x_0. For its prediction alpha = 1 and sigma = sqrt(V_t): an eps-network learns
    `(z_t - x_0) / sqrt(V_t)` and `x_0 = z_t - sqrt(V_t) eps`.

    Args:
        beta_min: a thousand times the smallest step variance of the paper's code, > 0.
        beta_max: as many times the largest, > 0; 0.3 gives V = .141, 1 (for inpainting) V = .247.
        noise: False: the deterministic bridge (the paper's OT-ODE), without noise in training and in sampling.

    Raises:
        BadInput: for betas that are not positive.

    References:
        Liu, Vahdat, Huang, Theodorou, Nie, Anandkumar 2023, arXiv:2302.05872.
    """

    beta_min: float = 0.1
    beta_max: float = 0.3
    noise: bool = True
    sampler: ClassVar[str] = "i2sb"
    bridge: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not min(self.beta_min, self.beta_max) > 0 or not math.isfinite(self.beta_min + self.beta_max):
            raise BadInput(f"I2SB needs positive betas, found {self.beta_min} and {self.beta_max}")

    def variance(self, t: Tensor | float) -> Tensor:
        """V_t, float64, of the shape of t."""
        t = _float64(t)
        half = self._integral(t.clamp(max=0.5))
        return torch.where(t <= 0.5, half, 2 * self._half - self._integral((1 - t).clamp(max=0.5)))

    @property
    def total(self) -> float:
        """V."""
        return 2 * float(self._half)

    def bridge_std(self, t: Tensor | float) -> Tensor:
        """The standard deviation of z_t given both ends, `sqrt(V_t W_t / V)`; 0 without noise."""
        V = self.variance(t)
        return torch.sqrt((V * (self.total - V)).clamp(min=0) / self.total) * float(self.noise)

    def corrupt(self, x: Tensor, t: Tensor, eps: Tensor, source: Tensor | None = None) -> Tensor:
        if source is None:
            raise BadInput("I2SB is a bridge: its far end, the source, is missing")
        far = self.variance(t) / self.total
        state = coefficient(1 - far, x) * x + coefficient(far, x) * source
        return state + coefficient(self.bridge_std(t), x) * eps if self.noise else state

    def begin(self, noise: Tensor, t: Tensor | float, source: Tensor | None = None) -> Tensor:
        if source is None:
            raise BadInput("I2SB is a bridge: it begins from source images, and none are given")
        if float(t) != 1:
            raise BadInput(f"I2SB begins at t = 1, where the state is the source image, found t = {float(t):g}")
        return source.to(noise.dtype)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.variance(t))

    def _time(self, lam: Tensor) -> Tensor:
        V = torch.exp(-2 * lam).clamp(max=self.total)
        first = self._inverse(V.clamp(max=float(self._half)))
        return torch.where(self._half >= V, first, 1 - self._inverse((self.total - V).clamp(0, float(self._half))))

    @property
    def _half(self) -> Tensor:
        """V at t = 1/2."""
        return self._integral(_float64(0.5))

    def _integral(self, t: Tensor) -> Tensor:
        """`int_0^t (a + (b - a) u)^2 du` for t in [0, 1/2]."""
        a, b = math.sqrt(self.beta_min), math.sqrt(self.beta_max)
        return t * (a * a + a * (b - a) * t + (b - a) ** 2 * t**2 / 3)

    def _inverse(self, V: Tensor) -> Tensor:
        """The inverse of `_integral`."""
        a, b = math.sqrt(self.beta_min), math.sqrt(self.beta_max)
        if a == b:
            return V / a**2
        inside = a**3 + 3 * (b - a) * V
        return (torch.sign(inside) * inside.abs() ** (1 / 3) - a) / (b - a)
