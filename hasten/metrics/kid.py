"""Kernel distance between two sets of features: unbiased, so that its real-data baseline is zero at any count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows


def polynomial_mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of two sets of features under `k(a, b) = (a.b / D + 1)^3`; it may be negative.

        sum_{i != j} k(x_i, x_j) / (M (M-1)) + the same of y - 2 mean_ij k(x_i, y_j)

    The kernel is computed in the features' dtype (at least float32) and summed in float64.

    Args:
        x: `(M, D)`.
        y: `(N, D)`.

    Raises:
        BadInput: if the shapes do not match, for fewer than 2 samples, or values that are not finite.

    References:
        Binkowski et al. 2018, arXiv:1801.01401; Gretton et al. 2012.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise BadInput(f"features {tuple(x.shape)} and {tuple(y.shape)} are not of the same feature network")
    if min(len(x), len(y)) < 2:
        raise BadInput(f"an unbiased kernel distance needs 2 samples on each side, found {len(x)} and {len(y)}")
    check_finite_rows("features", x, y)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to("cpu", dtype), y.to("cpu", dtype)

    def kernel(a: Tensor, b: Tensor) -> tuple[float, float]:
        """Sum of all entries, and of the diagonal."""
        k = torch.addmm(a.new_ones(1), a, b.T, alpha=1 / a.shape[1])
        k = k * k * k
        return float(k.sum(dtype=torch.float64)), float(k.diagonal().sum(dtype=torch.float64))

    m, n = len(x), len(y)
    (xx, x_diagonal), (yy, y_diagonal), (xy, _) = kernel(x, x), kernel(y, y), kernel(x, y)
    return (xx - x_diagonal) / (m * (m - 1)) + (yy - y_diagonal) / (n * (n - 1)) - 2 * xy / (m * n)


def kid(x: Tensor, y: Tensor, subsets: int = 50, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Kernel distance: `polynomial_mmd2` over random subsets.

    Args:
        x, y: features `(M, D)` and `(N, D)`.
        subsets: number of subsets.
        size: samples drawn without replacement from each side for one subset (at most M and N).
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets. The deviation is that of ONE subset, as papers report it; the
        error of the mean is smaller.

    Raises:
        BadInput: for no subset, or subsets of fewer than 2 samples.

    References:
        Binkowski et al. 2018, arXiv:1801.01401, section 4.
    """
    if subsets < 1 or size < 2:
        raise BadInput(f"kid needs at least 1 subset of at least 2 samples, got {subsets} of {size}")
    m, n = min(size, len(x)), min(size, len(y))
    generator = torch.Generator().manual_seed(seed)
    values = [
        polynomial_mmd2(
            x[torch.randperm(len(x), generator=generator)[:m]], y[torch.randperm(len(y), generator=generator)[:n]]
        )
        for _ in range(subsets)
    ]
    v = torch.tensor(values, dtype=torch.float64)
    return float(v.mean()), float(v.std(correction=0))
