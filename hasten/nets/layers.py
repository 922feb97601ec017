"""Building blocks shared by the networks: time features, normalisation, attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, SupportsIndex, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class ModuleListOf(nn.ModuleList, Generic[M]):
        """`nn.ModuleList` whose items have a type."""

        def __iter__(self) -> Iterator[M]: ...

        @overload
        def __getitem__(self, idx: slice) -> ModuleListOf[M]: ...

        @overload
        def __getitem__(self, idx: SupportsIndex) -> M: ...

        def __getitem__(self, idx: SupportsIndex | slice) -> M | ModuleListOf[M]: ...

else:
    ModuleListOf = nn.ModuleList


class TimeFeatures(nn.Module):
    """Sinusoidal features of a scalar time: `(B,) -> (B, width)`.

    Half cosines, half sines, at geometric frequencies `scale * 10000^(-k / (width/2))`.

    Args:
        width: even number of features.
        scale: brings the time to the usual range 0..1000: 1000 for a time in [0, 1].

    Raises:
        ValueError: for an odd width.

    References:
        Vaswani et al. 2017, arXiv:1706.03762.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 1000.0) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"time features need an even width, got {width}")
        half = torch.arange(width // 2, dtype=torch.float32) / (width // 2)
        self.register_buffer("frequencies", scale * torch.exp(-math.log(10000.0) * half), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        phase = time.float()[:, None] * self.frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1).to(self.frequencies.dtype)


class GuidanceFeatures(nn.Module):
    """Embedding of a guidance scale, to be added to that of the time; initially zero: `(B,) -> (B, E)`.

    `gain W [u, sin(2 pi g_j u), cos(2 pi g_j u)]`, u = (scale - low) / (high - low), g_j from 1/4 to 16,
    geometric. W is
    initialised to zero, so that a network starts as what it was without this input.

    Args:
        low, high: the range of guidance scales.
        embedding: E.
        count: number of frequencies.
        gain: factor without which Adam moves W away from zero slowly.

    References:
        Meng et al. 2023, arXiv:2210.03142.
    """

    frequencies: Tensor

    def __init__(self, low: float, high: float, embedding: int, count: int = 12, gain: float = 4.0) -> None:
        super().__init__()
        self.low, self.width, self.gain = float(low), float(high) - float(low), gain
        self.register_buffer("frequencies", torch.logspace(-2, 4, count, base=2.0), persistent=False)
        self.out = zero(nn.Linear(2 * count + 1, embedding))

    def forward(self, scale: Tensor) -> Tensor:
        u = ((scale.float() - self.low) / self.width)[:, None]
        phase = 2 * math.pi * u * self.frequencies
        features = torch.cat([u, phase.sin(), phase.cos()], dim=1)
        return self.gain * self.out(features.to(self.frequencies.dtype))


def group_norm(channels: int, max_groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups, up to `max_groups`, that leaves at least four channels in each."""
    groups = next(g for g in range(min(max_groups, max(channels // 4, 1)), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-5)


def zero(layer: nn.Module) -> nn.Module:
    """Initialise a layer's parameters to zero, so that a residual branch starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Attention(nn.Module):
    """Residual self-attention over the pixels of a feature map, `(B, C, H, W) -> (B, C, H, W)`.

    Args:
        channels: C.
        head_width: channels per head.

    Raises:
        ValueError: if the channels do not divide into heads.
    """

    identity = False  # pass the values on, as with the identity for the attention map

    def __init__(self, channels: int, head_width: int = 32) -> None:
        super().__init__()
        self.heads = max(channels // head_width, 1)
        if channels % self.heads:
            raise ValueError(f"{channels} channels do not split into {self.heads} attention heads")
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = qkv[2] if self.identity else F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        mixed = self.out(mixed.transpose(1, 2).reshape(b, h * w, c))
        return x + mixed.transpose(1, 2).view(b, c, h, w)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a scale-and-shift from the embedding: `(B, C, H, W), (B, E) -> (B, C', H, W)`.

    BigGAN-style residual block; the second convolution is initialised to zero, so that the block starts as its
    shortcut.

    References:
        Dhariwal, Nichol 2021, arXiv:2105.05233.
    """

    def __init__(self, channels: int, out_channels: int, embedding: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.modulation = zero(nn.Linear(embedding, 2 * out_channels))
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))
