"""Blurring diffusion: high frequencies fade before noise covers the low ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, plain_numbers
from ._base import coefficient
from ._diagonal import Diagonal, blur_std

__all__ = ["Blurring"]


@dataclass(frozen=True)
class Blurring(Diagonal):
    """Blur and noise together: `z_t = a_t D_t x + sigma_t eps`, D_t diagonal in the cosine transform (DCT-II) V.

        a = cos(u),  sigma = sin(u),  u linear in t with log(a^2 / sigma^2) from `logsnr_max` (t = 0+) to `logsnr_min`
        D_t = V diag(d_t) V^T,   d_t = (1 - d_min) exp(-Lambda s_t^2 / 2) + d_min,   s_t = sigma_max sin(pi t / 2)^2

    s_t is the standard deviation of the blur in pixels and Lambda the frequency, `(pi i / H)^2 + (pi j / W)^2`.
    With sigma_max = 0 it is ordinary diffusion on the cosine path.

    The denoiser returns the estimate of the *blurred* clean image D_t x, not of x: `z_t = a_t (D_t x) + sigma_t eps`
    then holds with plain numbers a_t and sigma_t, so that eps- and v-prediction mean what they always do, and nothing
    is divided by the small a_t d_t of high frequencies.

    Args:
        shape: of one sample, (..., H, W).
        sigma_max: the blur at t = 1 in pixels, >= 0.
        d_min: what remains of every frequency, in (0, 1].
        logsnr_max, logsnr_min: of a_t and sigma_t at the ends; `t = 0` itself is the clean image.

    Raises:
        BadInput: for numbers out of range.

    References:
        Hoogeboom, Salimans 2022, arXiv:2209.05557.
    """

    sigma_max: float = 20.0
    d_min: float = 0.001
    logsnr_max: float = 10.0
    logsnr_min: float = -10.0
    sampler: ClassVar[str] = "blurring"

    def __post_init__(self) -> None:
        super().__post_init__()
        plain_numbers(self)
        if not (self.sigma_max >= 0 and 0 < self.d_min <= 1 and self.logsnr_min < self.logsnr_max):
            found = (
                f"sigma_max={self.sigma_max:g}, d_min={self.d_min:g}, logsnr {self.logsnr_max:g}..{self.logsnr_min:g}"
            )
            raise BadInput(f"Blurring needs sigma_max >= 0, 0 < d_min <= 1 and logsnr_min < logsnr_max, found {found}")

    def _angle(self, t: Tensor) -> Tensor:
        """u of a time."""
        first, last = (math.atan(math.exp(-0.5 * value)) for value in (self.logsnr_max, self.logsnr_min))
        return first + (last - first) * t

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._angle(t))

    def _lam(self, t: Tensor) -> Tensor:
        return -torch.log(torch.tan(self._angle(t)))

    def _time(self, lam: Tensor) -> Tensor:
        first, last = (math.atan(math.exp(-0.5 * value)) for value in (self.logsnr_max, self.logsnr_min))
        return ((torch.atan(torch.exp(-lam)) - first) / (last - first)).clamp(0, 1)

    def factor(self, t: Tensor, keys: Tensor) -> Tensor:
        """d_t of these keys, float64, of the broadcast shape of `t` and `keys`."""
        return (1 - self.d_min) * self.dissipation(blur_std(t, self.sigma_max), keys) + self.d_min

    def corrupt(self, x: Tensor, t: Tensor, eps: Tensor, source: Tensor | None = None) -> Tensor:
        """z_t (B, *S) of clean samples `x` (B, *S) at times `t` (B,) with noise `eps` (B, *S)."""
        return coefficient(self.alpha(t), x) * self.clean(x, t) + coefficient(self.sigma(t), eps) * eps

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """D_t x (B, *S), the blurred image."""
        return self.apply(x, t)

    def begin(self, noise: Tensor, t: Tensor | float, source: Tensor | None = None) -> Tensor:
        """The state at the first time for standard normal data; at t = 1 that is the noise, up to 2e-5."""
        at = torch.as_tensor(t, dtype=torch.float64)
        std = torch.hypot(self.alpha(at) * self.factor(at, self.keys), self.sigma(at))
        return self.back(std.to(noise.dtype).to(noise.device) * self.to(noise))
