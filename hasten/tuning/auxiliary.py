"""The density that sampling can begin from, and the time where it should."""

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
from ..times import levels
from ..utils.random import make_generator
from ._task import Tuned, TuningTask

__all__ = ["AuxiliaryDensity", "kl_divergence", "fit_density", "fit_mixture", "score_cost"]

GAUSS = ((-math.sqrt(0.6), 5 / 9), (0.0, 8 / 9), (math.sqrt(0.6), 5 / 9))  # points and weights on [-1, 1], order 5


@dataclass(frozen=True)
class AuxiliaryDensity:
    """The part "auxiliary" for the start of that name: nu(z_T) fitted by maximum likelihood at each of several times T,
    and the T at which the bound on the likelihood is best. In nats, up to what no T changes, minus the bound is

        C(T) = KL(q(z_T | x) || nu) + int_{lam(T)} E ||x - x0(z_t)||^2 e^(2 lam) dlam

    both averaged over held-out images. The first term is `-E log nu(z_T) - D/2 log(2 pi e sigma^2)`, the second the
    cost of the denoiser over the times below T, here counted from the smallest level asked for. Were nu and the
    denoiser exact, C would be the same for all T. To begin at pure noise costs only the second term.

    Args:
        levels: of the noise, q = sigma / alpha, at which C is found.
        level: begin at this one, whatever C says.
        rank, components: of the density, see `MixtureDensity`: K Gaussians a class in the leading `rank` directions.
            One is fitted without drawing any noise, so that it beats several where the noise has made their mixture
            one.
        iterations: of expectation maximisation, for more than one component.

    Images: `task.n` of the data, by default 20,000; the last tenth (at most 500) is held out. Without labels every
    class gets the density of all. The score is that of the denoiser without guidance. Figures: `time`, `level`,
    C per dimension at each level and from pure noise (`cost_noise`), and the density's share of it.

    Reference: Franzese, Rossi, Yang, Finamore, Rossi, Filippone, Michiardi 2022, 2206.05173.
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
        """Raises BadInput without images, and for levels that the schedule does not have."""
        if task.images is None:
            raise BadInput("auxiliary learns from images: give --data, a folder of them")
        x, label = task.images(task.n or 20_000)
        if len(x) < 20:
            raise BadInput(f"auxiliary needs at least 20 images, found {len(x)}")
        x, classes = x.float().cpu(), int(getattr(task.denoiser, "null_label", None) or 0)
        if classes:
            label = torch.full((len(x),), classes) if label is None else label.cpu()
        else:
            label = None
        held = min(len(x) // 10, 500)
        asked = sorted({*self.levels, *(() if self.level is None else (self.level,))})
        times = self._times(task.schedule, asked)
        D, noise = x[0].numel(), make_generator(task.seed)
        e = torch.randn(len(x), *task.shape, generator=noise)
        fitted, costs = [], []
        figures: dict[str, Any] = {}
        score = score_cost(
            unguided(task.denoiser), asked, x[-held:], None if label is None else label[-held:], e[-held:]
        )
        known = None if label is None else label[:-held]
        for k, (q, t) in enumerate(zip(asked, times)):
            alpha, sigma = float(task.schedule.alpha(t)), float(task.schedule.sigma(t))
            nu = MixtureDensity(task.shape, classes, min(self.rank, D), self.components, float(t))
            fit_density(nu, alpha * x[:-held], sigma, known, self.iterations, task.seed)
            fitted.append(nu)
            z = alpha * x[-held:] + sigma * e[-held:]
            gap = kl_divergence(nu, z, None if label is None else label[-held:], sigma)
            costs.append((gap + float(score[k])) / D)
            figures |= {f"cost_{q:g}": costs[-1], f"divergence_{q:g}": gap / D}
            task.tick("density", k + 1, len(asked), costs[-1])
        best = asked.index(self.level) if self.level is not None else min(range(len(asked)), key=costs.__getitem__)
        chosen: dict[str, Any] = {"time": float(times[best]), "level": asked[best], "cost_noise": float(score[-1]) / D}
        return Tuned(parts={"auxiliary": fitted[best].eval()}, figures={**chosen, **figures})

    def _times(self, schedule: Schedule, asked: list[float]) -> Tensor:
        highest = levels(schedule, schedule.t_max, schedule.t_min)[0]
        if asked[-1] > highest * (1 + 1e-9):
            raise BadInput(f"auxiliary: this schedule ends at the level {highest:.4g}, asked for {asked[-1]:g}")
        return schedule.time(-torch.log(torch.tensor(asked, dtype=torch.float64)))


def fit_density(
    nu: MixtureDensity, mean_z: Tensor, sigma: float, label: Tensor | None, iterations: int = 40, seed: int = 0
) -> None:
    """Fill `nu` with the likeliest densities of z = mean_z + sigma e, of each class and of all (the row of "no class").

    mean_z: alpha x (n, *S). The noise is averaged over exactly in the centres, in what lies outside the basis and, for
    one component, in the covariance; for several it is drawn, once for each image and direction. A class of no more
    images than the rank takes the density of all.
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
        across = (off.square().sum() - y.square().sum()).clamp(min=0) / max(len(own) * (D - rank), 1)
        if nu.weight.shape[1] == 1:
            weight, mean = y.new_ones(1), y.new_zeros(1, rank)
            covariance = (y.T @ y / len(y) + noise * torch.eye(rank, dtype=y.dtype))[None]
        else:
            y = y + sigma * torch.randn(y.shape, generator=generator, dtype=y.dtype)
            weight, mean, covariance = fit_mixture(y, nu.weight.shape[1], noise, iterations, generator)
        nu.centre[c], nu.weight[c], nu.mean[c] = own.mean(0), weight, mean
        nu.factor[c] = torch.linalg.cholesky(covariance)
        nu.rest[c] = (across + noise).sqrt()


