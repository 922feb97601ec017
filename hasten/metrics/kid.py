"""Kernel distance between two sets of features: unbiased, so its floor is zero at any sample count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows


def polynomial_mmd2(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of features `(M, D)` and `(N, D)` under `k(a, b) = (a.b / D + 1)^3`.

    `sum_{i != j} k(x_i, x_j) / (M (M-1)) + the same of y - 2 mean_ij k(x_i, y_j)`. It may be negative.
    The kernel is evaluated in the features' type (at least float32) and summed in float64.
    Reference: Binkowski et al. 2018, 1801.01401; Gretton et al. 2012.
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
    """Kernel distance: mean and standard deviation of `polynomial_mmd2` over `subsets` random subsets.

    Each subset draws `size` samples without replacement from each side (fewer when a side has fewer). The
    deviation is that of ONE subset, as papers report it; the error of the mean is smaller.
    Reference: Binkowski et al. 2018, 1801.01401, section 4.
    """
    if subsets < 1 or size < 2:
        raise BadInput(f"asked for {subsets} subsets of {size}: need at least 1 subset of at least 2 samples")
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
