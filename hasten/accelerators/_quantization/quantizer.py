"""Uniform quantisation of weights and activations with explicit integer bounds.

    q = clamp(round(x / s) + z, low, high),        dequantised:  s (q - z)

The zero-point z is an integer, so that 0 is represented exactly: zero padding and rectified values stay exact.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BadInput

__all__ = [
    "ACTS",
    "WEIGHTS",
    "Grid",
    "check_bits",
    "codes",
    "fake_quantize",
    "fit_range",
    "as_channels",
    "quantization_error",
    "search_range",
    "weight_range",
]

P, FACTORS = 2.4, 80  # of the range search: the power of the error, and how many ranges are tried (1.00 to 0.21)


@dataclass(frozen=True)
class Grid:
    """The codes low..high.

    Attributes:
        low: the lowest code.
        high: the highest code.
        symmetric: z = 0 and low = -high, for values of both signs.
    """

    low: int
    high: int
    symmetric: bool = False


WEIGHTS = {8: Grid(-127, 127, symmetric=True), 4: Grid(0, 15)}
ACTS = {8: Grid(0, 255)}


def fit_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of ranges, widened to contain 0.

    Args:
        low: (R,), the lower ends.
        high: (R,), the upper ends.
        grid: the codes.

    Returns:
        Scale (R,) and zero-point (R,) of integer values, float32.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    tiny = torch.finfo(torch.float32).tiny * 2.0**20  # a range of zeros alone still needs a scale
    if grid.symmetric:
        scale = (torch.maximum(-low, high) / grid.high).clamp(min=tiny)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (grid.high - grid.low)).clamp(min=tiny)
    return scale, (grid.low - low / scale).round().clamp(grid.low, grid.high)


def codes(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The codes of values, integers in their own dtype.

    Args:
        x: values.
        scale: broadcasts to x.
        zero: broadcasts to x.
        grid: the codes.
    """
    return (torch.round(x / scale) + zero).clamp(grid.low, grid.high)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """x quantised and dequantised. Gradients pass the rounding unchanged (straight-through estimator), so that

        d/dx = 1 inside the range, 0 outside;   d/ds = q - z - x/s inside, low - z or high - z outside.

    Args:
        x: values.
        scale: broadcasts to x.
        zero: broadcasts to x.
        grid: the codes.

    References:
        Bengio, Leonard, Courville 2013, arXiv:1308.3432; gradient of s: Esser et al. 2019, arXiv:1902.08153.
    """
    y = x / scale
    y = y + (torch.round(y) - y).detach() + zero
    return (y.clamp(grid.low, grid.high) - zero) * scale


def quantization_error(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, p: float = P) -> Tensor:
    """The mean of |x - fake_quantize(x)|^p over each row.

    Args:
        x: (R, n).
        scale: (R,).
        zero: (R,).
        grid: the codes.
        p: the power.

    Returns:
        (R,).
    """
    return (x - fake_quantize(x, scale[:, None], zero[:, None], grid)).abs().pow(p).mean(dim=1)


def search_range(
    x: Tensor, grid: Grid, low: Tensor | None = None, high: Tensor | None = None, p: float = P, factors: int = FACTORS
) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of minimum L_p error over the ranges f [low, high], f = 1.00, 0.99, ...

    Never worse than the full range, which is tried first.

    Args:
        x: (R, n), a range for each row.
        grid: the codes.
        low: (R,); by default the minimum of each row.
        high: (R,); by default the maximum of each row.
        p: the power of the error.
        factors: how many ranges are tried.

    Returns:
        Scale (R,) and zero-point (R,), float32.
    """
    low = x.amin(dim=1) if low is None else low
    high = x.amax(dim=1) if high is None else high
    best, scale, zero = torch.full_like(low, torch.inf), *fit_range(low, high, grid)
    for k in range(factors):
        f = 1.0 - k / 100
        s, z = fit_range(low * f, high * f, grid)
        error = quantization_error(x, s, z, grid, p)
        better = error < best
        best, scale, zero = (torch.where(better, a, b) for a, b in ((error, best), (s, scale), (z, zero)))
    return scale, zero


def weight_range(weight: Tensor, bits: int, how: str) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of every output channel.

    Args:
        weight: (C_out, ...).
        bits: 8 or 4.
        how: "minmax" or "search".

    Returns:
        Scale (C_out,) and zero-point (C_out,), float32.
    """
    rows = weight.detach().float().flatten(1)
    if how == "minmax":
        return fit_range(rows.amin(dim=1), rows.amax(dim=1), WEIGHTS[bits])
    return search_range(rows, WEIGHTS[bits])


def as_channels(values: Tensor, like: Tensor) -> Tensor:
    """Values that broadcast to a weight.

    Args:
        values: (C_out,).
        like: the weight (C_out, ...).

    Returns:
        (C_out, 1, ...).
    """
    return values.reshape(-1, *[1] * (like.ndim - 1))


def check_bits(what: str, bits: int | None, choices: Collection[int | None]) -> None:
    """Refuse a number of bits that is not supported.

    Args:
        what: the option, for the message.
        bits: its value.
        choices: the supported values.

    Raises:
        BadInput: for another value.
    """
    if bits not in choices:
        raise BadInput(f"quantize: {what} must be {' or '.join(str(c).lower() for c in choices)} bits, found {bits}")