def fit_mixture(
    y: Tensor, components: int, least: float, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (K,), means (K, r) and covariances (K, r, r) by expectation maximisation; eigenvalues at least `least`.

    It begins from points of the data far apart (each is drawn with probability proportional to its squared distance
    from those drawn before). The likelihood never falls, but where `least` cuts an eigenvalue off.
    """
    n, r = y.shape
    whole = clamp_eigenvalues(torch.cov(y.T, correction=0).reshape(r, r), least)
    if components == 1:
        return y.new_ones(1), y.mean(0, keepdim=True), whole[None]
    chosen = [y[int(torch.randint(n, (), generator=generator))]]
    while len(chosen) < components:
        away = torch.stack([(y - c).square().sum(1) for c in chosen]).amin(0)
        chosen.append(y[int(torch.multinomial(away, 1, generator=generator))])
    mean, covariance = torch.stack(chosen), whole.repeat(components, 1, 1)
    weight = y.new_full((components,), 1 / components)
    for _ in range(iterations):
        factor = torch.linalg.cholesky(covariance)
        u = torch.linalg.solve_triangular(factor, (y - mean[:, None]).mT, upper=False)
        log_p = weight.log()[:, None] - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)[:, None]
        share = torch.softmax(log_p - 0.5 * u.square().sum(1), 0)  # (K, n)
        mass = share.sum(1).clamp(min=1e-8)
        weight, mean = mass / mass.sum(), (share @ y) / mass[:, None]
        off = y - mean[:, None]
        covariance = torch.stack(
            [clamp_eigenvalues((s[:, None] * o).T @ o / m, least) for s, o, m in zip(share, off, mass)]
        )
    return weight, mean, covariance


def unguided(denoiser: Any) -> nn.Module:
    """The denoiser inside its classifier-free guidance: the score whose likelihood is asked for."""
    while "guide" in vars(denoiser) and "denoiser" in denoiser._modules:
        denoiser = denoiser.denoiser
    return denoiser


def clamp_eigenvalues(covariance: Tensor, least: float) -> Tensor:
    """A symmetric matrix with its eigenvalues raised to at least `least`."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return (vectors * values.clamp(min=least)) @ vectors.mT


@torch.no_grad()
def kl_divergence(nu: MixtureDensity, z: Tensor, label: Tensor | None, sigma: float) -> float:
    """KL(q(z_T | x) || nu) in nats, averaged over the images behind z (n, *S): one draw of z_T for each."""
    D = z[0].numel()
    return float(-nu.log_prob(z, label).mean()) - 0.5 * D * (math.log(2 * math.pi * sigma**2) + 1)


@torch.no_grad()
def score_cost(denoiser: nn.Module, asked: list[float], x: Tensor, label: Tensor | None, e: Tensor) -> Tensor:
    """int E ||x - x0(z_t)||^2 e^(2 lam) dlam from each of the ascending levels q down to the first, and last from pure
    noise: (len(asked) + 1,) float64, nats. By three Gauss points between levels; beyond the last the error is held."""
    schedule: Schedule = denoiser.schedule  # type: ignore[assignment]
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    total = [0.0]

    def error(lam: float) -> float:
        t, found = schedule.time(lam), 0.0
        alpha, sigma = (spread(f(t), x) for f in (schedule.alpha, schedule.sigma))
        for first in range(0, len(x), 64):
            part = slice(first, first + 64)
            z = (alpha * x[part] + sigma * e[part]).to(x.dtype).to(device)
            cond = {} if label is None else {"label": label[part].to(device)}
            found += float((denoiser(z, t, **cond).cpu().double() - x[part]).square().sum())
        return found / len(x)

    for q, above in zip(asked, asked[1:]):
        middle, half = -0.5 * math.log(q * above), 0.5 * math.log(above / q)
        nodes = ((middle + half * u, w) for u, w in GAUSS)
        total.append(total[-1] + half * sum(w * math.exp(2 * lam) * error(lam) for lam, w in nodes))
    lam = -math.log(asked[-1])
    total.append(total[-1] + 0.5 * math.exp(2 * lam) * error(lam))
    return torch.tensor(total, dtype=torch.float64)
