"""The last row of a plan, changed a little so that its images have the statistics of real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["fit_last_row", "image_statistics"]

FLOOR = 0.03  # of a local contrast, in units of an image in [-1, 1]
END, SOFT = 0.99, 0.003


def image_statistics(images: Tensor) -> Tensor:
    """Nine numbers of images (n, C, H, W) in [-1, 1], float32, differentiable.

    At three resolutions, each half the one before, of the contrast c of a pixel to the mean of its 3x3 neighbourhood:
    `E log(c^2 + .03^2)`, which flat areas decide, and `log E c^2`, which edges decide. Then the share of pixels at an
    end of the range, mean and standard deviation.
    """
    images = images.clamp(-1, 1)
    found, x = [], images
    for _ in range(3):
        contrast = (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)).square()
        found += [torch.log(contrast + FLOOR**2).mean(), torch.log(contrast.mean())]
        x = F.avg_pool2d(x, 2)
    found += [torch.sigmoid((images.abs() - END) / SOFT).mean(), images.mean(), images.std()]
    return torch.stack(found)


def fit_last_row(answers: Tensor, last: Tensor, free: Tensor, real: Tensor, weight: float) -> Tensor:
    """The last row's coefficients (K,), of the same sum, for which the results have the statistics of real images.

    Least `|statistics(result) - statistics(real)|^2 + weight E(result - result before)^2`, by L-BFGS over moves along
    directions of one RMS unit each.

    Args:
        answers: (K, n, C, H, W), what the plan was answered; the result is `sum_j last[j] answers[j]`.
        free: (K-1,) which coefficients beside the newest may change. real: (m, C, H, W) in [-1, 1].
    """
    from scipy.optimize import minimize

    answers = answers.float()
    before = torch.einsum("j,j...->...", last.float().to(answers.device), answers)
    off = answers[:-1][free.to(answers.device)] - answers[-1:]
    flat = off.flatten(1).double()
    gram = (flat @ flat.T).cpu() / flat.shape[1]
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    frame = torch.linalg.inv(torch.linalg.cholesky(gram.flip(0, 1))).flip(0, 1)
    goal = image_statistics(real)

    @torch.enable_grad()
    def value(v: Any) -> tuple[float, Any]:
        z = torch.from_numpy(v.copy()).requires_grad_()
        result = before + torch.einsum("j,j...->...", (z @ frame).float().to(before.device), off)
        loss = 100 * ((image_statistics(result) - goal).square().sum().cpu() + weight * z.square().sum())
        return float(loss.detach()), torch.autograd.grad(loss, z)[0].numpy()

    if not len(frame):
        return last
    begin = torch.zeros(len(frame), dtype=torch.float64).numpy()
    found = minimize(value, begin, jac=True, method="L-BFGS-B", options={"maxiter": 25})
    change = torch.from_numpy(found.x) @ frame
    row = last.clone()
    row[:-1][free] += change
    row[-1] -= change.sum()
    return row
