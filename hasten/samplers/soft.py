"""Samplers of processes with a linear corruption and a little noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import check_choices, check_numbers
from ..plan.basis import Basis
from ..sampling import Query, SamplerBase
from ..schedules.base import Schedule
from ._diagonal import diagonal_basis
from ._exponential import make_nodes


@dataclass(frozen=True)
class SoftSampler(SamplerBase):
    """Undo the corruption of a `Soft` process step by step; x0 is the denoiser's output at z_t.

        momentum:  z_s = z_t + (C_s - C_t) x0 + (sigma_t^2 - sigma_s^2) S + sqrt(sigma_t^2 - sigma_s^2) xi
        ode:       z_s = z_t + (C_s - C_t) x0 + (1 - sigma_s / sigma_t) (C_t x0 - z_t)
        cold:      z_s = z_t + (C_s - C_t) x0
        naive:     z_s = C_s x0 + noise sigma_s xi

    with the score `S = (C_t x0 - z_t) / sigma_t^2`. Momentum and ode converge to the data, naive does not: it forgets
    what it has seen of z_t. cold is TACoS, for processes of (nearly) constant noise; naive with noise = 1.25 is the
    step of inverse heat dissipation. No noise is added by the step to t = 0. Order 1 (naive: none); NFE = steps.

    Args:
        form: "momentum", "ode", "cold" or "naive".
        noise: of the naive form, relative to the noise of the process, >= 0.

    References:
        Daras, Delbracio, Talebi, Dimakis, Milanfar 2022, arXiv:2209.05442; TACoS: Bansal et al. 2022, arXiv:2208.09392;
        heat dissipation: Rissanen, Heinonen, Solin 2022, arXiv:2206.13397.
    """

    form: str = "momentum"
    noise: float = 1.0
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1
    processes: ClassVar[tuple[str, ...]] = ("Soft",)

    def __post_init__(self) -> None:
        check_choices(self, form=("momentum", "ode", "cold", "naive"))
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def basis_for(self, schedule: Schedule) -> Basis:
        """The coordinates that the corruption multiplies, in groups of equal factors."""
        return diagonal_basis(schedule)

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        process: Any = schedule
        basis, path = self.basis_for(schedule), make_nodes(schedule, times)
        u = basis.to(x)
        for r, s in pairwise(path):
            x0 = basis.to((yield Query(basis.back(u), r.t)))
            before, after = (process.factor(node.t, basis.values) for node in (r, s))  # c_t, c_s
            if self.form == "naive":
                u = after * x0
                scale = self.noise * s.sigma
            else:
                ratio = s.sigma / r.sigma
                removed = 0 * ratio if self.form == "cold" else 1 - (ratio**2 if self.form == "momentum" else ratio)
                u = (1 - removed) * u + (after - before + removed * before) * x0
                scale = r.sigma * torch.sqrt(removed) if self.form == "momentum" else 0.0 * s.sigma
            if not s.clean and scale.item() > 0:
                u = u + scale * basis.to(noise())
        return basis.back(u)


def heat_noise(sigma: float, mse: float) -> float:
    """The `noise` of the naive form that makes the evidence bound of inverse heat dissipation largest:
    `delta / sigma = sqrt(1 + mse / sigma^2)`.

    A step's term of the bound, `(D (sigma^2 / delta^2 - 1 + 2 log(delta / sigma)) + |error|^2 / delta^2) / 2`, is
    smallest at `delta^2 = sigma^2 + mse`.

    Args:
        sigma: the noise of the process, > 0.
        mse: the mean squared error of the less blurred image, per pixel.
    """
    return math.sqrt(1 + mse / sigma**2)
