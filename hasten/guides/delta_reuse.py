"""Guidance whose difference of the branches is computed in some evaluations only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import BadInput, HastenError, check_int, check_numbers
from ._base import Guide
from .cfg import GuidedDenoiser, Remixed
from .interval import replace_guided

__all__ = ["DeltaReuse"]


@dataclass(frozen=True)
class DeltaReuse(Guide):
    """`x0 = c + (scale - 1) (c - u)_last`: the unconditional branch in every n-th evaluation only.

    Between them the last difference is used again: such a step costs half. With an interval of noise levels that of the
    last evaluation inside is used below it, and above it the model is the conditional one.
    `hasten.plan.guided_plan` writes the same with any choice of steps.

    Args:
        every: evaluate the unconditional branch in evaluations 0, every, 2 every, ... of those inside; at least 1.
        low, high: the interval, 0 <= low < high, in units of q = sigma / alpha.

    References:
        Castillo et al. 2023 (adaptive guidance), arXiv:2312.12487; Lv et al. 2024 (FasterCache), arXiv:2410.19355.
    """

    every: int = 2
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        check_int("delta_reuse: every", self.every, 1)
        if not 0 <= self.low < self.high:
            raise BadInput(f"delta_reuse needs 0 <= low < high, found low={self.low:g}, high={self.high:g}")
        check_numbers(self)

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The same denoiser, with fewer unconditional evaluations.

        Raises:
            BadInput: for a denoiser without classifier-free guidance, and under guidance with an interval of its own.
        """

        def make(guided: GuidedDenoiser) -> nn.Module:
            if guided.guide.interval is not None:
                raise BadInput("delta_reuse has an interval of its own, low and high: leave the other one out")
            return Reusing(guided, self)

        return replace_guided(denoiser, "delta_reuse saves evaluations of", make)


class Reusing(Remixed):
    """A denoiser under `CFG` and `DeltaReuse`."""

    def __init__(self, guided: GuidedDenoiser, reuse: DeltaReuse) -> None:
        super().__init__(guided)
        self.reuse = reuse
        self.reset()

    def reset(self) -> None:
        """Forget the last difference."""
        self.done = 0
        self.last: Tensor | None = None

    def with_cond(
        self, x_t: Tensor, t: Tensor | float, *, label: Tensor | None = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """x0 under guidance and that of the conditional branch alone, each (B, *S)."""
        q = self.denoiser.schedule.q(t)
        inside = bool(((q > self.reuse.low) & (q <= self.reuse.high)).all())
        conditions = {**cond, "label": label}
        last: Tensor | None = self.last
        if inside and self.done % self.reuse.every == 0:
            of_cond, of_uncond = GuidedDenoiser.branch(self, x_t, t, both=True, **conditions)
            last = of_cond - of_uncond
        else:
            of_cond = GuidedDenoiser.branch(self, x_t, t, **conditions)
        if last is not None and last.shape != of_cond.shape:
            raise BadInput("delta_reuse needs a sampler that evaluates the whole batch, one state at a time")
        self.done, self.last = self.done + inside, last
        if last is None:
            return of_cond, of_cond
        guided = of_cond + (self.guide.scale - 1) * last
        return self._rescaled(guided, of_cond, x_t, t) if self.guide.rescale else guided, of_cond

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Raises HastenError: a step in the features would need both branches."""
        raise HastenError("delta_reuse cannot be steered by middle features: leave it out, or the other guide")
