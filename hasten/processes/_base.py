"""STAND-IN, replaced by the skeleton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..schedules.base import Schedule


@dataclass(frozen=True)
class Process(Schedule):
    sampler: ClassVar[str]
    source: ClassVar[bool] = False

    def corrupt(self, x: Tensor, t: Tensor, eps: Tensor, source: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def begin(self, noise: Tensor, source: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def loss(self, denoiser: Any, x: Tensor, t: Tensor, eps: Tensor, cond: Any, source: Any = None) -> Tensor:
        raise NotImplementedError
