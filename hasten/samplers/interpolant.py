"""Sampling along the velocity between two sets of images."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers
from ..processes.interpolant import Interpolant
from ..sampling import Query, SamplerBase
from ..times import check_times


@dataclass(frozen=True)
class InterpolantSampler(SamplerBase):
    """Euler's or Heun's method for `dz = v dt` from the source at t = 1 to the image at t = 0, `v = (z - x0) / t`.

        Euler   z_s = z + (s - t) v(z, t)
        Heun    z_s = z + (s - t) (v(z, t) + v(z', s)) / 2,   z' the result of Euler's step

    A process with `diffusion` adds `sqrt(2 diffusion (t - s)) xi` to every step but the last. Heun's last step, into
    t = 0, is Euler's. Order 1 or 2 (in law with noise); NFE = steps, or 2 steps - 1.

    Args:
        order: 1 (Euler) or 2 (Heun).

    Raises:
        BadInput: for another order.

    References:
        Liu, Gong, Liu 2022, arXiv:2209.03003; Albergo, Boffi, Vanden-Eijnden 2023, arXiv:2303.08797.
    """

    order: int = 1
    linear: ClassVar[bool] = True
    processes: ClassVar[tuple[str, ...]] = ("Interpolant",)

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.order not in (1, 2):
            raise BadInput(f"interpolant has order 1 or 2, found {self.order}")

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return self.order * steps - (self.order == 2)

    def steps(  # type: ignore[override]
        self, schedule: Interpolant, x: Any, times: Tensor, noise: Callable[[], Any]
    ) -> Generator[Query, Any, Any]:
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        times, z = check_times(times), x
        for t, s in zip(times[:-1], times[1:], strict=True):
            x0 = yield Query(z, t)
            if s.item() == 0:
                return x0
            dt = s - t
            added = torch.sqrt(2 * schedule.diffusion * -dt) * noise() if schedule.diffusion else None
            euler = (s / t) * z - (dt / t) * x0
            euler = euler if added is None else euler + added
            if self.order == 1:
                z = euler
                continue
            half, end = dt / 2, (yield Query(euler, s))
            z = (1 + half / t) * z - (half / t) * x0 + (half / s) * euler - (half / s) * end
            z = z if added is None else z + added
        return z
