"""Train cold diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..processes.soft import Soft
from ._soft import SoftTraining


@dataclass(frozen=True)
class TrainCold(SoftTraining):
    """A restoration network for a blur or a growing mask, trained by the absolute error, all but without noise.

    Args:
        corruption: `blur` or `mask`.
        blur_max: blur at t = 1, in pixels. None: the longer side, which leaves little more than the mean.
        edge: width of the edge of the mask, in pixels.
        noise: standard deviation of the noise, the same at all times: without any, equal means give equal images.

    References:
        Bansal et al. 2022, arXiv:2208.09392.
    """

    corruption: str = "blur"
    blur_max: float | None = None
    edge: float = 4.0
    noise: float = 0.002
    sampler: ClassVar[str] = "soft:form=cold"

    def _process(self, shape: tuple[int, ...]) -> Soft:
        """The process for samples of this shape."""
        blur = float(max(shape[-2:])) if self.blur_max is None else self.blur_max
        return Soft(shape, self.corruption, blur, self.edge, self.noise, self.noise, objective="l1")
