"""How near restored images are to the true ones, as papers of super-resolution measure it: on 8 bits, by image."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput, check_int
from ..utils.devices import as_float64
from ..utils.resizing import reduce
from .difference import WINDOW, structural_similarity
from .measure import check_finite_rows
from .paired import psnr_by_image

__all__ = ["as_levels", "consistency_error", "restoration_psnr", "restoration_ssim", "without_border"]


def as_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] rounded to the 256 levels of 8 bits, float64: what a saved file has.

    Args:
        images: floats in [-1, 1] (clamped), or uint8.

    Raises:
        BadInput: for images that are not finite.
    """
    if images.dtype == torch.uint8:
        return as_float64(images) / 127.5 - 1
    check_finite_rows("images", images)
    return ((as_float64(images) + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def without_border(images: Tensor, border: int) -> Tensor:
    """Images (N, C, H, W) without `border` pixels at each side.

    Raises:
        BadInput: where nothing would be left.
    """
    check_int("border", border, 0)
    height, width = images.shape[-2:]
    if 2 * border >= min(height, width):
        raise BadInput(
            f"border {border} leaves nothing of images of {width}x{height}: at most {(min(height, width) - 1) // 2}"
        )
    return images[..., border : height - border, border : width - border]


def restoration_psnr(images: Tensor, truths: Tensor, border: int = 0) -> Tensor:
    """PSNR of each image in dB, at most 100, over all channels, after rounding to 8 bits:

        20 log10 255 - 10 log10 mean (u - v)^2.

    Args:
        images, truths: (N, C, H, W), floats in [-1, 1] or uint8.
        border: pixels at each side that are left out.

    Returns:
        (N,) float64.

    Raises:
        BadInput: if the shapes differ, for images that are not finite, and a border that leaves nothing.
    """
    return psnr_by_image(without_border(as_levels(images), border), without_border(as_levels(truths), border))


def restoration_ssim(images: Tensor, truths: Tensor, border: int = 0) -> Tensor:
    """Structural similarity of each image, the mean over channels, after rounding to 8 bits: windows of 11 pixels with
    Gaussian weights of 1.5, as `difference.structural_similarity`.

    The same as `structural_similarity` of scikit-image with `gaussian_weights=True, use_sample_covariance=False,
    channel_axis=..., data_range=255`.

    Args:
        images, truths: (N, C, H, W), floats in [-1, 1] or uint8, with sides of 11 or more without the border.
        border: pixels at each side that are left out.

    Returns:
        (N,) float64.

    References:
        Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
        similarity".
    """
    return structural_similarity(
        without_border(as_levels(images), border), without_border(as_levels(truths), border), WINDOW
    )


def consistency_error(images: Tensor, sources: Tensor, factor: int) -> Tensor:
    """How far each image, reduced again, is from the small image that it was made from: the root mean square error in
    units of 1/255.

    The reduction is bicubic and antialiased, and both are rounded to 8 bits: of the true images it is 0 where the small
    ones were made so.

    Args:
        images: (N, C, H, W), floats in [-1, 1] or uint8.
        sources: (N, C, H / factor, W / factor).
        factor: of the sides.

    Returns:
        (N,) float64.

    Raises:
        BadInput: for images of another size.
    """
    height, width = images.shape[-2:]
    wanted = (len(images), images.shape[1], height // factor, width // factor)
    if height % factor or width % factor or tuple(sources.shape) != wanted:
        raise BadInput(
            f"images of {width}x{height} and small images of {sources.shape[-1]}x{sources.shape[-2]} do not differ by "
            f"the factor {factor}"
        )
    pixels = ((as_levels(images) + 1) * 127.5).round().float()  # reduced in 0..255, as data are, for equal rounding
    small = reduce(pixels, factor).round().clamp(0, 255).double()
    return (small - ((as_levels(sources) + 1) * 127.5).round()).square().flatten(1).mean(1).sqrt()
