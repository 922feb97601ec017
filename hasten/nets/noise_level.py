"""How much noise an image holds: a small network that looks at the image alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NoiseLevelNet(nn.Module):
    """`abar^ = P(z)` in (0, 1) of `z = sqrt(abar) x + sqrt(1 - abar) e`: `(B, C, H, W) -> (B,)` float32.

    Four 3x3 convolutions with SiLU, the last three at half the size of what they see (the weights in between fixed by
    no normalisation, which would remove the very scale that is asked for). Of each convolution's output the mean and
    the log of the mean square over the pixels go into two linear layers and a sigmoid. 80,000 weights at `width` 16.

    channels: C. width: of the first convolution; the others have 2, 3 and 3 times as many channels.
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
        """log(abar^ / (1 - abar^)), (B,): what a loss in log(1 - abar^) is made of without rounding."""
        with torch.autocast(z.device.type, enabled=False):  # half precision knows a level to 1 % only
            h, seen = z.float(), []
            for layer in self.layers:
                h = F.silu(layer(h))
                seen += [h.mean((2, 3)), torch.log(h.square().mean((2, 3)) + 1e-8)]
            return self.head(torch.cat(seen, 1))[:, 0]

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.logit(z))
