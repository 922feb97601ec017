"""Random Gaussian mixtures with their exact denoiser, to tune steps on independently of a model."""

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
    """Ranges of the random parameters: M mixtures in D dimensions with up to K modes, `rows` samples each.

    Standard deviations along the axes decrease as `(j + 1)^-a`, a up to `slope`; the width of a mode relative to the
    mixture is in `within`; the mixture has the requested deviation times a random factor of at most `exp(spread)`.
    """

    M: int = 16
    D: int = 12
    K: int = 24
    rows: int = 12
    slope: float = 1.2
    within: tuple[float, float] = (0.04, 0.6)
    spread: float = 0.5


class Family(nn.Module):
    """The exact denoiser of M mixtures at once: row m n + i of a batch (M n, D) is sample i of mixture m.

    `x0 = sum_k p_k [mu_k + alpha V_k / c_k (x_t - alpha mu_k)]`, c_k = alpha^2 V_k + sigma^2, as `GaussianMixture`.

    Args:
        weights: (M, K).
        means, variances: (M, K, D).
        schedule: of the diffusion.
    """

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.log_weights, self.means, self.variances = weights.log(), means, variances
        self.schedule = schedule

    @property
    def size(self) -> int:
        """The number of mixtures, M."""
        return len(self.means)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """x0 (M n, D) of x_t (M n, D) at the time t ()."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x = x_t.reshape(self.size, -1, x_t.shape[-1])
        c = alpha**2 * self.variances + sigma**2
        off = x[:, :, None] - alpha * self.means[:, None]
        log_p = (self.log_weights - 0.5 * torch.log(c).sum(-1))[:, None] - 0.5 * (off * off / c[:, None]).sum(-1)
        p, gain = torch.softmax(log_p, -1), alpha * self.variances / c
        x0 = p @ (self.means * (1 - alpha * gain)) + (p @ gain) * x
        return x0.reshape(x_t.shape)

    def sample(self, rows: int, generator: torch.Generator) -> Tensor:
        """Draw `rows` samples of each mixture, (M rows, D)."""
        M, _, D = self.means.shape
        k = torch.multinomial(self.log_weights.exp(), rows, replacement=True, generator=generator)
        m = torch.arange(M)[:, None]
        noise = torch.randn(M, rows, D, generator=generator, dtype=torch.float64)
        return (self.means[m, k] + self.variances[m, k].sqrt() * noise).reshape(-1, D)


def draw_family(
    schedule: Schedule, std: float, seed: int, ranges: _Ranges | None = None
) -> tuple[Family, Tensor, Tensor]:
    """Draw random mixtures.

    Args:
        schedule: of the diffusion.
        std: root mean square deviation of a coordinate, in the units of the network.
        seed: of the draws.
        ranges: of the parameters. Default: `_Ranges()`.

    Returns:
        The mixtures, samples of their data (M rows, D) and standard normal noise of that shape.
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
