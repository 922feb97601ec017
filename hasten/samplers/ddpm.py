"""Ancestral sampling of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers, nearest
from ..sampling import Query
from ..schedules.base import Schedule
from ._exponential import make_nodes


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling with a fixed variance, on any sub-grid of any schedule.

    From (alpha_r, sigma_r) to (alpha_s, sigma_s), with a = alpha_r/alpha_s and b = sigma_r^2 - a^2 sigma_s^2 (the
    skip-beta):

        z_s = (a sigma_s^2/sigma_r^2) z_r + (alpha_s b/sigma_r^2) x0 + sqrt(V) xi

    V = b sigma_s^2/sigma_r^2 for variance="small" (optimal for point data, equal to DDIM with eta = 1), V = b for
    "large" (optimal for N(0, I) data; on a schedule with alpha = 1 it adds noise that a narrow distribution cannot
    remove). No noise is added by the step into sigma = 0. Order 1 in law; NFE = steps.

    Reference: Ho, Jain, Abbeel 2020, 2006.11239; respacing: Nichol, Dhariwal 2021, 2102.09672.
    """

    variance: str = "small"
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise BadInput(f"DDPM(variance={self.variance!r}): {nearest(str(self.variance), ['small', 'large'])}")
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        return steps

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:
        path, z = make_nodes(schedule, times), x
        for r, s in zip(path, path[1:], strict=False):
            x0 = yield Query(z, r.t)
            if s.clean:
                z = s.alpha * x0
                continue
            a = r.alpha / s.alpha
            keep = a * (s.sigma / r.sigma) ** 2
            fresh = 1 - (a * s.sigma / r.sigma) ** 2  # b / sigma_r^2
            V = fresh * (s.sigma if self.variance == "small" else r.sigma) ** 2
            z = keep * z + (s.alpha * fresh) * x0 + torch.sqrt(V) * noise()
        return z
