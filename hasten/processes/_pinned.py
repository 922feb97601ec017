"""A diffusion that is pinned to an image at t = 1: the common part of the bridges."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BadInput
from ..schedules.base import Schedule
from ._base import Process, coefficient

__all__ = ["PinnedDiffusion", "bridge_coefficients", "posterior_variance"]


def bridge_coefficients(schedule: Schedule, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """The diffusion `z_t = alpha x_0 + sigma eps`, given that it ends at `z_1 = y`: `z_t ~ N(a y + b x_0, c^2)`.

        r = SNR_1 / SNR_t,   a = r alpha_t / alpha_1,   b = alpha_t (1 - r),   c^2 = sigma_t^2 (1 - r)

    Args:
        schedule: with alpha(1) > 0.
        t: times of any shape, in [0, 1].

    Returns:
        (a, b, c), float64, each of the shape of `t`.
    """
    t = torch.as_tensor(t, dtype=torch.float64)
    alpha, sigma, end = schedule.alpha(t), schedule.sigma(t), torch.ones((), dtype=torch.float64)
    left = -torch.expm1(2 * (schedule.lam(end) - schedule.lam(t)))  # 1 - r, without cancellation near t = 1
    left = torch.where(t >= 1, 0.0, torch.where(t <= 0, 1.0, left))
    return (1 - left) * alpha / schedule.alpha(end), alpha * left, sigma * _root(left)


def posterior_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """The variance of `z_s` given `z_t` and `x_0`, `sigma_s^2 (1 - SNR_t / SNR_s)`, for s < t: that of the bridge too.

    The bridge is a Markov process, so that given x_0 and z_t its far end adds nothing.
    """
    variance = -(schedule.sigma(s) ** 2) * torch.expm1(2 * (schedule.lam(t) - schedule.lam(s)))
    return torch.where(s <= 0, 0.0, variance)


def _root(value: Tensor) -> Tensor:
    """The square root, whose gradient at 0 is 0."""
    positive = value > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, value, 1.0)), 0.0)


class PinnedDiffusion(Process):
    """A bridge `q(z_t | x_0, y) = N(a_t y + b_t x_0, c_t^2)` of a diffusion (alpha, sigma), see `bridge_coefficients`.

    The denoiser estimates the clean x_0.
    """

    bridge: ClassVar[bool] = True

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c), float64, each of the shape of `t`."""
        return bridge_coefficients(self, t)

    def corrupt(self, x: Tensor, t: Tensor, eps: Tensor, source: Tensor | None = None) -> Tensor:
        a, b, c = (coefficient(value, x) for value in self.coefficients(t))
        return a * self._far_end(source) + b * x + c * eps

    def begin(self, noise: Tensor, t: Tensor | float, source: Tensor | None = None) -> Tensor:
        source = self._far_end(source)
        if float(t) != 1:
            raise BadInput(
                f"{type(self).__name__} begins at t = 1, where the state is the source image, found t = {float(t):g}"
            )
        return source.to(noise.dtype)

    def _far_end(self, source: Tensor | None) -> Tensor:
        """The source. Raises BadInput where there is none."""
        if source is None:
            raise BadInput(f"{type(self).__name__} is a bridge: its far end, the source images, are missing")
        return source
