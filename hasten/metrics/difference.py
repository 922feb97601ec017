"""Difference between images and others of the same seeds."""

from __future__ import annotations

from torch import Tensor

from ..errors import BadInput
from .measure import check_finite_rows

PEAK_DB = 100.0  # of equal images


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
    if images.shape != others.shape:
        raise BadInput(f"images of shape {tuple(images.shape)} and {tuple(others.shape)} cannot be compared one by one")
    check_finite_rows("images", images, others)
    mse = ((images - others).double() / 2).square().flatten(1).mean(dim=1)
    psnr = -10 * mse.clamp(min=10 ** (-PEAK_DB / 10)).log10()
    return {"psnr": float(psnr.mean()), "rms": float(mse.mean().sqrt())}
