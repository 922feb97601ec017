"""Train inverse heat dissipation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..processes.soft import Soft
from ._soft import SoftTraining


@dataclass(frozen=True)
class TrainHeat(SoftTraining):
    """A blur with noise of one level, whose steps restore a little and add a little more noise.

    Args:
        blur_max: blur at t = 1, in pixels. None: seven tenths of the longer side, 20 for 28.
        noise: standard deviation of the noise; the paper's .01 for images in [0, 1] is .02 in [-1, 1].

    References:
        Rissanen, Heinonen, Solin 2022, arXiv:2206.13397.
    """

    blur_max: float | None = None
    noise: float = 0.02
    sampler: ClassVar[str] = "soft:form=naive,noise=1.25"
    steps: ClassVar[int] = 100

    def _process(self, shape: tuple[int, ...]) -> Soft:
        """The process for samples of this shape."""
        blur = 0.7 * max(shape[-2:]) if self.blur_max is None else self.blur_max
        return Soft(shape, blur_max=blur, noise_min=self.noise, noise_max=self.noise)
