"""The variational bound of the likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choices, check_numbers
from ..predictions import precise, spread
from ..schedules.base import Schedule
from ._base import (
    NOISIEST,
    Likelihood,
    check_levels,
    check_schedule,
    decoder_log_probability,
    gaussian_bin_log_probability,
    level_indices,
    uniforms,
)


@dataclass(frozen=True)
class VariationalBound:
    """`-log P(x) <= reconstruction + prior + diffusion`, estimated with random times and noise.

        prior = KL(q(x_t | x) || N(0, alpha^2 + sigma^2)) at t_max
        diffusion = E_eps 1/2 int -dSNR/dt ||x - x0(x_t, t)||^2 dt          with continuous time, or
                  = sum_i 1/2 (SNR(t_{i-1}) - SNR(t_i)) ||x - x0(x_{t_i}, t_i)||^2     with `steps`
        reconstruction = -log P(x | x_t) at t_min

    SNR = alpha^2 / sigma^2. Continuous times are uniform in log SNR, which is the density that the weighting of
    ScoreFlow asks for, and stratified. Without levels the result is prior + diffusion + the entropy of q(x_t | x) at
    t_min: it bounds `-log p(x_t)` there, and is equal to its mean where the network is exact and continuous time is
    used.

    Args:
        steps: number T of transitions, on a uniform grid from `t_min` to `t_max`; of `Discrete` tables of N entries
            N - 1 are those of DDPM. None: continuous time.
        samples: times for each image, one evaluation each; with `steps` at most T, where the sum is complete.
        decoder: of data with levels: "softmax", of the noisy image alone (VDM); "gaussian", the mass of N(x0, q^2) in
            the bin of the level, q = sigma / alpha, of the network's output (DDPM).
        t_min: first time. None: the schedule's.
        prior_std: standard deviation of the prior at `t_max`. None: sqrt(alpha^2 + sigma^2), where samplers start.

    References:
        Kingma, Salimans, Poole, Ho 2021, arXiv:2107.00630; Song, Durkan, Murray, Ermon 2021, arXiv:2101.09258.
    """

    steps: int | None = None
    samples: int = 16
    decoder: str = "softmax"
    t_min: float | None = None
    prior_std: float | None = None

    def __post_init__(self) -> None:
        check_choices(self, decoder=("softmax", "gaussian"))
        if (self.steps is not None and self.steps < 1) or self.samples < 1:
            raise BadInput(f"bound needs steps and samples of 1 or more, found {self}")
        if self.prior_std is not None and not self.prior_std > 0:
            raise BadInput(f"bound needs prior_std > 0, found {self.prior_std}")
        check_numbers(self)

    @property
    def protocol(self) -> str:
        """How the figure is obtained, for reports."""
        time = "continuous time" if self.steps is None else f"{self.steps} steps"
        at = "" if self.t_min is None else f", t_min {self.t_min:g}"
        return f"variational bound, {time}, {self._count} times an image, {self.decoder} decoder{at}"

    def dequantisation(self, levels: int) -> str:
        """What is done with data of some levels, for reports."""
        return f"none: the {self.decoder} decoder has {levels} levels"

    @property
    def _count(self) -> int:
        return self.samples if self.steps is None else min(self.samples, self.steps)

    @torch.no_grad()
    def __call__(
        self, denoiser: nn.Module, x: Tensor, seeds: Sequence[int], levels: int | None = None, **cond: Any
    ) -> Likelihood:
        """The bound of each sample; arguments and errors as of `OdeLikelihood`, the seeds are of times and noise."""
        check_levels(levels)
        schedule: Schedule = denoiser.schedule  # type: ignore[assignment]
        start, end = self.times(schedule)
        k = None if levels is None else level_indices(x, levels)
        u, noise = uniforms(seeds, x.shape[1:])
        first = u.flatten(1)[:, 0]  # places every stratum of a sample
        x = precise(x)
        D, count = x[0].numel(), self._count
        diffusion = torch.zeros(len(x), dtype=torch.float64)
        for j in range(count):
            t, weight = self.weighted_times(schedule, (j + first) / count)
            diffusion += weight * self.error(denoiser, x, noise().to(x), t, **cond) / count
        alpha0, sigma0 = float(schedule.alpha(start)), float(schedule.sigma(start))
        parts = {"diffusion": diffusion, "prior": self.prior(schedule, x, end)}
        nfe = count
        if levels is None or k is None:
            entropy = 0.5 * D * math.log(2 * math.pi * math.e) + D * math.log(sigma0)
            parts["entropy"] = torch.full_like(diffusion, entropy)
        else:
            q, z = sigma0 / alpha0, x + sigma0 / alpha0 * noise().to(x)
            if self.decoder == "softmax":
                log_p = decoder_log_probability(z, k, levels, q)
            else:
                x0 = denoiser((z * alpha0).to(x), start, **cond)
                log_p, nfe = gaussian_bin_log_probability(precise(x0), q, k, levels), nfe + 1
            parts["reconstruction"] = -log_p.flatten(1).sum(1).double().cpu()
        return Likelihood(torch.stack(list(parts.values())).sum(0), parts, nfe)

    def times(self, schedule: Schedule) -> tuple[float, float]:
        """The first and last time, the latter before pure noise, where log SNR is finite."""
        start, end = check_schedule(schedule, self.t_min)
        if float(schedule.lam(end)) < NOISIEST:
            end = float(schedule.time(NOISIEST))
        return start, end

    def weighted_times(self, schedule: Schedule, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times of the quantiles `u` (B,) and their weights on `||eps - eps_hat||^2`, float64 (B,)."""
        start, end = self.times(schedule)
        if self.steps is None:
            high, low = 2 * float(schedule.lam(start)), 2 * float(schedule.lam(end))
            t = schedule.time(0.5 * (high + (low - high) * u)).clamp(start, end)
            return t, torch.full_like(u, 0.5 * (high - low))
        i = (u * self.steps).floor().clamp(max=self.steps - 1)
        s, t = (start + (end - start) * (i + one) / self.steps for one in (0, 1))
        return t, 0.5 * self.steps * torch.expm1(2 * (schedule.lam(s) - schedule.lam(t)))

    def error(self, denoiser: nn.Module, x: Tensor, eps: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """`||eps - eps_hat||^2 = SNR ||x - x0||^2`, (B,) float64, of the noise `eps` (B, *S) at times `t` (B,)."""
        schedule: Schedule = denoiser.schedule  # type: ignore[assignment]
        x_t = spread(schedule.alpha(t), x) * x + spread(schedule.sigma(t), x) * eps
        squares = (x - precise(denoiser(x_t, t, **cond))).flatten(1).square().sum(1).double().cpu()
        return torch.exp(2 * schedule.lam(t)) * squares

    def prior(self, schedule: Schedule, x: Tensor, end: float) -> Tensor:
        """KL(q(x_t | x) || prior) at the last time, (B,) float64."""
        alpha, sigma = float(schedule.alpha(end)), float(schedule.sigma(end))
        variance = alpha**2 + sigma**2 if self.prior_std is None else self.prior_std**2
        D, squares = x[0].numel(), x.flatten(1).square().sum(1).double().cpu()
        return 0.5 * (alpha**2 * squares / variance + D * (sigma**2 / variance - 1 - math.log(sigma**2 / variance)))
