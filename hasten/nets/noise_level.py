"""A small network that estimates the noise level of an image from the image alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NoiseLevelNet(nn.Module):
    """`abar^ = P(z)` in (0, 1) of `z = sqrt(abar) x + sqrt(1 - abar) e`: `(B, C, H, W) -> (B,)` float32.

    Four 3x3 convolutions with SiLU, the last three of stride 2, without normalisation, which would remove the scale
    that is to be estimated. The mean and the log mean square over the pixels of each convolution's output are the input
    of two linear layers and a sigmoid. 80,000 weights at `width` 16.

    Args:
        channels: C.
        width: channels of the first convolution; the others have 2, 3 and 3 times as many.
    """

    def __init__(self, channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.config = {"channels": channels, "width": width}
        widths = [channels, width, 2 * width, 3 * width, 3 * width]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=1 if k == 0 else 2, padding=1)
            for k, (before, after) in enumerate(zip(widths, widths[1:]))
        )
        self.head = nn.Sequential(nn.Linear(2 * sum(widths[1:]), 128), nn.SiLU(), nn.Linear(128, 1))

    def logit(self, z: Tensor) -> Tensor:
        """log(abar^ / (1 - abar^)), (B,), for losses in log(1 - abar^) without cancellation."""
        with torch.autocast(z.device.type, enabled=False):  # half precision has an error of 1 %
            h, statistics = z.float(), []
            for layer in self.layers:
                h = F.silu(layer(h))
                statistics += [h.mean((2, 3)), torch.log(h.square().mean((2, 3)) + 1e-8)]
            return self.head(torch.cat(statistics, 1))[:, 0]

    def forward(self, z: Tensor) -> Tensor:
        """abar^ (B,) float32 of noisy images z (B, C, H, W)."""
        return torch.sigmoid(self.logit(z))
