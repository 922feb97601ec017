"""Measure the moments of a model's noise prediction and of its data on real images."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_choice, check_numbers
from ..schedules.base import Schedule
from ..times import UniformLambda
from ..utils.random import make_generator
from ._task import Tuned, Tuner, TuningTask

COARSE = 0.04  # at larger q half precision changes no moment by more than its sampling error


@dataclass(frozen=True)
class Moments(Tuner):
    """The mean squares of the noise prediction and of the error of x0, at many times, on z = alpha x + sigma e.

        gamma[k] = E||eps(z, t_k)||^2 / d,    mse[k] = E||x - x0(z, t_k)||^2 / d,    eps = (z - alpha x0) / sigma

    over `images` real images x, the same at every time, and fresh noise; sums in float64. The mean of ||eps||^2 alone
    is too noisy at the noisy end, where 1 - gamma is alpha^2 times the quantity of interest. So control variates of
    mean 0 are regressed out, image by image: ||e||^2 - d, <e, x> and <e, m>, where m is the mean x0 at this time of the
    other half of the images of the same class. The expectation does not change; at alpha = 0 gamma is exactly 1.

    The resulting statistics, all float64:
        gamma_times, gamma, mse_times, mse: (T,) each, times ascending, equal steps in lam from `schedule.t_min`
            to `schedule.t_max` (q at most 150, then t_max itself);
        mean: (C, H, W), the data's mean;
        spectrum: (C, H, W), the mean square of each coefficient of the orthonormal two-dimensional DCT-II of x - mean;
            only for data of shape (C, H, W).
    The sampler `analytic` uses the first, dynamic programming the second, `preconditioned` the last. They are those of
    the model without guidance, with which x0 is not a conditional mean.

    Args:
        times: T, at least 2.
        images: how many if the task has no `n`.
        batch: images per model evaluation.
        precision: "fp32", "bf16" (autocast), or "mixed", which is bf16 where q >= 0.04.

    Raises:
        BadInput: for options out of range.

    References:
        Bao, Li, Zhu, Zhang 2022, arXiv:2201.06503.
    """

    needs_data: ClassVar[bool] = True
    times: int = 64
    images: int = 2000
    batch: int = 64
    precision: str = "mixed"

    def __post_init__(self) -> None:
        if self.times < 2 or self.images < 16 or self.batch < 1:
            raise BadInput(f"moments needs times >= 2, images >= 16 and batch >= 1, found {self}")
        check_choice("moments precision", self.precision, ("fp32", "bf16", "mixed"))
        check_numbers(self)

    @torch.no_grad()
    def tune(self, task: TuningTask) -> Tuned:
        """Measure the statistics; raises BadInput without images."""
        if task.images is None:
            raise BadInput("moments needs real images: name their folder with --data")
        count = max(task.n or self.images, 16)
        x, labels = task.images(count)
        if task.labels(1) is None:
            labels = None
        x = x.cpu()
        statistics = data_moments(x)
        mean = statistics["mean"]
        t = UniformLambda()(task.schedule, self.times)[:-1].flip(0)
        rows, worst = [], 0.0
        for k, time in enumerate(t):
            gamma, mse, error = self.measure(task, time, x, labels, mean)
            rows.append((gamma, mse))
            if math.isfinite(q := float(task.schedule.q(time))):
                worst = max(worst, q**2 * error / mse)
            task.tick("moments", k + 1, len(t), gamma)
        gammas, errors = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
        statistics |= {"gamma_times": t, "gamma": gammas, "mse_times": t.clone(), "mse": errors}
        # the largest standard error of C = q^2 (1 - gamma) relative to mse
        figures = {"images": len(x), "times": len(t), "largest_error": float(f"{worst:.2g}")}
        return Tuned(statistics=statistics, figures=figures)

    def measure(
        self, task: TuningTask, t: Tensor, x: Tensor, labels: Tensor | None, mean: Tensor
    ) -> tuple[float, float, float]:
        """Measure one time.

        Args:
            task: with the model.
            t: the time.
            x: images (n, *S).
            labels: (n,) or None.
            mean: of the data (*S).

        Returns:
            gamma, mse, and the standard error of gamma.
        """
        alpha, sigma = (float(f(t)) for f in (task.schedule.alpha, task.schedule.sigma))
        denoiser = unwrap_denoiser(task.denoiser)
        group = torch.zeros(len(x), dtype=torch.long) if labels is None else labels.cpu()
        # per class and half of the images: the sum of x0 and the count
        sums = torch.zeros(int(group.max()) + 1, 2, *x.shape[1:], dtype=torch.float64)
        counts = torch.zeros(sums.shape[:2], dtype=torch.float64)
        half = torch.arange(len(x)) % 2
        squares, controls, errors = [], [], []
        for rows, e in self._noise(task, t, x):
            clean = x[rows]
            z = alpha * clean + sigma * e
            cond = {} if labels is None else {"label": labels[rows].to(task.device)}
            with self._precision(task.device, alpha, sigma):
                x0 = denoiser(z.to(task.device), t, **cond).cpu().double()
            sums.index_put_((group[rows], half[rows]), x0, accumulate=True)
            counts.index_put_((group[rows], half[rows]), torch.ones(len(rows), dtype=torch.float64), accumulate=True)
            eps = (z.double() - alpha * x0) / sigma
            clean, e = clean.double(), e.double()
            squares.append(eps.square().flatten(1).mean(1))
            errors.append((clean - x0).square().flatten(1).mean(1))
            controls.append(torch.stack([e * e - 1, e * clean], 1).flatten(2).mean(2))
        y, control = torch.cat(squares), torch.cat(controls)
        counts = counts[(...,) + (None,) * (x.ndim - 1)]
        expected = torch.where(counts > 0, sums / counts.clamp(min=1), mean)
        means = [
            (e.double() * expected[group[rows], 1 - half[rows]]).flatten(1).mean(1)
            for rows, e in self._noise(task, t, x)
        ]
        gamma, error = regressed_mean(y, torch.cat([control, torch.cat(means)[:, None]], 1))
        return gamma, float(torch.cat(errors).mean()), error

    def _noise(self, task: TuningTask, t: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (rows, noise), deterministic in t."""
        generator = make_generator(task.seed + int(1e6 * float(t)))
        for rows in torch.arange(len(x)).split(self.batch):
            yield rows, torch.randn(x[rows].shape, generator=generator, dtype=x.dtype)

    def _precision(self, device: torch.device, alpha: float, sigma: float) -> contextlib.AbstractContextManager[Any]:
        """Autocast for the model evaluations at one time."""
        half = self.precision == "bf16" or (self.precision == "mixed" and sigma >= COARSE * alpha)
        return torch.autocast(device.type, torch.bfloat16, enabled=half)


