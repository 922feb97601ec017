"""Protocols for what reads and writes model folders, which lies below `Model` and the exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..plan.table import Plan

__all__ = ["HasFiles", "ModelLike"]


class ModelLike(Protocol):
    """The fields of `hasten.Model` that its folder holds, see there."""

    denoiser: Denoiser
    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...] | None
    codec: str
    sampler: str
    start: str | None
    residual_std: float | None
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


@runtime_checkable
class HasFiles(Protocol):
    """A network with files of its own in the model folder: a graph that another library runs."""

    def write_files(self, folder: Path) -> None:
        """Copy the files into a folder."""

    def open_files(self, folder: Path) -> None:
        """Use the files of a folder."""
