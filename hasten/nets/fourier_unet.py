"""A U-Net that reads Fourier features of its input: fine detail, for likelihoods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .unet import UNet

__all__ = ["FourierUNet"]


class FourierUNet(nn.Module):
    """A `UNet` of `[x, sin(2^n pi x), cos(2^n pi x)]`, whose output is added to x where `residual`.

    Args:
        channels: of the image.
        exponents: n of the features; none leaves them out.
        residual: add x to the output, which at high noise is about eps.
        options: further arguments of `UNet`.

    References:
        Kingma, Salimans, Poole, Ho 2021, arXiv:2107.00630, appendix C.
    """

    def __init__(
        self, channels: int = 3, exponents: Sequence[int] = (7, 8), residual: bool = True, **options: Any
    ) -> None:
        super().__init__()
        options.pop("out_channels", None)
        self.exponents, self.residual = tuple(int(n) for n in exponents), residual
        self.unet = UNet(channels * (1 + 2 * len(self.exponents)), out_channels=channels, **options)
        self.config = {
            **self.unet.config, "channels": channels, "exponents": list(self.exponents), "residual": residual,
        }  # fmt: skip
        del self.config["out_channels"]
        self.classes, self.null_label, self.multiple = self.unet.classes, self.unet.null_label, self.unet.multiple
        self.guidance_range, self.step_counts = self.unet.guidance_range, self.unet.step_counts

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Raw output (B, C, H, W); arguments as for `UNet`."""
        angles = [x.float() * (2.0**n * math.pi) for n in self.exponents]  # half precision would lose the phase
        waves = [f(angle).to(x.dtype) for angle in angles for f in (torch.sin, torch.cos)]
        out: Tensor = self.unet(torch.cat([x, *waves], 1), time, label, **inputs)
        return x + out if self.residual else out
