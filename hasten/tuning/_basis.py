"""Directions in which the results of a model differ in size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan.basis import Basis

__all__ = ["data_basis"]

MAX_MATRIX = 512  # entries of a sample up to which its covariance is used


def data_basis(samples: Tensor, directions: int) -> Basis:
    """A basis of mean 0 in which samples are uncorrelated, with at most `directions` groups of equal variance.

    The eigenvectors of their second moments; for images larger than 512 entries the cosine transform, and for other
    large samples the coordinates themselves.

    Args:
        samples: (n, *S).
        directions: at least 1.
    """
    x, shape = samples.detach().cpu().double(), samples.shape[1:]
    zero = torch.zeros(shape, dtype=torch.float64)
    if shape.numel() <= MAX_MATRIX:
        values, matrix = torch.linalg.eigh(x.flatten(1).T @ x.flatten(1) / len(x))
        variance = values.clamp(min=1e-6 * float(values[-1]) + 1e-300).reshape(shape)
        return Basis(zero, variance, "matrix", matrix).grouped(directions)
    kind = "dct" if len(shape) >= 2 else "identity"
    spectrum = Basis(zero, torch.ones(shape, dtype=torch.float64), kind).coordinates(x).square().mean(0)
    return Basis(zero, spectrum.clamp(min=1e-6 * float(spectrum.max()) + 1e-300), kind).grouped(directions)
