"""Denoising diffusion bridge models (DDBM): a diffusion that is pinned to an image of a second set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_choice
from ..predictions import Prediction
from ..schedules.continuous import VPLinear
from ._pinned import PinnedDiffusion

__all__ = ["DDBM", "BridgeEDM"]

BASES = ("vp", "ve")


@dataclass(frozen=True)
class DDBM(PinnedDiffusion):
    """A diffusion from x_0 at t = 0 that is pinned to its source y at t = 1:

        q(z_t | x_0, y) = N(a y + b x_0, c^2),   r = SNR_1 / SNR_t,
        a = r alpha_t / alpha_1,   b = alpha_t (1 - r),   c^2 = sigma_t^2 (1 - r)

    of `base` "vp", `log alpha = -(beta_min t + (beta_max - beta_min) t^2 / 2) / 2`, `sigma^2 = 1 - alpha^2`, or "ve",
    `alpha = 1`, `sigma = sigma_max t`. The denoiser estimates x_0; its network should read y too (its input `source`).
    alpha and sigma are those of the base, of which the prediction `BridgeEDM` makes the paper's preconditioning.

    Args:
        base: "vp" or "ve".
        beta_min, beta_max: of "vp": the rate at t = 0 and at t = 1, 0 <= beta_min <= beta_max.
        sigma_max: of "ve": the noise level at t = 1, > 0.

    Raises:
        BadInput: for an unknown base, or values out of range.

    References:
        Zhou, Lou, Khanna, Ermon 2023, arXiv:2309.16948.
    """

    base: str = "vp"
    beta_min: float = 0.1
    beta_max: float = 2.1
    sigma_max: float = 80.0
    sampler: ClassVar[str] = "dbim"

    def __post_init__(self) -> None:
        check_choice("base", self.base, BASES)
        VPLinear(self.beta_min, self.beta_max)  # checks them
        if not 0 < self.sigma_max < math.inf:
            raise BadInput(f"DDBM needs sigma_max > 0, found {self.sigma_max}")

    @property
    def t_min(self) -> float:
        return 1e-4

    @property
    def prediction(self) -> BridgeEDM:
        """The paper's preconditioning, for two sets of images of standard deviation .5 with correlation 1/2."""
        return BridgeEDM(alpha_end=float(self.alpha(1.0)), sigma_end=float(self.sigma(1.0)))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f, g^2) of the base's equation `dz = f z dt + g dw`, float64, each of the shape of `t`."""
        if self.base == "ve":
            return torch.zeros_like(t), 2 * self.sigma_max**2 * t
        beta = self.beta_min + (self.beta_max - self.beta_min) * t
        return -beta / 2, beta

    @property
    def _vp(self) -> VPLinear:
        return VPLinear(self.beta_min, self.beta_max)

    def _alpha(self, t: Tensor) -> Tensor:
        return self._vp._alpha(t) if self.base == "vp" else torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self._vp._sigma(t) if self.base == "vp" else self.sigma_max * t

    def _lam(self, t: Tensor) -> Tensor:
        return self._vp._lam(t) if self.base == "vp" else -torch.log(self.sigma_max * t)

    def _time(self, lam: Tensor) -> Tensor:
        return self._vp._time(lam) if self.base == "vp" else torch.exp(-lam) / self.sigma_max


@dataclass(frozen=True)
class BridgeEDM(Prediction):
    """EDM's preconditioning for a pinned diffusion: input and target of unit variance at every time.

    With s_0^2, s_1^2 the variances of x_0 and of the source, k their covariance, and (a, b, c) of `DDBM`,

        A = a^2 s_1^2 + b^2 s_0^2 + 2 a b k + c^2,    c_in = A^(-1/2),    c_skip = (b s_0^2 + a k) / A,
        c_out^2 = (a^2 (s_0^2 s_1^2 - k^2) + s_0^2 c^2) / A

    Args:
        std: s_0, of the clean images, > 0.
        source_std: s_1, of the sources, > 0.
        covariance: k, with |k| < s_0 s_1.
        alpha_end, sigma_end: the coefficients of the base diffusion at t = 1.

    Raises:
        BadInput: for values out of range.

    References:
        Zhou, Lou, Khanna, Ermon 2023, arXiv:2309.16948, section 4.1.
    """

    name: ClassVar[str] = "bridge_edm"
    std: float = 0.5
    source_std: float = 0.5
    covariance: float = 0.125
    alpha_end: float = 1.0
    sigma_end: float = 80.0

    def __post_init__(self) -> None:
        if not min(self.std, self.source_std, self.alpha_end, self.sigma_end) > 0:
            raise BadInput(f"bridge_edm needs positive standard deviations and end coefficients, found {self}")
        if not abs(self.covariance) < self.std * self.source_std:
            raise BadInput(
                f"bridge_edm needs |covariance| < std source_std = {self.std * self.source_std:g}, found "
                f"{self.covariance:g}"
            )

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r = ((sigma / alpha) * (self.alpha_end / self.sigma_end)) ** 2
        left = (1 - r).clamp(min=0)
        a, b, c2 = r * alpha / self.alpha_end, alpha * left, sigma**2 * left
        v0, v1, k = self.std**2, self.source_std**2, self.covariance
        A = a**2 * v1 + b**2 * v0 + 2 * a * b * k + c2
        spread = a**2 * (v0 * v1 - k**2) + v0 * c2
        positive = spread > 0  # the gradient of a root at 0 is infinite
        c_out = torch.where(positive, torch.sqrt(torch.where(positive, spread, 1.0) / A), 0.0)
        return A**-0.5, (b * v0 + a * k) / A, c_out

    def _target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        _, c_skip, c_out = self.coefficients(alpha, sigma)
        return (x0 - c_skip * (alpha * x0 + sigma * eps)) / c_out
