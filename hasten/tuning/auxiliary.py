"""Fit a density of z_T to start sampling from, and choose the time T."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_numbers
from ..nets.density import MixtureDensity
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import levels as level_range
from ..utils.random import make_generator
from ._task import Tuned, Tuner, TuningTask

__all__ = ["AuxiliaryDensity", "kl_divergence", "fit_density", "fit_mixture", "score_cost"]

GAUSS = ((-math.sqrt(0.6), 5 / 9), (0.0, 8 / 9), (math.sqrt(0.6), 5 / 9))  # points and weights on [-1, 1], order 5


@dataclass(frozen=True)
class AuxiliaryDensity(Tuner):
    """The part "auxiliary" for the start of that name: nu(z_T) by maximum likelihood, at the T with the best bound.

    At each of several times T a density nu is fitted to z_T. In nats, up to a constant that does not depend on T, minus
    the bound on the log likelihood is

        C(T) = KL(q(z_T | x) || nu) + int_{lam(T)} E ||x - x0(z_t)||^2 e^(2 lam) dlam

    averaged over held-out images. The first term is `-E log nu(z_T) - D/2 log(2 pi e sigma^2)`, the second the cost of
    the denoiser over the times below T, here from the smallest of the levels. If nu and the denoiser were exact, C
    would be the same for all T. Starting from pure noise has only the second term.

    `task.n` images are used, by default 20,000; the last tenth (at most 500) is held out. Without labels every class
    gets the density of all images. The score is that of the denoiser without guidance. Figures: `time`, `level`, C per
    dimension at each level and from pure noise (`cost_noise`), and the contribution of the density to it.

    Args:
        levels: noise levels q = sigma / alpha at which C is computed.
        level: use this one regardless of C.
        rank, components: of the density, see `MixtureDensity`: K Gaussians per class in the leading `rank` directions.
            One is fitted without drawing noise, so that it is better than several where the noise has merged their
            modes.
        iterations: of expectation maximisation, for more than one component.

    Raises:
        BadInput: for options out of range.

    References:
        Franzese, Rossi, Yang, Finamore, Rossi, Filippone, Michiardi 2022, arXiv:2206.05173.
    """

    levels: tuple[float, ...] = (2.0, 3.0, 4.5, 7.0, 10.0, 15.0, 30.0)
    level: float | None = None
    rank: int = 64
    components: int = 1
    iterations: int = 40
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.levels or not all(q > 0 for q in self.levels) or (self.level is not None and not self.level > 0):
            raise BadInput(f"auxiliary needs levels > 0, found {self.levels} and level={self.level}")
        if self.rank < 1 or self.components < 1 or self.iterations < 1:
            raise BadInput("auxiliary needs rank, components and iterations of at least 1")
        check_numbers(self)

    def tune(self, task: TuningTask) -> Tuned:
        """Fit the part "auxiliary".

        Raises:
            BadInput: without images, and for levels that the schedule does not have.
        """
        if task.images is None:
            raise BadInput("auxiliary learns from images: give --data, a folder of them")
        x, label = task.images(task.n or 20_000)
        if len(x) < 20:
            raise BadInput(f"auxiliary needs at least 20 images, found {len(x)}")
        x, classes = x.float().cpu(), task.classes
        label = None if label is None or not classes else label.cpu()
        held = min(len(x) // 10, 500)
        levels = sorted({*self.levels, *(() if self.level is None else (self.level,))})
        times = self._times(task.schedule, levels)
        D, noise = x[0].numel(), make_generator(task.seed)
        e = torch.randn(len(x), *task.shape, generator=noise)
        densities, costs = [], []
        figures: dict[str, Any] = {}
        known = label
        if label is None and task.null_label is not None and classes:
            known = torch.full((len(x),), task.null_label)
        score = score_cost(
            unguided(task.denoiser), levels, x[-held:], None if known is None else known[-held:], e[-held:]
        )
        rows = torch.full((len(x),), classes) if classes and label is None else label
        train_rows, held_rows = (None, None) if rows is None else (rows[:-held], rows[-held:])
        for k, (q, t) in enumerate(zip(levels, times)):
            alpha, sigma = float(task.schedule.alpha(t)), float(task.schedule.sigma(t))
            nu = MixtureDensity(task.shape, classes, min(self.rank, D), self.components, float(t))
            fit_density(nu, alpha * x[:-held], sigma, train_rows, self.iterations, task.seed)
            densities.append(nu)
            z = alpha * x[-held:] + sigma * e[-held:]
            kl = kl_divergence(nu, z, held_rows, sigma)
            costs.append((kl + float(score[k])) / D)
            figures |= {f"cost_{q:g}": costs[-1], f"divergence_{q:g}": kl / D}
            task.tick("density", k + 1, len(levels), costs[-1])
        best = levels.index(self.level) if self.level is not None else min(range(len(levels)), key=costs.__getitem__)
        result: dict[str, Any] = {"time": float(times[best]), "level": levels[best], "cost_noise": float(score[-1]) / D}
        return Tuned(parts={"auxiliary": densities[best].eval()}, figures={**result, **figures})

    def _times(self, schedule: Schedule, levels: list[float]) -> Tensor:
        """The times of ascending noise levels."""
        highest = level_range(schedule, schedule.t_max, schedule.t_min)[0]
        if levels[-1] > highest * (1 + 1e-9):
            raise BadInput(f"auxiliary: this schedule ends at the level {highest:.4g}, got {levels[-1]:g}")
        return schedule.time(-torch.log(torch.tensor(levels, dtype=torch.float64)))


def fit_density(
    nu: MixtureDensity, mean_z: Tensor, sigma: float, label: Tensor | None, iterations: int = 40, seed: int = 0
) -> None:
    """Fit `nu`, in place, to z = mean_z + sigma e by maximum likelihood, for each class and for all ("no class").

    The noise is averaged over exactly in the centres, outside the basis and, for one component, in the covariance; for
    several components it is drawn once per image and direction. A class of no more images than the rank gets the
    density of all.

    Args:
        nu: the density.
        mean_z: alpha x (n, *S).
        sigma: of the noise.
        label: (n,) or None.
        iterations: of expectation maximisation.
        seed: of the draws.
    """
    flat = mean_z.double().flatten(1)
    total, (D, rank), noise = flat.mean(0), nu.basis.shape, sigma**2
    _, vectors = torch.linalg.eigh((flat - total).T @ (flat - total))
    nu.basis.copy_(vectors.flip(1)[:, :rank])
    generator = make_generator(seed)
    for c in (nu.classes, *range(nu.classes)):
        own = flat if c == nu.classes or label is None else flat[label == c]
        if len(own) <= rank:
            for buffer in (nu.centre, nu.weight, nu.mean, nu.factor, nu.rest):
                buffer[c] = buffer[nu.classes]
            continue
        off = own - own.mean(0)
        y = off @ nu.basis
        residual = (off.square().sum() - y.square().sum()).clamp(min=0) / max(len(own) * (D - rank), 1)
        if nu.weight.shape[1] == 1:
            weight, mean = y.new_ones(1), y.new_zeros(1, rank)
            covariance = (y.T @ y / len(y) + noise * torch.eye(rank, dtype=y.dtype))[None]
        else:
            y = y + sigma * torch.randn(y.shape, generator=generator, dtype=y.dtype)
            weight, mean, covariance = fit_mixture(y, nu.weight.shape[1], noise, iterations, generator)
        nu.centre[c], nu.weight[c], nu.mean[c] = own.mean(0), weight, mean
        nu.factor[c] = torch.linalg.cholesky(covariance)
        nu.rest[c] = (residual + noise).sqrt()


def fit_mixture(
    y: Tensor, components: int, minimum: float, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a Gaussian mixture by expectation maximisation, with k-means++ initialisation.

    The likelihood does not decrease, except where an eigenvalue is clamped.

    Args:
        y: data (n, r).
        components: K.
        minimum: of the eigenvalues of the covariances.
        iterations: of expectation maximisation.
        generator: of the initialisation.

    Returns:
        Weights (K,), means (K, r) and covariances (K, r, r).
    """
    n, r = y.shape
    total = clamp_eigenvalues(torch.cov(y.T, correction=0).reshape(r, r), minimum)
    if components == 1:
        return y.new_ones(1), y.mean(0, keepdim=True), total[None]
    centres = [y[int(torch.randint(n, (), generator=generator))]]
    while len(centres) < components:
        distance = torch.stack([(y - c).square().sum(1) for c in centres]).amin(0)
        centres.append(y[int(torch.multinomial(distance, 1, generator=generator))])
    mean, covariance = torch.stack(centres), total.repeat(components, 1, 1)
    weight = y.new_full((components,), 1 / components)
    for _ in range(iterations):
        factor = torch.linalg.cholesky(covariance)
        u = torch.linalg.solve_triangular(factor, (y - mean[:, None]).mT, upper=False)
        log_p = weight.log()[:, None] - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)[:, None]
        p = torch.softmax(log_p - 0.5 * u.square().sum(1), 0)  # (K, n)
        mass = p.sum(1).clamp(min=1e-8)
        weight, mean = mass / mass.sum(), (p @ y) / mass[:, None]
        off = y - mean[:, None]
        covariance = torch.stack(
            [clamp_eigenvalues((s[:, None] * o).T @ o / m, minimum) for s, o, m in zip(p, off, mass)]
        )
    return weight, mean, covariance


