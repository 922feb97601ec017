"""The discriminator of patches that adversarially trained autoencoders use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import group_norm


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> a map of logits (B, 1, h, w), each of one patch.

    4x4 convolutions of stride 2 with leaky rectifiers and group normalisation (not after the first), then two of
    stride 1.
    `started` tells whether it has been trained at all (a buffer: checkpoints hold it).

    Args:
        channels: C.
        side: the smaller of H and W, at least 8.
        width: channels of the first convolution; doubled by each further one, up to eight times.
        depth: convolutions of stride 2, fewer for images too small for them; 3 has patches of 70 pixels.

    References:
        Isola et al. 2017, arXiv:1611.07004 (patches); Esser, Rombach, Ommer 2021, arXiv:2012.09841 (for autoencoders).
    """

    started: Tensor

    def __init__(self, channels: int, side: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        depth = max(1, min(depth, side.bit_length() - 3))  # two convolutions of 4x4 are left with 4 pixels or more
        widths = [width * min(2**k, 8) for k in range(depth + 1)]
        ins = [channels, *widths[:-1]]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2 if k < depth else 1, padding=1) for k, (a, b) in enumerate(zip(ins, widths))
        )
        self.norms = nn.ModuleList(group_norm(b) for b in widths[1:])
        self.out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        self.register_buffer("started", torch.zeros((), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """The map of logits."""
        for k, conv in enumerate(self.convs):
            x = conv(x)
            x = F.leaky_relu(x if k == 0 else self.norms[k - 1](x), 0.2)
        return self.out(x)
