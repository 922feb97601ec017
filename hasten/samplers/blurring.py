"""The reverse steps of blurring diffusion, a coefficient for each frequency."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers
from ..plan.basis import Basis
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._diagonal import diagonal_basis
from ._exponential import make_nodes


@dataclass(frozen=True)
class BlurringSampler(SamplerBase):
    """Denoise and deblur: the posterior of `z_s` given `z_t`, for each frequency of a `Blurring` process.

    With w the denoiser's output, the estimate of D_t x, in the cosine transform and for each frequency

        rho = (a_t d_t sigma_s) / (a_s d_s sigma_t),      k = (sigma_s / sigma_t) sqrt(1 - eta^2 + eta^2 rho^2)
        z_s = k z_t + (a_s d_s / d_t - a_t k) w + eta sigma_s sqrt(1 - rho^2) xi

    eta = 1 is the paper's sampler, `q(z_s | z_t, x)` with `x = w / d_t`; with sigma_max = 0 it is DDPM. eta = 0 adds no
    noise, as DDIM does. No noise is added by the step to t = 0. Order 1; NFE = steps.

    Args:
        eta: the amount of noise, in [0, 1].

    Raises:
        BadInput: for eta out of range.

    References:
        Hoogeboom, Salimans 2022, arXiv:2209.05557; eta: Song, Meng, Ermon 2020, arXiv:2010.02502.
    """

    eta: float = 1.0
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1
    processes: ClassVar[tuple[str, ...]] = ("Blurring",)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.eta <= 1:
            raise BadInput(f"BlurringSampler(eta={self.eta:g}): eta must be in [0, 1]")

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def basis_for(self, schedule: Schedule) -> Basis:
        """The cosines of the process's images, in groups of equal frequency."""
        return diagonal_basis(schedule)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        process: Any = schedule
        basis, path = self.basis_for(schedule), make_nodes(schedule, times)
        u, eta = basis.to(x), self.eta
        for r, s in pairwise(path):
            w = basis.to((yield Query(basis.back(u), r.t)))
            sharper = process.factor(s.t, basis.values) / process.factor(r.t, basis.values)  # d_s / d_t, >= 1
            if s.clean:
                u = (s.alpha * sharper) * w
                continue
            ratio = s.sigma / r.sigma
            rho = ratio * r.alpha / (s.alpha * sharper)
            keep = ratio * torch.sqrt((1 - eta**2) + (eta * rho) ** 2)
            u = keep * u + (s.alpha * sharper - r.alpha * keep) * w
            if eta:
                u = u + (eta * s.sigma * torch.sqrt(1 - rho**2)) * basis.to(noise())
        return basis.back(u)
