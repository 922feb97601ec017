"""The result of a distiller."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..denoiser import Denoiser


@dataclass
class Student:
    """A distilled denoiser and how to sample from it.

    Args:
        denoiser: the trained student.
        sampler, times, steps: as `pick` spells them; they become the model's recommended settings and its plan.
        guidance: the guidance scales (low, high) that the network takes as its input `guidance`, or two equal numbers
            where one scale is built in; None: the task's scale is built in.
        parts: small networks saved with the model, by name.
        figures: JSON scalars that describe this student.
        any_time: it is a denoiser at every time, as its teacher was, and not only at the nodes of its own steps.
    """

    denoiser: Denoiser
    sampler: str
    times: str
    steps: int
    guidance: tuple[float, float] | None = None
    parts: dict[str, nn.Module] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    any_time: bool = False
