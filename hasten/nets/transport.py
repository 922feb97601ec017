"""The networks of conditional transport: features of samples, and the navigator between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import group_norm


class TransportFeatures(nn.Module):
    """Features `(B, *S) -> (B, K)` of samples: convolutions of stride 2 for images, a perceptron for others.

    Args:
        shape: S.
        width: K.
        widths: channels of the convolutions; as many as the side allows are used.
    """

    def __init__(self, shape: Sequence[int], width: int = 64, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.body: nn.Module
        if len(shape) != 3:
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(math.prod(shape), 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                nn.Linear(128, width),
            )  # fmt: skip
            return
        layers: list[nn.Module] = []
        channels, sides = shape[0], list(shape[1:])
        for c in widths:
            if min(sides) < 2:
                break
            layers += [nn.Conv2d(channels, c, 4, stride=2, padding=1), group_norm(c), nn.SiLU()]
            channels, sides = c, [side // 2 for side in sides]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * math.prod(sides), width))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Navigator(nn.Module):
    """d_ij = softplus of a perceptron of (T x_i - T y_j)^2, `(n, K), (m, K) -> (n, m)`.

    Args:
        width: K.
        hidden: of the perceptron.

    References:
        Zheng, Zhou 2020, arXiv:2012.14350.
    """

    def __init__(self, width: int = 64, hidden: int = 64) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(width, hidden), nn.Linear(hidden, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        squares = (x[:, None] - y[None]).square()
        return nn.functional.softplus(self.out(torch.tanh(self.first(squares)))[..., 0])
