"""Adjust the last row of a plan so that its images have the local statistics of real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..utils.devices import as_float64

__all__ = ["fit_last_row", "image_statistics"]

CONTRAST_FLOOR = 0.03  # of a local contrast, in units of an image in [-1, 1]
END, SOFTNESS = 0.99, 0.003  # of the range of pixels: |x| beyond END counts as saturated, smoothly


def image_statistics(images: Tensor) -> Tensor:
    """Nine differentiable statistics of images.

    At three resolutions, each half the previous one, of the contrast c of a pixel to the mean of its 3x3 neighbourhood:
    `E log(c^2 + .03^2)`, dominated by flat areas, and `log E c^2`, dominated by edges. Then the fraction of saturated
    pixels, mean and standard deviation.

    Args:
        images: (n, C, H, W) in [-1, 1].

    Returns:
        (9,) float32.
    """
    images = images.clamp(-1, 1)
    values, x = [], images
    for _ in range(3):
        contrast = (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)).square()
        values += [torch.log(contrast + CONTRAST_FLOOR**2).mean(), torch.log(contrast.mean())]
        x = F.avg_pool2d(x, 2)
    values += [torch.sigmoid((images.abs() - END) / SOFTNESS).mean(), images.mean(), images.std()]
    return torch.stack(values)


def fit_last_row(x0: Tensor, last: Tensor, free: Tensor, real: Tensor, weight: float) -> Tensor:
    """Coefficients of the last row for which the results have the statistics of real images.

    Minimises `|image_statistics(result) - image_statistics(real)|^2 + weight E(result - initial result)^2` by L-BFGS
    along directions of one RMS unit each; the sum of the coefficients does not change.

    Args:
        x0: (K, n, C, H, W), the model outputs of the plan; the result is `sum_j last[j] x0[j]`.
        last: (K,), the coefficients.
        free: (K-1,), which coefficients besides the last may change.
        real: (m, C, H, W) in [-1, 1].
        weight: of the distance to the initial result, > 0.

    Returns:
        (K,).
    """
    from scipy.optimize import minimize

    x0 = x0.float()
    initial = torch.einsum("j,j...->...", last.float().to(x0.device), x0)
    off = x0[:-1][free.to(x0.device)] - x0[-1:]
    flat = as_float64(off.flatten(1))
    gram = (flat @ flat.T).cpu() / flat.shape[1]
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    frame = torch.linalg.inv(torch.linalg.cholesky(gram.flip(0, 1))).flip(0, 1)
    target = image_statistics(real)

    @torch.enable_grad()
    def value(v: Any) -> tuple[float, Any]:
        z = torch.from_numpy(v.copy()).requires_grad_()
        result = initial + torch.einsum("j,j...->...", (z @ frame).float().to(initial.device), off)
        loss = 100 * ((image_statistics(result) - target).square().sum().cpu() + weight * z.square().sum())
        return float(loss.detach()), torch.autograd.grad(loss, z)[0].numpy()

    if not len(frame):
        return last
    start = torch.zeros(len(frame), dtype=torch.float64).numpy()
    solution = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 25})
    change = torch.from_numpy(solution.x) @ frame
    row = last.clone()
    row[:-1][free] += change
    row[-1] -= change.sum()
    return row
