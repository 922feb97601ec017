"""Samples of super-resolution as the difference from the enlarged source image."""

from __future__ import annotations

from torch import Tensor

from ..errors import BadInput
from ..utils.resizing import enlarge

__all__ = ["decode_residual", "encode_residual"]


def encode_residual(x: Tensor, source: Tensor | None, factor: int, std: float | None) -> Tensor:
    """`(x - enlarge(source)) / std`, (n, C, H, W).

    Args:
        x: images (n, C, H, W) in [-1, 1].
        source: small images (n, C, H / factor, W / factor).
        factor: of the enlargement.
        std: standard deviation of the differences in the training data.

    Raises:
        BadInput: without sources, or without a standard deviation.
    """
    small, scale = checked(source, std)
    return (x - enlarge(small.to(x.dtype), factor)) / scale


def decode_residual(r: Tensor, source: Tensor | None, factor: int, std: float | None) -> Tensor:
    """`enlarge(source) + std r`, (n, C, H, W): the inverse of `encode_residual`."""
    small, scale = checked(source, std)
    return enlarge(small.to(r.dtype), factor) + scale * r


def checked(source: Tensor | None, std: float | None) -> tuple[Tensor, float]:
    """The source and the standard deviation, which must be there."""
    if source is None:
        raise BadInput("samples of the codec residual are differences from their source images: give the sources")
    if std is None or not std > 0:
        raise BadInput(f"the codec residual needs residual_std, a positive number, found {std}")
    return source, float(std)
