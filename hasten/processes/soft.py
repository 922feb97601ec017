"""Soft diffusion: any linear corruption with a little noise. Heat dissipation and cold diffusion are its ends."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_choices, plain_numbers
from ._base import coefficient
from ._diagonal import Diagonal, blur_std

__all__ = ["Soft"]

MAX_PRIOR = 64  # coordinates of the blurred data whose covariance is kept


@dataclass(frozen=True)
class Soft(Diagonal):
    """A corruption with a little noise: `z_t = C_t x + sigma_t eps`, C_0 = I.

        "blur":  C_t = V diag(exp(-Lambda s_t^2 / 2)) V^T in the cosine transform V, s_t = blur_max sin(pi t / 2)^2
        "mask":  C_t multiplies the pixel at distance rho from the centre by 1 - (R_t - rho) / edge, in [0, 1]: a hole
                 of radius R_t = t (rho_max + edge) with a soft edge, which has covered the image at t = 1
        sigma_t = noise_min (noise_max / noise_min)^t

    The denoiser returns the estimate of the clean image x. Since `grad log q_t(z) = (C_t E[x | z] - z) / sigma_t^2` for
    any linear C_t, it is trained by soft score matching, `|C_t (x0 - x)|^2 + floor |x0 - x|^2`: what C_t leaves counts.
    The operator is the same for every sample, so that its samplers are linear: masks that differ from sample to sample
    are not offered.

    Two other methods are ends of this one: noise_min = noise_max is inverse heat dissipation, and objective="l1" with
    the sampler `soft:form=cold` is cold diffusion.

    Args:
        shape: of one sample, (..., H, W).
        corruption: "blur" or "mask".
        blur_max: of the blur at t = 1, in pixels, > 0; a third of the side is usual.
        edge: width of the edge of the mask, in pixels, > 0.
        noise_min, noise_max: 0 < noise_min <= noise_max, for images in [-1, 1].
        objective: "soft" or "l1", the mean absolute error of x.
        floor: weight of the error that C_t hides, >= 0: samplers use it as soon as they take a step back.
        prior: mean and Cholesky factor of the blurred data at t = 1, as `fitted` measures them.

    Raises:
        BadInput: for numbers out of range.

    References:
        Daras, Delbracio, Talebi, Dimakis, Milanfar 2022, arXiv:2209.05442; heat dissipation: Rissanen, Heinonen, Solin
        2022, arXiv:2206.13397; cold diffusion: Bansal et al. 2022, arXiv:2208.09392.
    """

    corruption: str = "blur"
    blur_max: float = 10.0
    edge: float = 4.0
    noise_min: float = 0.02
    noise_max: float = 1.0
    objective: str = "soft"
    floor: float = 0.01
    prior: tuple[float, ...] = field(default=(), repr=False)
    sampler: ClassVar[str] = "soft"

    def __post_init__(self) -> None:
        super().__post_init__()
        plain_numbers(self)
        check_choices(self, corruption=("blur", "mask"), objective=("soft", "l1"))
        if not (self.blur_max > 0 and self.edge > 0 and 0 < self.noise_min <= self.noise_max and self.floor >= 0):
            raise BadInput(
                "Soft needs blur_max > 0, edge > 0, 0 < noise_min <= noise_max and floor >= 0, found "
                f"blur_max={self.blur_max:g}, edge={self.edge:g}, noise {self.noise_min:g}..{self.noise_max:g}, "
                f"floor={self.floor:g}"
            )
        if self._kept * (self._kept + 3) // 2 != len(self.prior):
            raise BadInput(f"Soft: prior holds a mean and a triangular factor, found {len(self.prior)} numbers")

    @property
    def kind(self) -> str:
        """The basis in which the corruption is diagonal."""
        return "dct" if self.corruption == "blur" else "identity"

    @cached_property
    def keys(self) -> Tensor:
        """(H, W) float64: of the frequency, or of the distance from the centre."""
        if self.corruption == "blur":
            return super().keys
        H, W = self.shape[-2:]
        with torch.inference_mode(False):
            i, j = torch.arange(H, dtype=torch.float64)[:, None], torch.arange(W, dtype=torch.float64)
            return 1 + (2 * i - H + 1) ** 2 + (2 * j - W + 1) ** 2  # in half pixels: whole numbers

    def factor(self, t: Tensor, keys: Tensor) -> Tensor:
        """c_t of these keys, float64, of the broadcast shape of `t` and `keys`."""
        if self.corruption == "blur":
            return self.dissipation(blur_std(t, self.blur_max), keys)
        H, W = self.shape[-2:]
        radius = t * (0.5 * math.hypot(H - 1, W - 1) + self.edge)
        return (1 - (radius - 0.5 * torch.sqrt(keys - 1)) / self.edge).clamp(0, 1)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.exp(-self._lam(t))

    def _lam(self, t: Tensor) -> Tensor:
        return -math.log(self.noise_min) - math.log(self.noise_max / self.noise_min) * t

    def _time(self, lam: Tensor) -> Tensor:
        if self.noise_min == self.noise_max:
            raise BadInput(
                "the noise of this process is the same at all times, so it has no grid in lambda: use uniform"
            )
        return ((-lam - math.log(self.noise_min)) / math.log(self.noise_max / self.noise_min)).clamp(0, 1)

    def corrupt(self, x: Tensor, t: Tensor, eps: Tensor, source: Tensor | None = None) -> Tensor:
        """z_t (B, *S) of clean samples `x` (B, *S) at times `t` (B,) with noise `eps` (B, *S)."""
        return self.apply(x, t) + coefficient(self.sigma(t), eps) * eps

    def begin(self, noise: Tensor, t: Tensor | float, source: Tensor | None = None) -> Tensor:
        """The state at the first time: what the corruption leaves of the data there, as a Gaussian, and its noise.

        Without a fitted `prior` the data are taken for standard normal ones.

        Raises:
            BadInput: with a prior, which is that of t = 1, for another time.
        """
        at, u = torch.as_tensor(t, dtype=torch.float64), self.to(noise)
        if not self.prior:
            std = torch.hypot(self.factor(at, self.keys), self.sigma(at))
            return self.back(u * std.to(u.dtype).to(u.device))
        if float(t) != 1:
            raise BadInput(f"the prior of this process is that of t = 1: begin there, not at t = {float(t):g}")
        K = self._kept
        mean, index = torch.tensor(self.prior[:K], dtype=torch.float64), self._lowest(K).to(u.device)
        rows, columns = torch.tril_indices(K, K)
        L = torch.zeros(K, K, dtype=torch.float64).index_put(
            (rows, columns), torch.tensor(self.prior[K:], dtype=torch.float64)
        )
        low, flat = u.flatten(1)[:, index], u.flatten(1) * float(self.sigma(at))
        flat[:, index] = mean.to(u.dtype).to(u.device) + low @ L.T.to(u.dtype).to(u.device)
        return self.back(flat.reshape(u.shape))

    def loss(
        self, denoiser: Any, x: Tensor, t: Tensor, eps: Tensor, cond: dict[str, Any], source: Tensor | None = None
    ) -> Tensor:
        """The error (B,) of the estimate of x: soft score matching, or its absolute value."""
        error = (denoiser(self.corrupt(x, t, eps), t, **cond) - x).float()
        if self.objective == "l1":
            return error.abs().flatten(1).mean(1)
        weight = self.at(t, error) ** 2 + self.floor
        return (weight * self.to(error).square()).flatten(1).mean(1)

    def fitted(self, images: Tensor) -> Soft:
        """This process with the prior of these images: the Gaussian of their blurred versions.

        The mean and covariance of the coordinates that the blur at t = 1 leaves above the noise are kept, 64 at most.

        Args:
            images: (n, *S), at least 2; some thousands are enough.
        """
        end = torch.ones((), dtype=torch.float64)
        left, sigma = self.factor(end, self.keys).expand(self.shape).flatten(), float(self.sigma(end))
        u = self.to(images.double().cpu()).flatten(1) * left
        seen = int((u.square().mean(0).sqrt() > 0.5 * sigma).sum())
        index = self._lowest(min(seen, MAX_PRIOR))
        if not len(index):
            return replace(self, prior=())
        u = u[:, index]
        centred = u - u.mean(0)
        covariance = centred.T @ centred / (len(u) - 1) + sigma**2 * torch.eye(len(index), dtype=torch.float64)
        rows, columns = torch.tril_indices(len(index), len(index))
        numbers = torch.cat([u.mean(0), torch.linalg.cholesky(covariance)[rows, columns]])
        return replace(self, prior=tuple(numbers.tolist()))

    @property
    def _kept(self) -> int:
        """K, the number of coordinates of the prior: K + K (K + 1) / 2 numbers."""
        return (math.isqrt(9 + 8 * len(self.prior)) - 3) // 2

    def _lowest(self, count: int) -> Tensor:
        """The coordinates, in the flattened sample, that the corruption at t = 1 leaves most of."""
        left = self.factor(torch.ones((), dtype=torch.float64), self.keys).expand(self.shape).flatten()
        return torch.argsort(left, descending=True, stable=True)[:count]
