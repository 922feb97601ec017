"""Guidance with the contrast of the conditional model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..errors import BadInput, check_numbers
from ._base import Guide
from .interval import refined

__all__ = ["Rescale"]


@dataclass(frozen=True)
class Rescale(Guide):
    """`o' = amount o std(o_cond) / std(o) + (1 - amount) o` for the network's own output o under guidance.

    Standard deviations are per sample, over all axes but the batch. Guidance raises them with its scale; amount 1
    reverts that entirely. Negligible cost.

    Args:
        amount: in [0, 1]; the paper uses .7 with guidance scale 7.5.

    References:
        Lin, Liu, Li, Yang 2023, arXiv:2305.08891.
    """

    amount: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise BadInput(f"rescale needs amount in [0, 1], found {self.amount:g}")
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The same denoiser, with its guidance rescaled.

        Raises:
            BadInput: for a denoiser without classifier-free guidance.
        """
        return refined(denoiser, "rescale tames", lambda cfg: replace(cfg, rescale=self.amount))
