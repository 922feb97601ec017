"""Guidance that keeps the contrast of the conditional model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ..errors import BadInput, check_numbers
from .interval import refined

__all__ = ["Rescale"]


@dataclass(frozen=True)
class Rescale:
    """`o' = amount o std(o_cond) / std(o) + (1 - amount) o` for what the network predicts, o, under guidance.

    Standard deviations are per sample, over everything but the batch. Guidance raises them with its scale; 1 takes all
    of that back. Costs nothing.

    Args:
        amount: in [0, 1]; the paper takes .7 with guidance scale 7.5.

    Raises BadInput from `wrap` where nothing guides.

    Reference: Lin, Liu, Li, Yang 2023, arXiv:2305.08891.
    """

    amount: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.amount <= 1:
            raise BadInput(f"rescale needs amount in [0, 1], found {self.amount:g}")
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The same denoiser, with its guidance rescaled."""
        return refined(denoiser, "rescale tames", lambda cfg: replace(cfg, rescale=self.amount))
