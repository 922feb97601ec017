"""Difference between images and others, one by one: PSNR, RMS and structural similarity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput
from ..utils.devices import as_float64
from .paired import psnr_by_image

WINDOW = 11  # side of the window of structural similarity


def image_difference(images: Tensor, others: Tensor) -> dict[str, float]:
    """PSNR and RMS difference between two sets of images of the same seeds.

    It measures how closely a trajectory is followed, not how good the images are.

    Args:
        images: (N, ...) in [-1, 1].
        others: of the same shape, with the same seeds image by image.

    Returns:
        `psnr`, the mean over images of `-10 log10 MSE` in dB (each at most 100), and `rms`, the root of the mean MSE;
        errors on the scale 0 to 1.

    Raises:
        BadInput: if the shapes differ, or for images that are not finite.
    """
    psnr = psnr_by_image(images, others)
    mse = (as_float64(images - others) / 2).square().flatten(1).mean(dim=1)
    return {"psnr": float(psnr.mean()), "rms": float(mse.mean().sqrt())}


def structural_similarity(images: Tensor, others: Tensor, window: int = WINDOW, sigma: float = 1.5) -> Tensor:
    """SSIM of each image with the other: the mean over positions and channels of

        (2 m n + c1) (2 C + c2) / ((m^2 + n^2 + c1) (V + W + c2)),    c1 = 0.01^2, c2 = 0.03^2

    with the means m, n, variances V, W and covariance C of both under a Gaussian window that lies inside the image, on
    the scale 0 to 1.

    Args:
        images: (N, C, H, W) in [-1, 1], sides of at least `window`.
        others: of the same shape.
        window: side of the window in pixels.
        sigma: of the Gaussian, in pixels.

    Returns:
        (N,) in [-1, 1], float64; 1 for equal images.

    Raises:
        BadInput: if the shapes differ, or for images smaller than the window.

    References:
        Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
        similarity".
    """
    if images.shape != others.shape or images.ndim != 4:
        raise BadInput(f"images of shape {tuple(images.shape)} and {tuple(others.shape)} cannot be compared one by one")
    n, channels, height, width = images.shape
    if min(height, width) < window:
        raise BadInput(f"structural similarity needs sides of at least {window} pixels, got {height}x{width}")
    x, y = ((as_float64(one) + 1) / 2 for one in (images, others))
    at = torch.arange(window, dtype=torch.float64, device=x.device) - (window - 1) / 2
    line = torch.exp(-at.square() / (2 * sigma**2))
    line = line / line.sum()

    def mean(x: Tensor) -> Tensor:
        rows = F.conv2d(x.reshape(n * channels, 1, height, width), line.reshape(1, 1, -1, 1))
        return F.conv2d(rows, line.reshape(1, 1, 1, -1))

    m, n_ = mean(x), mean(y)
    v, w, c = mean(x * x) - m * m, mean(y * y) - n_ * n_, mean(x * y) - m * n_
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * m * n_ + c1) * (2 * c + c2) / ((m * m + n_ * n_ + c1) * (v + w + c2))
    return ratio.reshape(n, -1).mean(1)
