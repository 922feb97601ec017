"""Sampling of a diffusion Schroedinger bridge."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import check_choices, check_numbers
from ..processes.dsbm import DSBM
from ..sampling import Query, SamplerBase
from ..times import check_times

VARIANCES = ("brownian", "bridge")


@dataclass(frozen=True)
class DSBMSampler(SamplerBase):
    """The Markov process of a `DSBM` model, from the source at t = 1 to the image at t = 0:

        z_s = z_t + (1 - s / t) (x0 - z_t) + noise sqrt(v) xi

    with v = t - s, that of the Brownian motion ("brownian": Euler-Maruyama), or v = s (t - s) / t, the variance of the
    bridge to x0 ("bridge"). x0 is a mean, so that the second loses variance where steps are few: from a normal set of
    variance 1 to another, with 20 steps, it ends at .87, the first at .97. The last step adds no noise. Order 1 in law;
    NFE = steps.

    Args:
        variance: "brownian" or "bridge".

    Raises:
        BadInput: for another variance.

    References:
        Shi et al. 2023, arXiv:2303.16852; De Bortoli et al. 2021, arXiv:2106.01357.
    """

    variance: str = "brownian"
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1
    processes: ClassVar[tuple[str, ...]] = ("DSBM",)

    def __post_init__(self) -> None:
        check_choices(self, variance=VARIANCES)
        check_numbers(self)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: DSBM, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:  # type: ignore[override]
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        times, z = check_times(times), x
        for t, s in zip(times[:-1], times[1:], strict=True):
            x0 = yield Query(z, t)
            ratio = s / t
            z = ratio * z + (1 - ratio) * x0
            if s.item() > 0:
                variance = s * (1 - ratio) if self.variance == "bridge" else t - s
                z = z + (schedule.noise * torch.sqrt(variance)) * noise()
        return z
