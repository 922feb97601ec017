"""ConsistencyResult of an enlarged image with the small one: what it becomes when it is reduced again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.resizing import enlarge, reduce

__all__ = ["ConsistencyResult", "back_project", "measure_consistency"]

ROWS = 32  # of the small image at once
HALO = 4  # rows of the small image beside them that the kernels reach, and one more
STEP = 1.5  # of the projection: reduction after enlargement has eigenvalues from about 1/4 to 1
Rows = Callable[[int, int], Tensor]  # (first row, one past the last) -> (C, rows, W) in [-1, 1]


@dataclass(frozen=True)
class ConsistencyResult:
    """The difference between the reduced image and the small one, in units of 1/255 of the range.

    Args:
        rms: root of the mean square.
        largest: largest absolute value.
    """

    rms: float
    largest: float

    def __str__(self) -> str:
        return f"consistency error {self.rms:.2g} of 255 (largest {self.largest:.2g})"


class ErrorSum:
    """Sums of squares and the largest of differences in [-1, 1] units."""

    def __init__(self) -> None:
        self.squares, self.count, self.largest = 0.0, 0, 0.0

    def add(self, difference: Tensor) -> None:
        """Count these too."""
        self.squares += float(difference.double().square().sum())
        self.count += difference.numel()
        self.largest = max(self.largest, float(difference.abs().max()))

    def result(self) -> ConsistencyResult:
        """What they amount to."""
        return ConsistencyResult(127.5 * math.sqrt(self.squares / max(self.count, 1)), 127.5 * self.largest)


def measure_consistency(small: Rows, large: Rows, height: int, factor: int) -> ConsistencyResult:
    """The consistency error of an enlarged image, some rows at a time.

    Args:
        small: rows of the small image.
        large: rows of the enlarged one.
        height: of the small image.
        factor: of the enlargement.
    """
    errors = ErrorSum()
    for begin in range(0, height, ROWS):
        end = min(begin + ROWS, height)
        errors.add(small(begin, end) - _reduced(large, begin, end, height, factor))
    return errors.result()


def back_project(
    small: Rows, large: Rows, size: tuple[int, int, int], factor: int, tolerance: float = 0.25, iterations: int = 30
) -> tuple[Rows, ConsistencyResult]:
    """Iterative back-projection: the enlarged image y plus an enlarged correction r, such that it reduces to the small
    one x: `r <- r + STEP (x - reduce(clamp(y + enlarge(r))))`.

    Args:
        small: rows of x.
        large: rows of y, which may be read several times.
        size: C, height and width of x; the correction, of this size, is held in memory.
        factor: of the enlargement.
        tolerance: the largest error at which to end, in units of 1/255 of the range.
        iterations: after which to end in any case.

    Returns:
        rows of the corrected image, and the error that was reached, before rounding to whole values.

    References:
        Irani, Peleg 1991, "Improving resolution by image registration".
    """
    height = size[1]
    correction = torch.zeros(size)

    def corrected(begin: int, end: int) -> Tensor:
        """Rows of the result."""
        first, last = max(begin // factor - HALO, 0), min(-(-end // factor) + HALO, height)
        added = enlarge(correction[None, :, first:last], factor)[0]
        return (large(begin, end) + added[:, begin - factor * first : end - factor * first]).clamp_(-1, 1)

    errors = ErrorSum().result()
    for k in range(iterations + 1):
        total, change = ErrorSum(), torch.empty(size)
        for begin in range(0, height, ROWS):
            end = min(begin + ROWS, height)
            change[:, begin:end] = small(begin, end) - _reduced(corrected, begin, end, height, factor)
            total.add(change[:, begin:end])
        before, errors = errors, total.result()
        stuck = k > 1 and errors.rms > 0.97 * before.rms  # where the small image itself is at the ends of the range
        if errors.largest <= tolerance or stuck or k == iterations:
            break
        correction += STEP * change
    return corrected, errors


def _reduced(large: Rows, begin: int, end: int, height: int, factor: int) -> Tensor:
    """Rows of the reduced image."""
    first, last = max(begin - HALO, 0), min(end + HALO, height)
    return reduce(large(factor * first, factor * last)[None], factor)[0, :, begin - first : end - first]
