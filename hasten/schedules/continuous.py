"""Noise schedules: how much of the image and how much noise `x_t = alpha(t) x + sigma(t) eps` holds at time t.

Time runs from t = 0 (data) to t = 1 (noise) in every family, whatever the paper's own clock is, and every family
ends *exactly* clean: `alpha(0) = 1`, `sigma(0) = 0`. Where a family ends at pure noise (Flow, the cosine, a
zero-terminal-SNR table) `alpha(1)` is exactly 0. `lam = log(alpha / sigma)` is strictly decreasing in t and is
`+inf`, `-inf` at those ends, never NaN.

Times and coefficients are float64 tensors of any shape (floats are accepted) and carry gradients, so that times
can be optimised; the two ends are constants: their gradient is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BadInput, plain_numbers
from .base import Schedule, _vp_log_alpha

if TYPE_CHECKING:
    from .discrete import Discrete, rescale_zero_snr

__all__ = [
    "EDM", "VE", "Discrete", "Flow", "Schedule", "SubVP", "VPCosine", "VPLinear", "rescale_zero_snr",
]  # fmt: skip


@dataclass(frozen=True)
class VPLinear(Schedule):
    """`log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2`, `sigma^2 = 1 - alpha^2`.

    The continuous form of DDPM's linear betas; a network trained on the 1000-entry table needs `Discrete.linear()`,
    which differs by 3 % in log alpha at the noisy end.

    Args:
        beta_min, beta_max: 0 <= beta_min <= beta_max.

    References:
        Song et al. 2021, arXiv:2011.13456.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        _require(0 <= self.beta_min <= self.beta_max and self.beta_max > 0, "0 <= beta_min <= beta_max", self)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(_linear_log_alpha(self.beta_min, self.beta_max, t))

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * _linear_log_alpha(self.beta_min, self.beta_max, t)))

    def _lam(self, t: Tensor) -> Tensor:
        log_alpha = _linear_log_alpha(self.beta_min, self.beta_max, t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    def _time(self, lam: Tensor) -> Tensor:
        return _linear_time(self.beta_min, self.beta_max, _vp_log_alpha(lam))


@dataclass(frozen=True)
class SubVP(Schedule):
    """The alpha of `VPLinear` with `sigma = 1 - alpha^2`: less noise at intermediate times than a variance-preserving
    path.

    Args:
        beta_min, beta_max: 0 <= beta_min <= beta_max.

    References:
        Song et al. 2021, arXiv:2011.13456.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        _require(0 <= self.beta_min <= self.beta_max and self.beta_max > 0, "0 <= beta_min <= beta_max", self)

    @property
    def t_min(self) -> float:
        return 2e-2  # q = .006: sigma is smaller here than that of VPLinear at the same time

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(_linear_log_alpha(self.beta_min, self.beta_max, t))

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * _linear_log_alpha(self.beta_min, self.beta_max, t))

    def _time(self, lam: Tensor) -> Tensor:
        # sigma / alpha = 1 / alpha - alpha = 2 sinh(-log alpha)
        return _linear_time(self.beta_min, self.beta_max, -torch.asinh(0.5 * torch.exp(-lam)))


@dataclass(frozen=True)
class VPCosine(Schedule):
    """`alpha = cos(u) / cos(u_0)`, `u = (t + offset) / (1 + offset) pi / 2`, `sigma^2 = 1 - alpha^2`; alpha(1) = 0.

    `offset = 0` is `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`. With the usual offset .008, sampling starts at
    `t_max = .9946` (q = 118), where an eps-prediction network is still defined; with offset 0 it starts at t = 1.
    Nichol, Dhariwal 2021, arXiv:2102.09672.
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        plain_numbers(self)
        _require(0 <= self.offset < 1, "0 <= offset < 1", self)

    @property
    def t_min(self) -> float:
        return 1e-3 if self.offset > 0 else 5e-3

    @property
    def t_max(self) -> float:
        return 0.9946 if self.offset > 0 else 1.0

    @property
    def zero_snr(self) -> bool:
        return True

    @property
    def _u0(self) -> float:
        return self.offset / (1 + self.offset) * math.pi / 2

    def _alpha(self, t: Tensor) -> Tensor:
        # cos(u) as the sine of what is left to pi/2: no cancellation near t = 1
        return torch.sin((1 - t) * (math.pi / 2 / (1 + self.offset))) / math.cos(self._u0)

    def _sigma(self, t: Tensor) -> Tensor:
        # 1 - cos^2 u / cos^2 u_0 = sin(u - u_0) sin(u + u_0) / cos^2 u_0: no cancellation near t = 0
        du = t * (math.pi / 2 / (1 + self.offset))
        return torch.sqrt(torch.sin(du) * torch.sin(du + 2 * self._u0)) / math.cos(self._u0)

    def _time(self, lam: Tensor) -> Tensor:
        cos0, sin0 = math.cos(self._u0), math.sin(self._u0)
        alpha, sigma2 = torch.exp(_vp_log_alpha(lam)), torch.sigmoid(-2 * lam)
        u = torch.atan2(torch.sqrt(sin0**2 + cos0**2 * sigma2), alpha * cos0)
        return (u - self._u0) * (2 / math.pi * (1 + self.offset))


@dataclass(frozen=True)
class VE(Schedule):
    """`alpha = 1`, `sigma = sigma_min (sigma_max / sigma_min)^u`, u from 0 at `t_min = .001` to 1 at t = 1.

    Below `t_min` sigma falls linearly to 0, so that a sampler can end clean.

    Args:
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.

    References:
        Song et al. 2021, arXiv:2011.13456.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        _require(0 < self.sigma_min < self.sigma_max, "0 < sigma_min < sigma_max", self)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        u = (t - self.t_min).clamp(min=0) / (1 - self.t_min)
        above = self.sigma_min * torch.exp(u * math.log(self.sigma_max / self.sigma_min))
        return torch.where(t < self.t_min, t * (self.sigma_min / self.t_min), above)

    def _time(self, lam: Tensor) -> Tensor:
        sigma = torch.exp(-lam)
        u = (-lam - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        below = sigma * (self.t_min / self.sigma_min)
        return torch.where(sigma < self.sigma_min, below, self.t_min + u * (1 - self.t_min))


@dataclass(frozen=True)
class EDM(Schedule):
    """`alpha = 1`, `sigma = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho`, u as in `VE`.

    Uniform times are then the nodes of the paper; below `t_min = .001` sigma falls linearly to 0.

    Args:
        sigma_min, sigma_max: 0 < sigma_min < sigma_max.
        rho: exponent, > 0.

    References:
        Karras, Aittala, Aila, Laine 2022, arXiv:2206.00364.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        _require(0 < self.sigma_min < self.sigma_max and self.rho > 0, "0 < sigma_min < sigma_max, rho > 0", self)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        u = (t - self.t_min).clamp(min=0) / (1 - self.t_min)
        return torch.where(t < self.t_min, t * (self.sigma_min / self.t_min), (low + u * (high - low)) ** self.rho)

    def _time(self, lam: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        u = (torch.exp(-lam / self.rho) - low) / (high - low)
        below = torch.exp(-lam) * (self.t_min / self.sigma_min)
        return torch.where(-lam < math.log(self.sigma_min), below, self.t_min + u * (1 - self.t_min))


@dataclass(frozen=True)
class Flow(Schedule):
    """`alpha = 1 - t'`, `sigma = t'`, `t' = shift t / (1 + (shift - 1) t)`: the straight path of rectified flow.

    Args:
        shift: multiplies q, > 0 (3 for large images).

    References:
        Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        _require(self.shift > 0, "shift > 0", self)

    @property
    def t_min(self) -> float:
        return 5e-3

    @property
    def zero_snr(self) -> bool:
        return True

    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _lam(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(self.shift * t)

    def _time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam - math.log(self.shift))


def _require(holds: bool, rule: str, found: Schedule) -> None:
    """Raise BadInput unless a rule on the fields of a schedule holds."""
    if not holds:
        raise BadInput(f"{type(found).__name__} needs {rule}, found {found}")


def _linear_log_alpha(b0: float, b1: float, t: Tensor) -> Tensor:
    """log alpha of linear betas."""
    return -t * (0.25 * (b1 - b0) * t + 0.5 * b0)


def _linear_time(b0: float, b1: float, log_alpha: Tensor) -> Tensor:
    """The positive root of the quadratic above, in the form that does not cancel."""
    return -4 * log_alpha / (b0 + torch.sqrt(b0**2 - 4 * (b1 - b0) * log_alpha))
