"""Train soft diffusion."""

from __future__ import annotations

from dataclasses import dataclass

from ..processes.soft import Soft
from ._soft import SoftTraining


@dataclass(frozen=True)
class TrainSoft(SoftTraining):
    """A blur or a growing mask with a little noise, trained by soft score matching.

    Args:
        corruption: `blur` or `mask`.
        blur_max: blur at t = 1, in pixels. None: a third of the longer side.
        edge: width of the edge of the mask, in pixels.
        noise_min, noise_max: of the noise, for images in [-1, 1].
        floor: weight of the error that the corruption hides.

    References:
        Daras, Delbracio, Talebi, Dimakis, Milanfar 2022, arXiv:2209.05442.
    """

    corruption: str = "blur"
    blur_max: float | None = None
    edge: float = 4.0
    noise_min: float = 0.02
    noise_max: float = 1.0
    floor: float = 0.01

    def _process(self, shape: tuple[int, ...]) -> Soft:
        """The process for samples of this shape."""
        blur = max(shape[-2:]) / 3 if self.blur_max is None else self.blur_max
        return Soft(shape, self.corruption, blur, self.edge, self.noise_min, self.noise_max, floor=self.floor)
