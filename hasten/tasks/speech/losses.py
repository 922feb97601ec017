"""Losses between spectrograms of different lengths: padded frames do not count, and their number changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["masked_mean", "mel_loss", "ssim_map"]

WINDOW, WIDTH = 11, 1.5  # of SSIM's Gaussian window
C1, C2 = 0.01**2, 0.03**2
OFFSET = 6.0  # added to both spectrograms, which makes them positive


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """The mean of an error (B, ..., L) over the frames of a mask (B, L)."""
    keep = mask.to(error.dtype).reshape(len(mask), *[1] * (error.ndim - 2), mask.shape[1])
    each = error.numel() / (len(mask) * mask.shape[1])
    return (error * keep).sum() / (keep.sum() * each).clamp_min(1)


def mel_loss(x0: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """`0.5 mean |x0 - target| + 0.5 (1 - mean SSIM)` over the frames of the mask.

    Args:
        x0, target: (B, M, L).
        mask: (B, L).

    References:
        Ren, Tan, Qin, Zhao, Liu 2022, arXiv:2202.13066 (the loss); Huang et al. 2022, arXiv:2207.06389.
    """
    return 0.5 * masked_mean((x0 - target).abs(), mask) + 0.5 * (1 - masked_mean(ssim_map(x0, target, mask), mask))


def ssim_map(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Structural similarity at each point, (B, M, L), of spectrograms plus OFFSET, zero beyond the mask and the edges.

    References:
        Wang, Bovik, Sheikh, Simoncelli 2004, IEEE Transactions on Image Processing 13.
    """
    keep = mask.to(x.dtype)[:, None]
    x, y = (x + OFFSET) * keep, (y + OFFSET) * keep
    place = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-place.square() / (2 * WIDTH**2))
    window = window / window.sum()
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]
    maps = F.conv2d(maps, window.view(1, 1, 1, -1), padding=(0, WINDOW // 2))
    maps = F.conv2d(maps, window.view(1, 1, -1, 1), padding=(WINDOW // 2, 0))
    mx, my, xx, yy, xy = maps[:, 0].unflatten(0, (5, -1))
    cross, both = mx * my, mx * mx + my * my
    return ((2 * cross + C1) * (2 * (xy - cross) + C2)) / ((both + C1) * (xx + yy - both + C2))
