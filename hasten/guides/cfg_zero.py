"""Guidance with the unconditional branch scaled to the conditional one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_int, check_numbers
from ..predictions import spread
from ._base import Guide
from .cfg import GuidedDenoiser, Remixed
from .interval import replaced

__all__ = ["CFGZero"]


@dataclass(frozen=True)
class CFGZero(Guide):
    """CFG-Zero*: `v = s v_uncond + scale (v_cond - s v_uncond)` with `s = <v_cond, v_uncond> / |v_uncond|^2`.

    v = eps - x0 is the velocity of rectified flow, whatever the network predicts; s is per sample. In its first
    `zero_steps` evaluations v is 0: the network's velocity from pure noise is worse than none while it is undertrained.

    Args:
        zero_steps: at least 0; for schedules with alpha + sigma = 1 only. The paper uses 4 % of the steps.

    References:
        Fan, Zheng, Yeh, Liu 2025, arXiv:2503.18886.
    """

    zero_steps: int = 0

    def __post_init__(self) -> None:
        check_int("cfg_zero: zero_steps", self.zero_steps, 0)
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The same denoiser, with the scaled guidance.

        Raises:
            BadInput: for a denoiser without classifier-free guidance, and for zero steps on a schedule that is not one
                of rectified flow.
        """
        if self.zero_steps:
            t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
            schedule = getattr(denoiser, "schedule", None)
            if schedule is None or not torch.allclose(schedule.alpha(t) + schedule.sigma(t), torch.ones_like(t)):
                raise BadInput("cfg_zero: zero_steps are for rectified flow, alpha + sigma = 1: leave them out here")
        return replaced(denoiser, "cfg_zero scales the branches of", lambda guided: Scaled(guided, self))


class Scaled(Remixed):
    """A denoiser under `CFG` and `CFGZero`."""

    def __init__(self, guided: GuidedDenoiser, zero: CFGZero) -> None:
        super().__init__(guided)
        self.zero, self.done = zero, 0

    def reset(self) -> None:
        """Begin a new trajectory."""
        self.done = 0

    def _mixed(self, x0_cond: Tensor, x0_uncond: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x0 under the scaled guidance; at sigma = 0, where a velocity says nothing about x0, the conditional one."""
        alpha, sigma = (
            spread(value, x_t) for value in (self.denoiser.schedule.alpha(t), self.denoiser.schedule.sigma(t))
        )
        self.done += 1
        if self.done <= self.zero.zero_steps:
            return (x_t / (alpha + sigma)).to(x0_cond.dtype)
        if sigma.ndim == 0 and not bool(sigma > 0):
            return x0_cond
        safe = sigma if sigma.ndim == 0 else torch.where(sigma > 0, sigma, torch.ones_like(sigma))
        v_cond, v_uncond = ((x_t - (alpha + sigma) * x0) / safe for x0 in (x0_cond, x0_uncond))
        c, u = (v.flatten(1).to(torch.promote_types(v.dtype, torch.float32)) for v in (v_cond, v_uncond))
        ratio = (c * u).sum(1) / u.square().sum(1).clamp_min(1e-30)
        scaled = ratio.to(v_uncond.dtype).reshape(-1, *[1] * (x_t.ndim - 1)) * v_uncond
        velocity = scaled + self.guide.scale * (v_cond - scaled)
        x0 = (x_t - sigma * velocity) / (alpha + sigma)
        return x0 if sigma.ndim == 0 else torch.where(sigma > 0, x0, x0_cond)
