"""Bicubic resizing by whole factors, as Pillow's (a = -1/2, antialiased), on tensors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["enlarge", "reduce"]


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Images (B, C, h, w) enlarged to (B, C, factor h, factor w).

    Args:
        x: floats of any range.
        factor: at least 1.
    """
    height, width = x.shape[-2:]
    # antialias=True selects the kernel with a = -1/2; without it torch's has a = -3/4
    return F.interpolate(x, (height * factor, width * factor), mode="bicubic", antialias=True) if factor > 1 else x


def reduce(x: Tensor, factor: int) -> Tensor:
    """Images (B, C, H, W) reduced to (B, C, H / factor, W / factor), antialiased.

    Args:
        x: floats of any range, with sides that the factor divides.
        factor: at least 1.

    Raises:
        ValueError: for other sides.
    """
    height, width = x.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"factor {factor} does not divide images of {width}x{height}")
    return F.interpolate(x, (height // factor, width // factor), mode="bicubic", antialias=True) if factor > 1 else x
