"""Rectified flow and stochastic interpolants between two sets of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_choice
from ..schedules.base import _float64
from ._base import Process, coefficient

__all__ = ["Interpolant"]

CURVES = ("none", "brownian", "quadratic", "sine")


@dataclass(frozen=True)
class Interpolant(Process):
    """Straight lines between images x (t = 0) and sources y (t = 1), with noise between where `noise` > 0:

        z_t = (1 - t) x + t y + gamma(t) xi,    gamma(0) = gamma(1) = 0

    Without noise it is rectified flow. The network learns the velocity `b = E[y - x + gamma' xi | z_t]`, whose equation
    `dz = b dt` from t = 1 to 0 takes the sources to the images. What the denoiser returns is `z_t - t b`, where the
    straight line along the velocity meets t = 0: without noise the estimate of x. For its prediction alpha = 1 - t and
    sigma = t, so that the usual one is "flow". With `diffusion` > 0 the network learns, in place of b, the drift
    `b - diffusion score = b + diffusion E[xi | z_t] / gamma` of the stochastic equation with the noise
    `sqrt(2 diffusion) dw`, which has the same marginals.

    Args:
        curve: of gamma: "none" (rectified flow), "brownian" `sqrt(t (1 - t))`, "quadratic" `t (1 - t)` or "sine"
            `sin(pi t)^2`, each times `noise`.
        noise: the factor of gamma, > 0 unless the curve is "none".
        diffusion: the diffusion coefficient of the stochastic sampler, >= 0; 0: the ordinary differential equation.

    Raises:
        BadInput: for an unknown curve, or values out of range.

    References:
        Liu, Gong, Liu 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747; Albergo, Boffi, Vanden-Eijnden
        2023, arXiv:2303.08797.
    """

    curve: str = "none"
    noise: float = 1.0
    diffusion: float = 0.0
    sampler: ClassVar[str] = "interpolant"
    bridge: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("curve", self.curve, CURVES)
        if not 0 < self.noise < math.inf or not 0 <= self.diffusion < math.inf:
            raise BadInput(f"Interpolant needs noise > 0 and diffusion >= 0, found {self.noise} and {self.diffusion}")
        if self.diffusion and self.curve == "none":
            raise BadInput(
                f"diffusion={self.diffusion:g} needs noise between the ends: a curve such as brownian, found none"
            )

    @property
    def zero_snr(self) -> bool:
        return True

    @property
    def t_max(self) -> float:
        return 1.0

    def gamma(self, t: Tensor | float) -> Tensor:
        """gamma(t), float64, of the shape of `t`."""
        t = _float64(t)
        if self.curve == "brownian":
            return self.noise * torch.sqrt((t * (1 - t)).clamp(min=0))
        if self.curve == "quadratic":
            return self.noise * t * (1 - t)
        return self.noise * torch.sin(math.pi * t) ** 2 if self.curve == "sine" else torch.zeros_like(t)

    def gamma_rate(self, t: Tensor | float) -> Tensor:
        """The derivative gamma'(t), float64; that of "brownian" is infinite at both ends."""
        t = _float64(t)
        if self.curve == "brownian":
            return self.noise * (1 - 2 * t) / (2 * torch.sqrt(t * (1 - t)))
        if self.curve == "quadratic":
            return self.noise * (1 - 2 * t)
        return self.noise * math.pi * torch.sin(2 * math.pi * t) if self.curve == "sine" else torch.zeros_like(t)

    def velocity(self, x: Tensor, source: Tensor, xi: Tensor, t: Tensor) -> Tensor:
        """The regression target (B, *S): `source - x + (gamma' + diffusion / gamma) xi`.

        Its mean given z_t is b, and with `diffusion` the drift of the stochastic equation that runs from t = 1 to 0,
        since the score is `-E[xi | z_t] / gamma`.

        Args:
            x, source: the ends of the lines (B, *S).
            xi: the noise (B, *S).
            t: times in (0, 1), (B,).
        """
        if self.curve == "none":
            return source - x
        rate = self.gamma_rate(t)
        if self.diffusion:
            rate = rate + self.diffusion / self.gamma(t)
        return source - x + coefficient(rate, x) * xi

    def corrupt(self, x: Tensor, t: Tensor, eps: Tensor, source: Tensor | None = None) -> Tensor:
        source = self._far_end(source)
        t = _float64(t)
        z = coefficient(1 - t, x) * x + coefficient(t, x) * source
        return z if self.curve == "none" else z + coefficient(self.gamma(t), x) * eps

    def begin(self, noise: Tensor, t: Tensor | float, source: Tensor | None = None) -> Tensor:
        source = self._far_end(source)
        if float(t) != 1:
            raise BadInput(f"Interpolant begins at t = 1, where the state is the source, found t = {float(t):g}")
        return source.to(noise.dtype)

    def loss(
        self, denoiser: Any, x: Tensor, t: Tensor, eps: Tensor, cond: dict[str, Any], source: Tensor | None = None
    ) -> Tensor:
        """The squared error of the raw output against the one for which the denoiser returns `z_t - t velocity`, (B,).

        With noise, xi and -xi are both used, which lowers the variance near the ends (Albergo et al. 2023, section 6).
        """
        source = self._far_end(source)
        if self.curve == "brownian":  # gamma' is infinite at the ends
            t = t.clamp(1e-3, 1 - 1e-3)
        signs = (1.0,) if self.curve == "none" else (1.0, -1.0)
        return sum(self._error(denoiser, x, t, sign * eps, cond, source) for sign in signs) / len(signs)

    def _error(self, denoiser: Any, x: Tensor, t: Tensor, xi: Tensor, cond: dict[str, Any], source: Tensor) -> Any:
        """The loss of each sample, (B,), for one draw of the noise."""
        z = self.corrupt(x, t, xi, source)
        velocity = self.velocity(x, source, xi, t)
        times = coefficient(t, x)
        # x0 = z - t v, eps = z + (1 - t) v are the pair whose line has the velocity v and passes z at t
        alpha, sigma = (value.to(x.dtype).to(x.device) for value in (self.alpha(t), self.sigma(t)))
        target = denoiser.prediction.target(z - times * velocity, z + (1 - times) * velocity, alpha, sigma)
        return (denoiser.raw(z, t, **cond).float() - target.float()).square().flatten(1).mean(1)

    def _far_end(self, source: Tensor | None) -> Tensor:
        """The source. Raises BadInput where there is none."""
        if source is None:
            raise BadInput("Interpolant runs between two sets of images, and no source images are given")
        return source

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _lam(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(t)

    def _time(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)