def unguided(denoiser: Any) -> nn.Module:
    """The denoiser without its classifier-free guidance."""
    while "guide" in vars(denoiser) and "denoiser" in denoiser._modules:
        denoiser = denoiser.denoiser
    return denoiser


def clamp_eigenvalues(covariance: Tensor, minimum: float) -> Tensor:
    """Clamp the eigenvalues of a symmetric matrix from below."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return (vectors * values.clamp(min=minimum)) @ vectors.mT


@torch.no_grad()
def kl_divergence(nu: MixtureDensity, z: Tensor, label: Tensor | None, sigma: float) -> float:
    """KL(q(z_T | x) || nu) in nats, averaged over images, from one draw of z_T for each, z (n, *S)."""
    D = z[0].numel()
    return float(-nu.log_prob(z, label).mean()) - 0.5 * D * (math.log(2 * math.pi * sigma**2) + 1)


@torch.no_grad()
def score_cost(denoiser: Any, levels: list[float], x: Tensor, label: Tensor | None, e: Tensor) -> Tensor:
    """int E ||x - x0(z_t)||^2 e^(2 lam) dlam from each level down to the first, and last from pure noise.

    By three-point Gauss quadrature between levels; beyond the last the error is taken to be constant.

    Args:
        denoiser: with `.schedule`.
        levels: ascending noise levels q.
        x: images (n, *S).
        label: (n,) or None.
        e: noise (n, *S).

    Returns:
        (len(levels) + 1,) float64, nats.
    """
    schedule: Schedule = denoiser.schedule
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    costs = [0.0]

    def error(lam: float) -> float:
        t, total = schedule.time(lam), 0.0
        alpha, sigma = (spread(f(t), x) for f in (schedule.alpha, schedule.sigma))
        for first in range(0, len(x), 64):
            batch = slice(first, first + 64)
            z = (alpha * x[batch] + sigma * e[batch]).to(x.dtype).to(device)
            cond = {} if label is None else {"label": label[batch].to(device)}
            total += float((denoiser(z, t, **cond).cpu().double() - x[batch]).square().sum())
        return total / len(x)

    for q, above in zip(levels, levels[1:]):
        middle, half = -0.5 * math.log(q * above), 0.5 * math.log(above / q)
        nodes = ((middle + half * u, w) for u, w in GAUSS)
        costs.append(costs[-1] + half * sum(w * math.exp(2 * lam) * error(lam) for lam, w in nodes))
    lam = -math.log(levels[-1])
    costs.append(costs[-1] + 0.5 * math.exp(2 * lam) * error(lam))
    return torch.tensor(costs, dtype=torch.float64)
