"""Clean samples clipped to the range of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_numbers
from ._base import Guide

__all__ = ["DynamicThreshold"]

MAX_NUMEL = 2**24  # limit of torch.quantile


@dataclass(frozen=True)
class DynamicThreshold(Guide):
    """`x0 <- clip(x0, -S, S) least / S` with `S = max(quantile(|x0|, quantile), least)`, per sample.

    Strong guidance drives many pixels out of the range of the data. Clipping them at the range saturates them; this
    clips at a quantile and scales the sample back into the range. For pixels only: latents have no range. A sample
    whose quantile is in the range is clipped at it and not scaled.

    Args:
        quantile: of the absolute values of one sample, in (0, 1].
        least: the range of the data, > 0; 1 for images in [-1, 1].

    References:
        Saharia et al. 2022 (Imagen), arXiv:2205.11487, section 2.3.
    """

    quantile: float = 0.995
    least: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise BadInput(f"dynamic_threshold needs quantile in (0, 1], found {self.quantile:g}")
        if not self.least > 0:
            raise BadInput(f"dynamic_threshold needs least > 0, found {self.least:g}")
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The denoiser with every x0 thresholded."""
        return Thresholded(denoiser, self)


class Thresholded(Wrapper):
    """A denoiser under `DynamicThreshold`."""

    def __init__(self, denoiser: nn.Module, guide: DynamicThreshold) -> None:
        super().__init__(denoiser)
        self.guide = guide

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S), thresholded."""
        return self._clipped(self.denoiser(x_t, t, **cond))

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The inner denoiser's middle features; x0 from `finish` is thresholded."""
        middle, finish = self.denoiser.features(x_t, t, **cond)
        return middle, lambda changed: self._clipped(finish(changed))

    def _clipped(self, x0: Tensor) -> Tensor:
        """x0 (B, *S), thresholded."""
        size = x0.flatten(1).abs()
        if size.dtype not in (torch.float32, torch.float64):
            size = size.float()
        S = quantile(size, self.guide.quantile).clamp_min(self.guide.least).to(x0.dtype)
        S = S.reshape(-1, *[1] * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, S), -S) * (self.guide.least / S)


def quantile(size: Tensor, fraction: float) -> Tensor:
    """The quantile of each row, interpolated linearly; also beyond the size that `torch.quantile` accepts.

    Args:
        size: (B, n).
        fraction: in [0, 1].

    Returns:
        (B,).
    """
    n = size.shape[1]
    if n <= MAX_NUMEL:
        return torch.quantile(size, fraction, dim=1)
    position = fraction * (n - 1)
    k = min(int(position), n - 2)
    low = torch.kthvalue(size, k + 1, dim=1).values
    high = torch.kthvalue(size, k + 2, dim=1).values
    return torch.lerp(low, high, position - k)
