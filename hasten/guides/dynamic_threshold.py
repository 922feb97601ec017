"""Clean samples kept within the range of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_numbers

__all__ = ["DynamicThreshold"]

LARGEST = 2**24  # values that torch.quantile takes


@dataclass(frozen=True)
class DynamicThreshold:
    """`x0 <- clip(x0, -S, S) least / S` with `S = max(quantile(|x0|, quantile), least)`, per sample.

    Strong guidance drives many pixels out of the range of the data. Clipping them at the range saturates them; this
    clips at what all but a few reach and scales the sample back into the range. For pixels only: a latent code has no
    range. A sample whose quantile lies in the range is clipped at it and not scaled.

    Args:
        quantile: of the absolute values of one sample, in (0, 1].
        least: the range of the data, > 0; 1 for images in [-1, 1].

    Reference: Saharia et al. 2022 (Imagen), arXiv:2205.11487, section 2.3.
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
        """The denoiser whose every answer is thresholded."""
        return Thresholded(denoiser, self)


class Thresholded(Wrapper):
    """A denoiser under `DynamicThreshold`."""

    def __init__(self, denoiser: nn.Module, guide: DynamicThreshold) -> None:
        super().__init__(denoiser)
        self.guide = guide

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        return self._clipped(self.denoiser(x_t, t, **cond))

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The inner denoiser's middle features; what `finish` makes of them is thresholded."""
        middle, finish = self.denoiser.features(x_t, t, **cond)  # type: ignore[operator]
        return middle, lambda changed: self._clipped(finish(changed))

    def _clipped(self, x0: Tensor) -> Tensor:
        size = x0.flatten(1).abs()
        if size.dtype not in (torch.float32, torch.float64):
            size = size.float()
        S = quantile(size, self.guide.quantile).clamp_min(self.guide.least).to(x0.dtype)
        S = S.reshape(-1, *[1] * (x0.ndim - 1))
        return torch.maximum(torch.minimum(x0, S), -S) * (self.guide.least / S)


def quantile(size: Tensor, share: float) -> Tensor:
    """The quantile of each row (B,) of `size` (B, n), between the two nearest values; also where n is beyond what
    `torch.quantile` takes."""
    n = size.shape[1]
    if n <= LARGEST:
        return torch.quantile(size, share, dim=1)
    place = share * (n - 1)
    k = min(int(place), n - 2)
    low = torch.kthvalue(size, k + 1, dim=1).values
    high = torch.kthvalue(size, k + 2, dim=1).values
    return torch.lerp(low, high, place - k)
