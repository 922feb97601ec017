"""Ancestral sampling of an I2SB bridge."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..processes.i2sb import I2SB
from ..sampling import Query, SamplerBase
from ..times import check_times


@dataclass(frozen=True)
class I2SBSampler(SamplerBase):
    """The posterior of an `I2SB` bridge, from the degraded image at t = 1 to the clean one:

        z_s = (1 - V_s/V_t) x0 + (V_s/V_t) z_t + sqrt(V_s (V_t - V_s) / V_t) xi

    with no noise by the last step, and none at all for a bridge with `noise=false`. Order 1 in law; NFE = steps. One
    step gives the estimate of the mean; more steps more detail and less PSNR.

    References:
        Liu et al. 2023, arXiv:2302.05872, algorithm 2.
    """

    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1
    processes: ClassVar[tuple[str, ...]] = ("I2SB",)

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return steps

    def steps(self, schedule: I2SB, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:  # type: ignore[override]
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        times = check_times(times)
        V, z = schedule.variance(times), x
        for k in range(len(times) - 1):
            x0 = yield Query(z, times[k])
            ratio = V[k + 1] / V[k]
            z = (1 - ratio) * x0 + ratio * z
            if schedule.noise and V[k + 1] > 0:
                z = z + torch.sqrt(V[k + 1] * (1 - ratio)) * noise()
        return z
