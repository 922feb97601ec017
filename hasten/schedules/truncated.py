"""A schedule cut at a time before pure noise, for models that are trained below it only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import BadInput, check_number
from .base import Schedule


@dataclass(frozen=True)
class Truncated(Schedule):
    """Another schedule up to `t_max = end`: training draws its times, and grids begin, at or below it.

    alpha and sigma are those of the schedule inside, at all times. The state at `end` still contains the image, so that
    sampling does not start from noise: a start (`starts.prior`, `starts.early_stop`) draws it.

    Args:
        schedule: the one inside.
        end: T', in (t_min, t_max] of the schedule inside.

    Raises:
        BadInput: for no schedule, and for an end outside its times.

    References:
        Zheng, He, Chen, Zhou 2022, arXiv:2202.09671; Lyu, Xu, Yang, Lin, Dai 2022, arXiv:2205.12524.
    """

    schedule: Schedule
    end: float

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule):
            raise BadInput(f"Truncated needs a schedule, such as VPCosine(), found {self.schedule!r}")
        if isinstance(self.schedule, Truncated):
            raise BadInput(f"Truncated: the schedule ends at {self.schedule.end:g} already: cut the one inside")
        low, high = self.schedule.t_min, self.schedule.t_max
        if not low < check_number("end", self.end) <= high:
            raise BadInput(f"Truncated needs {low:g} < end <= {high:g}, found {self.end:g}")

    @property
    def t_min(self) -> float:
        return self.schedule.t_min

    @property
    def t_max(self) -> float:
        return float(self.end)

    @property
    def zero_snr(self) -> bool:
        return self.schedule.zero_snr

    def to_dict(self) -> dict[str, Any]:
        """`{"name": "Truncated", "schedule": {...}, "end": ...}`."""
        return {**super().to_dict(), "schedule": self.schedule.to_dict()}

    def __getattr__(self, name: str) -> Any:
        # the table of a `Discrete` and its index, which is the time input of networks trained on it
        if name in ("index", "alphas_cumprod"):
            return getattr(self.schedule, name)
        raise AttributeError(name)

    def _alpha(self, t: Tensor) -> Tensor:
        return self.schedule._alpha(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.schedule._sigma(t)

    def _lam(self, t: Tensor) -> Tensor:
        return self.schedule._lam(t)

    def _time(self, lam: Tensor) -> Tensor:
        return self.schedule._time(lam)
