"""The loss of a model of another forward process (`processes.Process`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput
from ..processes import Process
from ..schedules.base import Schedule
from ..utils.devices import float64_device
from .losses import DenoisingLoss, Uniform, stratified

__all__ = ["ProcessLoss"]


@dataclass(frozen=True)
class ProcessLoss:
    """`E_t` of `Process.loss` over stratified times.

    Args:
        label_drop: probability that the conditions of a sample are dropped, see `DenoisingLoss`.
        times: the distribution of t.
        conditions: names of the conditions in a batch that the network gets, but for `source`.

    Raises:
        BadInput: if `label_drop` is out of range.
    """

    label_drop: float = 0.1
    times: Callable[[Schedule, Tensor], Tensor] = field(default_factory=Uniform)
    conditions: tuple[str, ...] = tuple(name for name in DenoisingLoss.conditions if name != "source")

    def __post_init__(self) -> None:
        DenoisingLoss(label_drop=self.label_drop)

    def __call__(self, denoiser: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, a scalar, float32.

        Args:
            denoiser: whose network is trained; its schedule is the process.
            batch: `x` (B, *S), conditions, and for a bridge `source` (B, *S).

        Raises:
            BadInput: for a bridge without sources.
        """
        process: Any = denoiser.schedule
        assert isinstance(process, Process)
        x, source = batch["x"], batch.get("source")
        if process.bridge and source is None:
            raise BadInput(f"{type(process).__name__} is a bridge between pairs, and the data has no sources")
        dropped = DenoisingLoss(label_drop=self.label_drop, conditions=self.conditions)
        cond: dict[str, Any] = dropped.drop(batch, denoiser.null_label)
        if denoiser.source_channels and source is not None:
            cond["source"] = source
        t = self.times(process, stratified(len(x), float64_device(x.device)))
        loss: Tensor = process.loss(denoiser, x, t, torch.randn_like(x), cond, source)
        return loss.mean()
