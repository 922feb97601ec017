"""The hybrid sampler of denoising diffusion bridge models."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput, check_numbers
from ..processes.ddbm import DDBM
from ..sampling import Query, SamplerBase
from ..times import check_times


@dataclass(frozen=True)
class DDBMSampler(SamplerBase):
    """Steps of the reverse SDE and of the ODE of a `DDBM` bridge in turn. With the score s of the bridge and
    `h = grad_z log p(y | z_t)`,

        SDE   dz = [f z - g^2 (s - h)] dt + g dw,         s - h = (alpha x0 - z) / sigma^2
        ODE   dz = [f z - g^2 (s / 2 - w h)] dt

    each interval is one Euler-Maruyama step of the SDE over its first fraction `churn`, then one of Heun's method for
    the ODE over the rest; the last, into t = 0, is Euler's. The ODE alone stays on one path: from a single source it
    gives a single image. h is infinite at t = 1: the first time is at most 1 - `gap`.

    Order 1 in law; NFE = 3 steps - 1 on a grid that ends at t = 0 (2 steps - 1 with churn = 0). `DBIM` needs fewer.

    Args:
        churn: the fraction of each interval for the SDE, in [0, 1).
        guidance: w, the factor of h in the ODE; 1 is exact.
        gap: distance of the first time from 1, in (0, .1].

    Raises:
        BadInput: for values out of range.

    References:
        Zhou, Lou, Khanna, Ermon 2023, arXiv:2309.16948, algorithm 1; Karras et al. 2022, arXiv:2206.00364 (its grid,
        `times="karras"`).
    """

    churn: float = 0.33
    guidance: float = 1.0
    gap: float = 1e-4
    linear: ClassVar[bool] = True
    order: ClassVar[int] = 1
    processes: ClassVar[tuple[str, ...]] = ("DDBM",)

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.churn < 1 or self.guidance < 0 or not 0 < self.gap <= 0.1:
            raise BadInput(f"ddbm needs 0 <= churn < 1, guidance >= 0 and 0 < gap <= 0.1, found {self}")

    def nfe(self, steps: int) -> int:
        """Model evaluations on a grid of `steps` steps that ends at t = 0."""
        return (3 if self.churn else 2) * steps - 1

    def steps(self, schedule: DDBM, x: Any, times: Tensor, noise: Callable[[], Any]) -> Generator[Query, Any, Any]:  # type: ignore[override]
        """The algorithm as a coroutine; see `hasten.sampling.Sampler`."""
        times = check_times(times)
        top = times[0].clamp(max=1 - self.gap)
        if not times[1].item() < top.item():
            raise BadInput(
                f"ddbm begins at t = {top.item():g}: the second time must lie below, found {times[1].item():g}"
            )
        y, z = x, x
        path = [top, *times[1:].unbind()]
        for start, end in zip(path, path[1:], strict=False):
            t = start
            if self.churn:
                x0 = yield Query(z, t)
                f, g2 = schedule.rates(t)
                t = start + self.churn * (end - start)
                pull = g2 / schedule.sigma(start) ** 2
                dt = t - start
                z = (1 + dt * (f + pull)) * z - (dt * pull * schedule.alpha(start)) * x0
                z = z + torch.sqrt(g2 * -dt) * noise()
            first = self._derivative(schedule, t, z, y, (yield Query(z, t)))
            dt = end - t
            euler = z + dt * first
            if end.item() == 0:
                return euler
            second = self._derivative(schedule, end, euler, y, (yield Query(euler, end)))
            z = z + (dt / 2) * first + (dt / 2) * second
        return z

    def _derivative(self, schedule: DDBM, t: Tensor, z: Any, y: Any, x0: Any) -> Any:
        """`dz/dt` of the ODE: `f z - g^2 ((alpha x0 - z) / sigma^2 / 2 + (1/2 - w) h)`."""
        (f, g2), alpha, sigma, end = schedule.rates(t), schedule.alpha(t), schedule.sigma(t), torch.ones_like(t)
        score, away = g2 / sigma**2 / 2, (0.5 - self.guidance) * g2
        # h = ((alpha / alpha_1) y - z) / (sigma^2 (SNR_t / SNR_1 - 1))
        h = 1 / (sigma**2 * torch.expm1(2 * (schedule.lam(t) - schedule.lam(end))))
        return (f + score + away * h) * z - (score * alpha) * x0 - (away * h * alpha / schedule.alpha(end)) * y
