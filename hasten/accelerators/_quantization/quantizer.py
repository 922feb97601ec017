"""Uniform quantisation: one quantiser for weights and activations, with its lowest and highest code named.

    q = clamp(round(x / s) + z, low, high),        what q stands for:  s (q - z)

z is a whole number, so that 0 stands for itself: what padding adds and what a rectifier cuts stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BadInput

P, FACTORS = 2.4, 80  # of the range search: the power of the error, and how many ranges are tried (1.00 to 0.21)


@dataclass(frozen=True)
class Grid:
    """The codes low..high. symmetric: z = 0 and low = -high, for values of both signs."""

    low: int
    high: int
    symmetric: bool = False


WEIGHTS = {8: Grid(-127, 127, symmetric=True), 4: Grid(0, 15)}
ACTS = {8: Grid(0, 255)}


def fit(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero (float32, whole), both (R,), of ranges [low, high] (R,), which are widened to hold 0."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    tiny = torch.finfo(torch.float32).tiny * 2.0**20  # a range of nothing but zeros still needs a scale
    if grid.symmetric:
        scale = (torch.maximum(-low, high) / grid.high).clamp(min=tiny)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (grid.high - grid.low)).clamp(min=tiny)
    return scale, (grid.low - low / scale).round().clamp(grid.low, grid.high)


def codes(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The codes of x, as whole numbers in x's own dtype; scale and zero broadcast to x."""
    return (torch.round(x / scale) + zero).clamp(grid.low, grid.high)


def fake(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """What the codes of x stand for. Gradients pass the rounding as if it were not there (straight through), so that

        d/dx = 1 inside the range, 0 outside;   d/ds = q - z - x/s inside, low - z or high - z outside.

    References: Bengio, Leonard, Courville 2013, arXiv:1308.3432; of s: Esser et al. 2019, arXiv:1902.08153.
    """
    y = x / scale
    y = y + (torch.round(y) - y).detach() + zero
    return (y.clamp(grid.low, grid.high) - zero) * scale


def error(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, p: float = P) -> Tensor:
    """The mean of |x - fake(x)|^p over each row of x (R, n), (R,)."""
    return (x - fake(x, scale[:, None], zero[:, None], grid)).abs().pow(p).mean(dim=1)


def search(
    x: Tensor, grid: Grid, low: Tensor | None = None, high: Tensor | None = None, p: float = P, factors: int = FACTORS
) -> tuple[Tensor, Tensor]:
    """Scale and zero (R,) of each row of x (R, n): of the ranges f [low, high], f = 1.00, 0.99, ..., the one of least
    L_p error on x. Never worse there than the whole range, which is tried first.

    low, high: (R,), by default the row's own least and greatest value.
    """
    low = x.amin(dim=1) if low is None else low
    high = x.amax(dim=1) if high is None else high
    best, scale, zero = torch.full_like(low, torch.inf), *fit(low, high, grid)
    for k in range(factors):
        f = 1.0 - k / 100
        s, z = fit(low * f, high * f, grid)
        found = error(x, s, z, grid, p)
        better = found < best
        best, scale, zero = (torch.where(better, a, b) for a, b in ((found, best), (s, scale), (z, zero)))
    return scale, zero


def of_weights(weight: Tensor, bits: int, how: str) -> tuple[Tensor, Tensor]:
    """Scale and zero of every output channel, (C_out,). how: "minmax" or "search"."""
    rows = weight.detach().float().flatten(1)
    if how == "minmax":
        return fit(rows.amin(dim=1), rows.amax(dim=1), WEIGHTS[bits])
    return search(rows, WEIGHTS[bits])


def spread(per_channel: Tensor, like: Tensor) -> Tensor:
    """(C_out,) as (C_out, 1, ...), to go with a weight."""
    return per_channel.reshape(-1, *[1] * (like.ndim - 1))


def nearest_weights(weight: Tensor, bits: int, how: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (in the weight's shape, float), scale and zero (C_out,), rounded to the nearest."""
    scale, zero = of_weights(weight, bits, how)
    return codes(weight.detach().float(), spread(scale, weight), spread(zero, weight), WEIGHTS[bits]), scale, zero


def check_bits(what: str, bits: int | None, choices: tuple[int | None, ...]) -> None:
    """Refuse a number of bits that there is no arithmetic for."""
    if bits not in choices:
        raise BadInput(f"quantize: {what} must be {' or '.join(str(c).lower() for c in choices)} bits, found {bits}")
