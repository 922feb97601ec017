"""Less noise to start from: samples nearer to the mean, less diverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import BadInput, check_number
from ..sampling import Noise
from ._base import Start

__all__ = ["Temperature"]


@dataclass(frozen=True)
class Temperature(Start):
    """The initial noise times `value`: `x_T = value sigma_T eps`. NFE: 0.

    For models that read a source image, such as super-resolution, it trades detail for fidelity: a sample of p(x | y)
    has twice the squared error of the mean of p(x | y), and with deterministic samplers a value below 1 leads between
    the two.

    Args:
        value: 0 to 2; 1 is no change.

    References:
        Kingma, Dhariwal 2018, arXiv:1807.03039, section 6 (of flows); Blau, Michaeli 2018, arXiv:1711.06077 (the
        trade-off of distortion and perception).
    """

    value: float = 0.7
    nfe: ClassVar[int] = 0
    reads_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= check_number("temperature: value", self.value) <= 2:
            raise BadInput(f"temperature: value lies in 0..2, found {self.value}")

    def begin(self, denoiser: nn.Module, noise: Noise, t: Tensor, images: Tensor | None = None, **cond: Any) -> Tensor:
        """value sigma eps (B, *S).

        Args:
            denoiser: with a `schedule`.
            noise: of the samples.
            t: the first time of the grid.
            images: not used.
            cond: not used.
        """
        schedule: Any = denoiser.schedule
        state: Tensor = schedule.begin(self.value * noise.initial(), t)
        return state
