"""Starts: where sampling begins, one method a file, each a frozen dataclass.

class Start(Protocol):
    nfe: int                # network evaluations it costs, beside the sampler's
    time: float | None      # the grid begins here; None: where it begins anyway

    def begin(self, denoiser, noise, t, images=None, **cond) -> Tensor          # x_t (B, *S) at time t = times[0]
    def wrap(self, denoiser, images=None) -> nn.Module                          # optional: the denoiser to go on with
"""

from __future__ import annotations

from .auxiliary import Auxiliary
from .ccdf import CCDF
from .singdiffusion import SingDiffusion

__all__ = ["CCDF", "Auxiliary", "SingDiffusion"]
