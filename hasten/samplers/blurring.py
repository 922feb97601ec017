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
        z_s = k z_t + (g a_s d_s / d_t - a_t k) w + eta sigma_s sqrt(1 - rho^2) xi

    eta = 1 with g = 1 is the paper's sampler, `q(z_s | z_t, x)` with `x = w / d_t`; with sigma_max = 0 it is DDPM. eta
    = 0 adds no noise, as DDIM does. A long step divides by a d_t of a thousandth, and with w the errors of the network
    grow a thousandfold, so it sharpens by the gain of a Wiener filter,

        g = (1 + kappa) / (1 + kappa / d_t^2),            kappa = shrink sigma_t^2

    which is 1 where nothing is blurred. No noise is added by the step to t = 0. Order 1 (with shrink = 0); NFE = steps.

    Args:
        eta: the amount of noise, in [0, 1].
        shrink: the squared error of the network's noise relative to the variance of the data, >= 0; 0: the paper's
            sampler, for hundreds of steps.

    Raises:
        BadInput: for eta out of range.

    References:
        Hoogeboom, Salimans 2022, arXiv:2209.05557; eta: Song, Meng, Ermon 2020, arXiv:2010.02502.
    """

    eta: float = 1.0
    shrink: float = 0.01
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
            d_t, d_s = (process.factor(node.t, basis.values) for node in (r, s))
            sharper = d_s / d_t  # >= 1
            kappa = self.shrink * r.sigma**2
            gain = sharper * (1 + kappa) / (1 + kappa / d_t**2)
            if s.clean:
                u = (s.alpha * gain) * w
                continue
            ratio = s.sigma / r.sigma
            rho = ratio * r.alpha / (s.alpha * sharper)
            keep = ratio * torch.sqrt((1 - eta**2) + (eta * rho) ** 2)
            u = keep * u + (s.alpha * gain - r.alpha * keep) * w
            if eta:
                u = u + (eta * s.sigma * torch.sqrt(1 - rho**2)) * basis.to(noise())
        return basis.back(u)
