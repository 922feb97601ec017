"""The variational bound of ancestral sampling with a fixed or learned variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choices, check_numbers
from ..predictions import precise, spread
from ..schedules.base import Schedule
from ._base import Likelihood, check_levels, check_schedule, gaussian_bin_log_probability, level_indices, uniforms
from ._learned_variance import interpolated_log_variance, transition, x0_and_variance
from .bound import VariationalBound


@dataclass(frozen=True)
class AncestralBound:
    """`-log P(x) <=` the bound of DDPM, for the reverse steps that the sampler `ddpm` takes on a uniform grid,

        KL(q(x_T | x) || prior) + sum_i KL(q(x_{i-1} | x_i, x) || N(mean, V_i)) - log P(x | x_1),

    the last by the mass of N(x0, V) in the bin of each level.

    Args:
        steps: T.
        samples: how many of the steps are evaluated for each image, at most T.
        variance: V of a step: "small", that of the posterior; "large", b; "learned", what the network predicts between
            the two. In the first step "small" is that of the second.
        clip: clip x0 to [-1, 1].

    References:
        Ho, Jain, Abbeel 2020, arXiv:2006.11239; Nichol, Dhariwal 2021, arXiv:2102.09672 (learned).
    """

    steps: int = 1000
    samples: int = 50
    variance: str = "small"
    clip: bool = True

    def __post_init__(self) -> None:
        check_choices(self, variance=("small", "large", "learned"))
        if self.steps < 2 or self.samples < 1:
            raise BadInput(f"ancestral_bound needs steps of 2 or more and samples of 1 or more, found {self}")
        check_numbers(self)

    @property
    def protocol(self) -> str:
        """How the figure is obtained, for reports."""
        seen = f"{min(self.samples, self.steps - 1)} of them and the last for each image"
        return f"variational bound of DDPM with {self.steps} steps, {seen}, {self.variance} variance"

    def dequantisation(self, levels: int) -> str:
        """What is done with data of some levels, for reports."""
        return f"none: the bins of a Gaussian, {levels} levels"

    @torch.no_grad()
    def __call__(
        self, denoiser: nn.Module, x: Tensor, seeds: Sequence[int], levels: int | None = 256, **cond: Any
    ) -> Likelihood:
        """The bound of each sample; arguments and errors as of `OdeLikelihood`."""
        check_levels(levels)
        if levels is None:
            raise BadInput("ancestral_bound is of data with levels: give levels")
        schedule: Schedule = denoiser.schedule  # type: ignore[assignment]
        _, end = check_schedule(schedule, None)
        k = level_indices(x, levels)
        u, noise = uniforms(seeds, x.shape[1:])
        first, x = u.flatten(1)[:, 0], precise(x)
        inner = self.steps - 1  # steps whose end is not the image
        count = min(self.samples, inner)
        diffusion = torch.zeros(len(x), dtype=torch.float64)
        for j in range(count):
            i = 2 + ((j + first) / count * inner).floor().clamp(max=inner - 1)
            eps = noise().to(x)
            x_t = (
                spread(schedule.alpha(i / self.steps * end), x) * x
                + spread(schedule.sigma(i / self.steps * end), x) * eps
            )
            x0, v = self.predict(denoiser, x_t, i / self.steps * end, cond)
            diffusion += inner / count * self.kl(schedule, x, x0, v, i, end).flatten(1).sum(1).double().cpu()
        one = torch.ones(len(x), dtype=torch.float64)
        t = one / self.steps * end
        x_t = spread(schedule.alpha(t), x) * x + spread(schedule.sigma(t), x) * noise().to(x)
        x0, v = self.predict(denoiser, x_t, t, cond)
        std = torch.exp(0.5 * self.log_variance(schedule, v, one, end))
        log_p = gaussian_bin_log_probability(x0, std, k, levels)
        parts = {
            "diffusion": diffusion,
            "prior": VariationalBound().prior(schedule, x, end),
            "reconstruction": -log_p.flatten(1).sum(1).double().cpu(),
        }
        return Likelihood(torch.stack(list(parts.values())).sum(0), parts, count + 1)

    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """x0, clipped, and v: 0 for "small", 1 for "large"."""
        if self.variance == "learned":
            x0, v = x0_and_variance(denoiser, x_t, t, **cond)
        else:
            x0 = denoiser(x_t, t, **cond)
            v = torch.full_like(x0, float(self.variance == "large"))
        return precise(x0.clamp(-1, 1) if self.clip else x0), precise(v)

    def log_variance(self, schedule: Schedule, v: Tensor, i: Tensor, end: float) -> Tensor:
        """log V (B, *S) of the steps i (B,), from 1."""
        _, _, large = transition(schedule, (i - 1) / self.steps * end, i / self.steps * end)
        known = i.clamp(min=2)  # the posterior of the first step has no variance
        _, small, _ = transition(schedule, (known - 1) / self.steps * end, known / self.steps * end)
        return interpolated_log_variance(v, spread(torch.maximum(large, small), v), spread(small, v))

    def kl(self, schedule: Schedule, x: Tensor, x0: Tensor, v: Tensor, i: Tensor, end: float) -> Tensor:
        """KL(q(x_{i-1} | x_i, x) || N(mean, V)) of each element (B, *S), i >= 2."""
        gain, small, _ = transition(schedule, (i - 1) / self.steps * end, i / self.steps * end)
        log_v = self.log_variance(schedule, v, i, end)
        ratio = spread(small.log(), x) - log_v
        return 0.5 * ((spread(gain, x) * (x - x0)) ** 2 * torch.exp(-log_v) + torch.expm1(ratio) - ratio)
