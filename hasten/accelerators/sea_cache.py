"""SeaCache of `diffusers`: a video transformer's blocks are skipped while a spectral indicator hardly changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BadInput
from ._diffusers_cache import DiffusersCache


@dataclass(frozen=True)
class SeaCache(DiffusersCache):
    """The residual of all blocks is reused while the accumulated change of the filtered input stays below a threshold.

    For the transformers that diffusers knows the latents of: Cosmos 3 and, from text, Wan.

    Args:
        threshold: of the accumulated relative change.
        residual_order: 0: reused; 1: linearly extrapolated.
        retention_steps: full evaluations at the beginning.
        cache_end_steps: full evaluations at the end.
        max_consecutive_cached: the most reuses in a row; 0: any number.
        power_exp: exponent of the spectrum that is assumed of the data.

    References:
        SeaCache 2026, arXiv:2602.18993.
    """

    threshold: float = 0.25
    residual_order: int = 1
    retention_steps: int = 1
    cache_end_steps: int = 1
    max_consecutive_cached: int = 2
    power_exp: float = 3.0
    config_name: ClassVar[str] = "SeaCacheConfig"
    transformers: ClassVar[tuple[str, ...]] = ("Cosmos3OmniTransformer", "WanTransformer3DModel")

    def __post_init__(self) -> None:
        if self.residual_order not in (0, 1):
            raise BadInput(f"sea_cache: residual_order must be 0 or 1, found {self.residual_order}")
