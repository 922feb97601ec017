"""Time grids: which times a sampler visits.

A grid is a small frozen dataclass, called as `grid(schedule, steps)`; it returns steps + 1 strictly decreasing
float64 times. The first is `start` (by default `schedule.t_max`), the last is `end`. With the default `end = 0`, the
clean image, the spacing of the grid places the first `steps` times, from `start` down to `low` (by default
`schedule.t_min`), and 0 follows (grids that reach 0 by themselves, `Trailing` and `CosineAngle`, say so). With
`end > 0` it places all of them.

Spacings in lam or q meet an infinite or a huge value where a schedule starts at (nearly) pure noise: the cosine table
ends at q = 20291, and 3 of 8 steps equal in lam would lie above q = 150, where x0 is all but the mean of the data. A
grid that begins where such a schedule does (alpha < 1/150, q > 300) spaces its levels from `q = 150` on, at which the
usual networks start, as `lambda_min_clipped = -5.1` of diffusers; the first time itself stays `start`. `clip` sets
another level. On exact mixtures at 6 to 15 steps this lowers the error 1.2 to 6 times in 30 of 32 cases. It does not in
two, UniPC-3 with 6 steps: their step in lam is then 2, at which third order overshoots between the modes (error .307),
and which the unclipped grid has with 8 steps (.316); second order gains there as well (.192 to .111).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import BadInput, check_int, check_numbers
from .schedules.base import Schedule

__all__ = ["CosineAngle", "Explicit", "Karras", "Quadratic", "TimeGrid", "Trailing", "UniformLambda", "UniformTime"]

MAX_Q = 150.0
MAX_STEPS = 20_000  # the table of a plan has their square; distillers begin with up to 8,192 steps, and halve them
FAR_Q = 2 * MAX_Q  # noise beyond this hides the image entirely: it counts as `MAX_Q`


@dataclass(frozen=True, kw_only=True)
class TimeGrid:
    """Base of the grids.

    Args:
        start: the first time, in (0, 1]; by default `schedule.t_max`.
        end: the last time, in [0, start).
        low: the smallest positive time before the final 0; by default `schedule.t_min`. With few steps a larger one
            often pays: the last step, from `low` to 0, is a plain denoising. Invalid where the spacing reaches `end` by
            itself.
    """

    name: ClassVar[str] = ""
    reaches_zero: ClassVar[bool] = False
    start: float | None = None
    end: float = 0.0
    low: float | None = None

    infinite: ClassVar[tuple[str, ...]] = ("clip",)

    def __post_init__(self) -> None:
        check_numbers(self)

    def __call__(self, schedule: Schedule, steps: int) -> Tensor:
        """The times of the grid.

        Args:
            schedule: whose levels are spaced.
            steps: at least 1.

        Returns:
            (steps + 1,) float64, strictly decreasing.

        Raises:
            BadInput: unless 0 <= end <= low < start <= 1 and steps >= 1.
        """
        steps = check_steps(steps)
        start = schedule.t_max if self.start is None else self.start
        places_all = self.end > 0 or self.reaches_zero
        if places_all and self.low is not None:
            raise BadInput(f"{self.name} with end={self.end:g} places all its times: low={self.low} means nothing")
        last = self.end if places_all else schedule.t_min if self.low is None else self.low
        if not (0 <= self.end <= last < start <= 1 and (places_all or last > 0)):
            bound = "end" if places_all else "low"
            raise BadInput(f"a time grid needs 0 <= {bound} < start <= 1, found start={start}, {bound}={last}")
        times = self._spacing(schedule, start, last, steps + 1 if places_all else steps)
        times = times.clone() if places_all else torch.cat([times, times.new_zeros(1)])
        times[0], times[-1] = start, self.end  # exactly, whatever the rounding of the spacing
        return check_times(times)

    def _spacing(self, schedule: Schedule, start: float, last: float, count: int) -> Tensor:
        """`count` times from `start` to `last`, spaced as the grid says."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class UniformTime(TimeGrid):
    """Equally spaced in t ("linspace"). On an `EDM` schedule these are the nodes of that paper."""

    name: ClassVar[str] = "uniform"

    def _spacing(self, schedule: Schedule, start: float, last: float, count: int) -> Tensor:
        return torch.linspace(start, last, count, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class UniformLambda(TimeGrid):
    """Equally spaced in `lam = log(alpha / sigma)`.

    Args:
        clip: the largest q = sigma / alpha of a level; None: 150 where the schedule starts at (nearly) pure noise (see
            the top of this file), else none; inf: none.

    References:
        Lu et al. 2022, arXiv:2206.00927.
    """

    name: ClassVar[str] = "lambda"
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.name, self.clip)

    def _spacing(self, schedule: Schedule, start: float, last: float, count: int) -> Tensor:
        high, low = levels(schedule, start, last, self.clip)
        return schedule.time(torch.linspace(-math.log(high), -math.log(low), count, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class Quadratic(TimeGrid):
    """Equally spaced in the square root of t: denser near the image.

    References:
        Song, Meng, Ermon 2021, arXiv:2010.02502.
    """

    name: ClassVar[str] = "quadratic"

    def _spacing(self, schedule: Schedule, start: float, last: float, count: int) -> Tensor:
        return torch.linspace(math.sqrt(start), math.sqrt(last), count, dtype=torch.float64) ** 2


@dataclass(frozen=True, kw_only=True)
class Karras(TimeGrid):
    """Equally spaced in `q^(1/rho)`, q = sigma / alpha.

    Args:
        rho: exponent, > 0.
        clip: the largest q of a level, as in `UniformLambda`.

    References:
        Karras, Aittala, Aila, Laine 2022, arXiv:2206.00364, equation 5.
    """

    name: ClassVar[str] = "karras"
    rho: float = 7.0
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.name, self.clip)
        if not self.rho > 0:
            raise BadInput(f"Karras needs rho > 0, found {self.rho}")

    def _spacing(self, schedule: Schedule, start: float, last: float, count: int) -> Tensor:
        high, low = (level ** (1 / self.rho) for level in levels(schedule, start, last, self.clip))
        return schedule.time(-self.rho * torch.log(torch.linspace(high, low, count, dtype=torch.float64)))


@dataclass(frozen=True, kw_only=True)
class Trailing(TimeGrid):
    """Equally spaced in t from `start` to `end` itself: no time is spent near the clean image.

    Good with few steps and for zero-terminal-SNR models.

    References:
        Lin, Liu, Li, Yang 2023 ("trailing"), arXiv:2305.08891.
    """

    name: ClassVar[str] = "trailing"
    reaches_zero: ClassVar[bool] = True

    def _spacing(self, schedule: Schedule, start: float, last: float, count: int) -> Tensor:
        return torch.linspace(start, last, count, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class CosineAngle(TimeGrid):
    """Equally spaced in the angle `atan(q / scale)` from `start` to `end` itself.

    The angle is pi t / 2 on the cosine schedule; it is finite at both ends of every schedule.

    Args:
        scale: about the standard deviation of the data, > 0.

    References:
        Salimans, Ho 2022, arXiv:2202.00512.
    """

    name: ClassVar[str] = "angle"
    reaches_zero: ClassVar[bool] = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise BadInput(f"CosineAngle needs scale > 0, found {self.scale}")

    def _spacing(self, schedule: Schedule, start: float, last: float, count: int) -> Tensor:
        high, low = (math.atan(float(schedule.q(t)) / self.scale) for t in (start, last))
        angles = torch.linspace(high, low, count, dtype=torch.float64)
        return schedule.time(-torch.log(torch.tan(angles) * self.scale))


@dataclass(frozen=True)
class Explicit:
    """Given times, for example `Explicit((1.0, 0.6, 0.25, 0.0))`, which is three steps.

    Args:
        values: strictly decreasing, in [0, 1].
    """

    name: ClassVar[str] = "explicit"
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        check_times(torch.tensor(self.values, dtype=torch.float64))

    def __call__(self, schedule: Schedule, steps: int | None = None) -> Tensor:
        """The times (steps + 1,) float64. Raises BadInput where `steps` is given and not their number."""
        if steps is not None and steps != len(self.values) - 1:
            raise BadInput(f"Explicit holds {len(self.values) - 1} steps, asked for {steps}")
        return torch.tensor(self.values, dtype=torch.float64)


def check_steps(steps: int) -> int:
    """The number of steps as an int.

    Raises:
        BadInput: unless it is an integer from 1 to `MAX_STEPS`.
    """
    return check_int("steps", steps, 1, MAX_STEPS)


def check_times(times: Tensor) -> Tensor:
    """The times (n,) themselves.

    Raises:
        BadInput: unless they are at least two, in [0, 1] and strictly decreasing.
    """
    values = times.detach()
    if values.ndim != 1 or len(values) < 2:
        raise BadInput(f"times must be a list of at least 2 numbers, found shape {tuple(values.shape)}")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise BadInput(f"times must lie in [0, 1], found {float(values.min()):.6g} to {float(values.max()):.6g}")
    if not bool((values[1:] < values[:-1]).all()):
        k = int((values[1:] >= values[:-1]).nonzero()[0])
        raise BadInput(f"times must strictly decrease, found {float(values[k]):.6g} before {float(values[k + 1]):.6g}")
    return times


def as_times(values: Any) -> Tensor:
    """Times as a float64 tensor.

    Args:
        values: a tensor, list, tuple or array of numbers.

    Raises:
        BadInput: for anything else.
    """
    if isinstance(values, Tensor):
        return values.to(torch.float64)
    try:
        if not (isinstance(values, (list, tuple)) or hasattr(values, "__array__")):
            raise TypeError
        return torch.as_tensor(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError):
        shown = values.__name__ if isinstance(values, type) else repr(values)
        raise BadInput(f"times must be a tensor or a list of numbers, found {shown}") from None


def levels(schedule: Schedule, start: float, last: float, clip: float | None = None) -> tuple[float, float]:
    """q = sigma / alpha at both times, the first one clipped.

    Args:
        schedule: that defines q.
        start, last: the first and the last time of a grid.
        clip: the largest first q; None: `MAX_Q` where q is infinite, or the schedule ends beyond `FAR_Q` because alpha
            falls to nearly 0 and `start` is that end.

    Raises:
        BadInput: where they do not fall, or the first is infinite.
    """
    high, low = float(schedule.q(start)), float(schedule.q(last))
    if clip is not None:
        high = min(high, clip)
    elif math.isinf(high) or (high > FAR_Q and start >= schedule.t_max and float(schedule.alpha(start)) * MAX_Q < 1):
        high = MAX_Q
    if not low < high < math.inf:
        levels_found = f"q from {high:g} to {low:g} for times from {start:g} to {last:g}, clip={clip}"
        raise BadInput(f"levels must fall from a finite one, found {levels_found}")
    return high, low


def check_clip(name: str, clip: float | None) -> None:
    """Raise BadInput unless a clip is None or positive; `name` begins the message."""
    if clip is not None and not clip > 0:
        raise BadInput(f"{name} needs clip > 0, found {clip}")
