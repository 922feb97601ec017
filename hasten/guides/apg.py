"""Guidance without its component along the conditional prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_numbers
from ._base import Guide
from .cfg import GuidedDenoiser, Remixed
from .interval import replaced

__all__ = ["APG"]


@dataclass(frozen=True)
class APG(Guide):
    """Adaptive projected guidance: of the difference of both branches, mostly the part that is orthogonal to c.

        d = c - u + momentum d_before,   d <- d min(1, norm / |d|),   x0 = c + (scale - 1) (d_orth + eta d_par)

    with d_par the component of d along c, per sample and in x0. High scales then saturate colours less. With eta = 1
    and nothing else it is classifier-free guidance, whose scale it takes.

    Args:
        eta: weight of the parallel part, in [0, 1].
        momentum: weight of the differences of earlier evaluations; the paper uses negative ones, -.5 or -.75.
        norm: the largest norm of a sample's difference, which depends on the number of its entries (the paper: 2.5 to
            15); None: not limited.

    References:
        Sadat, Hilliges, Weber 2024, arXiv:2410.02416.
    """

    eta: float = 0.0
    momentum: float = 0.0
    norm: float | None = None
    negative: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise BadInput(f"apg needs eta in [0, 1], found {self.eta:g}")
        if not -1 < self.momentum < 1:
            raise BadInput(f"apg needs momentum between -1 and 1, found {self.momentum:g}")
        if self.norm is not None and not self.norm > 0:
            raise BadInput(f"apg needs norm > 0, found {self.norm:g}")
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The same denoiser, with its guidance projected.

        Raises:
            BadInput: for a denoiser without classifier-free guidance.
        """
        return replaced(denoiser, "apg projects", lambda guided: Projected(guided, self))


class Projected(Remixed):
    """A denoiser under `CFG` and `APG`."""

    def __init__(self, guided: GuidedDenoiser, projection: APG) -> None:
        super().__init__(guided)
        self.projection = projection
        self.before: Tensor | None = None

    def reset(self) -> None:
        """Forget the differences of the last trajectory."""
        self.before = None

    def _mixed(self, x0_cond: Tensor, x0_uncond: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """x0 under projected guidance."""
        difference, p = x0_cond - x0_uncond, self.projection
        if p.momentum:
            if self.before is not None and self.before.shape != difference.shape:
                raise BadInput("apg with momentum needs a sampler that evaluates the whole batch, one state at a time")
            difference = difference if self.before is None else difference + p.momentum * self.before
            self.before = difference
        d, c = (value.flatten(1).to(torch.promote_types(value.dtype, torch.float32)) for value in (difference, x0_cond))
        if p.norm is not None:
            d = d * (p.norm / d.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp(max=1.0)
        along = (d * c).sum(1, keepdim=True) / c.square().sum(1, keepdim=True).clamp_min(1e-30) * c
        update = (d - (1 - p.eta) * along).reshape(x0_cond.shape).to(x0_cond.dtype)
        return x0_cond + (self.guide.scale - 1) * update
