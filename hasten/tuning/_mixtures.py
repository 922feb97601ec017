"""A family of random Gaussian mixtures with their exact denoiser: what steps are tuned on when the model is unknown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..schedules.base import Schedule

__all__ = ["Family", "draw_family"]


@dataclass(frozen=True)
class _Ranges:
    """M mixtures in D dimensions with up to K modes, each of `rows` samples. Standard deviations along the axes fall as
    `(j + 1)^-a`, a up to `slope`; a mode is `within` times as wide as all; the whole has the deviation asked for, times
    a random factor of at most `exp(spread)`."""

    M: int = 16
    D: int = 12
    K: int = 24
    rows: int = 12
    slope: float = 1.2
    within: tuple[float, float] = (0.04, 0.6)
    spread: float = 0.5


class Family(nn.Module):
    """M mixtures at once: row m n + i of a batch (M n, D) is sample i of mixture m.

    `x0 = sum_k p_k [mu_k + alpha V_k / c_k (x_t - alpha mu_k)]`, c_k = alpha^2 V_k + sigma^2, as `GaussianMixture`.

    Args:
        weights: (M, K). means, variances: (M, K, D).
    """

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.log_weights, self.means, self.variances = weights.log(), means, variances
        self.schedule = schedule

    @property
    def size(self) -> int:
        """Mixtures, M."""
        return len(self.means)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x = x_t.reshape(self.size, -1, x_t.shape[-1])
        c = alpha**2 * self.variances + sigma**2
        off = x[:, :, None] - alpha * self.means[:, None]
        log_p = (self.log_weights - 0.5 * torch.log(c).sum(-1))[:, None] - 0.5 * (off * off / c[:, None]).sum(-1)
        p, gain = torch.softmax(log_p, -1), alpha * self.variances / c
        x0 = p @ (self.means * (1 - alpha * gain)) + (p @ gain) * x
        return x0.reshape(x_t.shape)

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """(M rows, D) samples of the data."""
        M, _, D = self.means.shape
        k = torch.multinomial(self.log_weights.exp(), rows, replacement=True, generator=generator)
        m = torch.arange(M)[:, None]
        noise = torch.randn(M, rows, D, generator=generator, dtype=torch.float64)
        return (self.means[m, k] + self.variances[m, k].sqrt() * noise).reshape(-1, D)


def draw_family(
    schedule: Schedule, std: float, seed: int, ranges: _Ranges | None = None
) -> tuple[Family, Tensor, Tensor]:
    """Random mixtures, and samples of their data (M rows, D) with standard normal noise of that shape.

    std: root mean square deviation of a coordinate, in the range of the network.
    """
    r = _Ranges() if ranges is None else ranges
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)

    axis = (torch.arange(r.D, dtype=torch.float64) + 1) ** -uniform(0, r.slope, r.M, 1, 1)
    width = torch.exp(uniform(math.log(r.within[0]), math.log(r.within[1]), r.M, 1, 1))
    modes = torch.exp(uniform(math.log(3), math.log(r.K), r.M, 1)).round()
    weights = uniform(0.5, 1.5, r.M, r.K).where(torch.arange(r.K) < modes, torch.tensor(1e-30, dtype=torch.float64))
    weights = weights / weights.sum(1, keepdim=True)
    means = torch.randn(r.M, r.K, r.D, generator=g, dtype=torch.float64) * axis
    means = means - torch.einsum("mk,mkd->md", weights, means)[:, None]
    variances = (width * axis) ** 2 * uniform(0.5, 1.5, r.M, r.K, r.D)
    total = torch.einsum("mk,mkd->md", weights, means**2 + variances).mean(1).sqrt()
    scale = (std / total * torch.exp(uniform(-r.spread, r.spread, r.M)))[:, None, None]
    family = Family(weights, means * scale, variances * scale**2, schedule)
    data = family.sample(r.rows, g)
    return family, data, torch.randn(data.shape, generator=g, dtype=torch.float64)