def unwrap_denoiser(denoiser: nn.Module) -> nn.Module:
    """The denoiser without its wrappers."""
    while isinstance(denoiser, Wrapper):
        denoiser = denoiser.denoiser
    return denoiser


def regressed_mean(y: Tensor, control: Tensor) -> tuple[float, float]:
    """The mean of y (n,) and its standard error, with control variates (n, k) of mean 0 regressed out."""
    design = torch.cat([torch.ones(len(y), 1, dtype=y.dtype), control], 1)
    scale = design.square().mean(0).sqrt().clamp(min=1e-300)
    fit = torch.linalg.lstsq(design / scale, y[:, None], driver="gelsd").solution[:, 0] / scale
    residual = y - design @ fit
    return float(fit[0]), float(
        residual.square().sum().sqrt() / math.sqrt(len(y) * max(len(y) - control.shape[1] - 1, 1))
    )


def data_moments(x: Tensor) -> dict[str, Tensor]:
    """The statistics `mean` and, for images, `spectrum` of x (n, *S)."""
    mean = x.double().mean(0)
    return {"mean": mean, "spectrum": dct_spectrum(x.double() - mean)} if x.ndim == 4 else {"mean": mean}


def dct_spectrum(x: Tensor) -> Tensor:
    """The mean square (C, H, W) of the orthonormal DCT-II coefficients of x (n, C, H, W)."""
    rows, columns = (dct(size) for size in x.shape[-2:])
    return (rows @ x @ columns.T).square().mean(0)


def dct(size: int) -> Tensor:
    """The matrix (size, size) of the orthonormal DCT-II, float64: row k is a cosine of k half-periods."""
    k = torch.arange(size, dtype=torch.float64)
    table = torch.cos(math.pi / size * (k + 0.5) * k[:, None]) * math.sqrt(2 / size)
    table[0] /= math.sqrt(2)
    return table


def statistic_at(statistics: dict[str, Tensor], name: str, schedule: Schedule, times: Tensor) -> Tensor:
    """The measured `mse` or, from `gamma`, the variance C = q^2 (1 - gamma), interpolated to any times."""
    from ..samplers.analytic import curve, measured_table

    return curve(measured_table(statistics, name), schedule, name)(schedule.lam(times))
