"""The encoder that structure-guided training compares samples in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import group_norm

__all__ = ["RelationEncoder"]

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_WIDTH = 256


class ResidualBlock(nn.Module):
    """`x + conv(act(norm(conv(act(norm(x))))))`, of the same shape.

    Args:
        channels: of the input.
        dimensions: of the sample beside the channels: 1, 2 or 3.
    """

    def __init__(self, channels: int, dimensions: int) -> None:
        super().__init__()
        conv = CONVOLUTIONS[dimensions]
        self.norms = nn.ModuleList(group_norm(channels) for _ in range(2))
        self.convs = nn.ModuleList(conv(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(F.silu(norm(h)))
        return x + h


class RelationEncoder(nn.Module):
    """Samples `(B, *S)` of pixels, latents, audio, video or points to unit vectors `(B, features)`, float32.

    A residual network with group normalisation: sides are halved down to less than 8 while the channels double, then
    the mean over positions and a linear layer. Points (S of one number) pass two hidden layers. The vectors have
    length 1, so that an encoder that is trained to make distances large cannot make them larger than 2.

    Args:
        shape: S: (C, H, W), (C, L), (C, T, H, W) or (D,).
        width: channels at the finest resolution; hidden width / 2 of points.
        features: length of the vectors.
        blocks: residual blocks at each resolution.

    Raises:
        ValueError: for samples of more than four dimensions, or none.

    References:
        He et al. 2016, arXiv:1512.03385; Wu, He 2018, arXiv:1803.08494 (group normalisation).
    """

    def __init__(self, shape: Sequence[int], width: int = 32, features: int = 128, blocks: int = 1) -> None:
        super().__init__()
        shape = tuple(shape)
        dimensions = len(shape) - 1
        if not 0 <= dimensions <= 3:
            raise ValueError(f"samples have 1 to 4 dimensions, found shape {shape}")
        self.shape = shape
        if not dimensions:
            hidden = 2 * width
            self.body = nn.Sequential(
                nn.Linear(shape[0], hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU()
            )
            self.out = nn.Linear(hidden, features)
            return
        conv: Any = CONVOLUTIONS[dimensions]
        sides = list(shape[1:])
        layers: list[nn.Module] = []
        channels, last = shape[0], width
        while True:
            strides = [2 if side >= 8 else 1 for side in sides]
            layers.append(conv(channels, last, 3, stride=tuple(strides), padding=1))
            layers += [ResidualBlock(last, dimensions) for _ in range(blocks)]
            sides = [-(-side // stride) for side, stride in zip(sides, strides, strict=True)]
            channels = last
            if max(sides) < 8:
                break
            last = min(2 * last, MAX_WIDTH)
        self.body = nn.Sequential(*layers, group_norm(last), nn.SiLU())
        self.out = nn.Linear(last, features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.to(self.out.weight.dtype))
        h = self.out(h.flatten(2).mean(2) if h.ndim > 2 else h)
        h = h if h.dtype == torch.float64 else h.float()
        return F.normalize(h, dim=1, eps=1e-6)
