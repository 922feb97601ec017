"""Guidance by a weaker version of the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput, check_numbers
from ..sampling import schedule_of
from ._base import Guide

__all__ = ["AutoGuidance"]


@dataclass(frozen=True)
class AutoGuidance(Guide):
    """`x0 = x0_weak + scale (x0 - x0_weak)`, with the same condition for both.

    The weak model is one of the same task and kind of errors: trained for a fraction of the time, or of a smaller size.
    It pushes towards higher quality, not away from other classes, so that variety is kept. One evaluation of the weak
    network a step; together with a guidance scale it is applied to the guided prediction.

    Args:
        weak: the weaker model: a denoiser (`hasten.load(FOLDER).denoiser`), or for `Model.sample` and the command line
            the folder of one that hasten saved, or a bundled name.
        scale: any finite number; 1 is the model alone. The paper uses 1.7 to 3.

    References:
        Karras, Aittala, Kynkaanniemi, Lehtinen, Aila, Laine 2024, arXiv:2406.02507.
    """

    weak: Any = None
    scale: float = 2.0
    negative: ClassVar[tuple[str, ...]] = ("scale",)

    def __post_init__(self) -> None:
        if self.weak is None:
            raise BadInput("autoguidance needs a weaker model: weak=FOLDER, or a denoiser")
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The denoiser, guided by the weak one.

        Raises:
            BadInput: for a weak model that is still a name, or of another schedule or shape of samples.
        """
        if not callable(self.weak):
            raise BadInput(f"autoguidance: load the weak model first, hasten.load({self.weak!r}).denoiser")
        here, there = schedule_of(denoiser), schedule_of(self.weak)
        t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
        if not all(torch.allclose(getattr(here, f)(t), getattr(there, f)(t), rtol=1e-3) for f in ("alpha", "sigma")):
            raise BadInput(f"autoguidance: the weak model has another schedule, {there}, than the model, {here}")
        return denoiser if self.scale == 1 else WeaklyGuided(denoiser, self)


class WeaklyGuided(Wrapper):
    """A denoiser under `AutoGuidance`."""

    def __init__(self, denoiser: nn.Module, guide: AutoGuidance) -> None:
        super().__init__(denoiser)
        self.weak, self.guide = guide.weak, guide

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """x0 (B, *S) under the guidance."""
        x0 = self.denoiser(x_t, t, **cond)
        weak = self.weak(x_t, t, **{key: value for key, value in cond.items() if not key.startswith("null_")})
        if weak.shape != x0.shape:
            raise BadInput(
                f"autoguidance: the weak model gives {tuple(weak.shape[1:])}, the model {tuple(x0.shape[1:])}"
            )
        return weak + self.guide.scale * (x0 - weak)
