"""The orthonormal cosine transform (DCT-II) of images."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["dct2", "dct_matrix", "idct2"]


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II, (n, n) float64: `C[k, i] = sqrt((2 - [k = 0]) / n) cos(pi k (2 i + 1) / (2 n))`.

    `C @ x` are the coefficients of x, and `C.T` is the inverse of C.
    """
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def dct2(x: Tensor) -> Tensor:
    """The coefficients (..., H, W) of images (..., H, W), over their last two axes, in the dtype of `x`."""
    rows, columns = (_matrix(n, x.dtype, x.device) for n in x.shape[-2:])
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 coefficients are too coarse for images
        return rows @ x @ columns.T


def idct2(u: Tensor) -> Tensor:
    """The images (..., H, W) of these coefficients, the inverse of `dct2`."""
    rows, columns = (_matrix(n, u.dtype, u.device) for n in u.shape[-2:])
    with torch.autocast(u.device.type, enabled=False):
        return rows.T @ u @ columns


@lru_cache(maxsize=32)
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix in this dtype on this device."""
    with torch.inference_mode(False):  # cached values may be used under autograd later
        return dct_matrix(n).to(dtype).to(device)
