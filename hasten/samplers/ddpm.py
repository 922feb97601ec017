"""Ancestral sampling of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import check_choices, check_numbers
from ..likelihood._learned_variance import inner_denoiser, interpolated_log_variance, x0_and_variance
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._exponential import make_nodes


@dataclass(frozen=True)
class DDPM(SamplerBase):
    """Ancestral sampling with a fixed or learned variance, on any sub-grid of any schedule.

    From (alpha_r, sigma_r) to (alpha_s, sigma_s), with a = alpha_r/alpha_s and b = sigma_r^2 - a^2 sigma_s^2 (the
    skip-beta):

        z_s = (a sigma_s^2/sigma_r^2) z_r + (alpha_s b/sigma_r^2) x0 + sqrt(V) xi

    No noise is added by the step into sigma = 0. Order 1 in law; NFE = steps.

    Args:
        variance: "small", V = b sigma_s^2/sigma_r^2 (optimal for point data, equal to DDIM with eta = 1), or "large", V
            = b (optimal for N(0, I) data; on a schedule with alpha = 1 it adds noise that a narrow distribution cannot
            remove), or "learned", of a network that predicts log V between the two for each pixel (`improved_ddpm`;
            networks of diffusers with variance_type "learned_range").

    References:
        Ho, Jain, Abbeel 2020, arXiv:2006.11239; respacing: Nichol, Dhariwal 2021, arXiv:2102.09672.
    """

    variance: str = "small"
    why: ClassVar[str] = "its variance is the network's, and depends on the sample"
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_choices(self, variance=("small", "large", "learned"))
        check_numbers(self)

    @property
    def linear(self) -> bool:
        """Whether the variance is fixed."""
        return self.variance != "learned"

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The denoiser, with the learned variance where it is used."""
        if self.variance != "learned":
            return denoiser
        inner_denoiser(denoiser)  # refuses networks without
        return WithVariance(denoiser)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        path, z = make_nodes(schedule, times), x
        for r, s in zip(path, path[1:], strict=False):
            learned = self.variance == "learned" and not s.clean
            output: Any = yield Query(z, r.t, moments=True) if learned else Query(z, r.t)
            x0 = output[0] if learned else output
            if s.clean:
                z = s.alpha * x0
                continue
            a = r.alpha / s.alpha
            scale = a * (s.sigma / r.sigma) ** 2
            added = 1 - (a * s.sigma / r.sigma) ** 2  # b / sigma_r^2
            if learned:
                log_v = interpolated_log_variance(output[1], added * r.sigma**2, added * s.sigma**2)
                std = torch.exp(0.5 * log_v).to(z.dtype)
            else:
                std = torch.sqrt(added * (s.sigma if self.variance == "small" else r.sigma) ** 2)
            z = scale * z + (s.alpha * added) * x0 + std * noise()
        return z


class WithVariance(Wrapper):
    """A denoiser whose `moments` are x0 and the interpolation v of the learned variance."""

    def moments(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Tensor]:
        """(x0, v), each (B, *S)."""
        return x0_and_variance(self.denoiser, x_t, t, **cond)
