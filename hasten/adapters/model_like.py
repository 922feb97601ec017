"""What is saved of a model, as a type: what reads and writes folders knows no more of `Model`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..plan.table import Plan

__all__ = ["ModelLike"]


class ModelLike(Protocol):
    """The fields of `hasten.Model` that its folder holds, see there."""

    denoiser: Denoiser
    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None
    codec: str
    sampler: str
    times: str
    steps: int
    guidance_scale: float
    plan: Plan | None
    card: dict[str, Any]
    sha256: str | None
    plans: dict[str, Plan]
    statistics: dict[str, Tensor]
    parts: dict[str, nn.Module]
    conditioning: Any
    decoder: Any
    pipeline: Any
