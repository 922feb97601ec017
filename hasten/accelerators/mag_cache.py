"""MagCache of `diffusers`: a transformer's blocks are skipped while the residual's magnitude hardly changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import BadInput
from ._diffusers_cache import DiffusersCache


@dataclass(frozen=True)
class MagCache(DiffusersCache):
    """What all blocks together added is reused as long as the accumulated error of its magnitude is small.

        sum |1 - prod m_k| <= threshold    over the evaluations since the last full one

    with the ratios m_k of the magnitudes at consecutive evaluations, which depend on the model.

    Args:
        threshold: of the accumulated error.
        max_skip_steps: the most evaluations in a row that are skipped.
        retention_ratio: the fraction of evaluations, from the first, that are full ones.
        mag_ratios: m_k, interpolated to the number of steps; None: measured with the `prompts` or `calls` of
            `hasten.accelerate`.

    References:
        Ma et al. 2025, arXiv:2506.09045.
    """

    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    mag_ratios: tuple[float, ...] | None = None
    config_name: ClassVar[str] = "MagCacheConfig"

    def __post_init__(self) -> None:
        if not (self.threshold >= 0 and self.max_skip_steps >= 0 and 0 <= self.retention_ratio <= 1):
            raise BadInput(
                "mag_cache: threshold and max_skip_steps are 0 or more and retention_ratio 0 to 1, found "
                f"{self.threshold}, {self.max_skip_steps} and {self.retention_ratio}"
            )
        if self.mag_ratios is not None and not self.mag_ratios:
            raise BadInput("mag_cache: mag_ratios are one or more numbers, found none")

    def options(self, steps: int) -> dict[str, Any]:
        """Keyword arguments of the configuration of diffusers, which measures the ratios where there are none."""
        ratios = None if self.mag_ratios is None else list(self.mag_ratios)
        more = {"num_inference_steps": steps, "calibrate": ratios is None, "mag_ratios": ratios}
        return {**super().options(steps), **more}
