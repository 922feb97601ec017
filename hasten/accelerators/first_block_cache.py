"""First Block Cache of `diffusers`: the first block of a transformer decides whether the others run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BadInput
from ._diffusers_cache import DiffusersCache


@dataclass(frozen=True)
class FirstBlockCache(DiffusersCache):
    """Where what the first block adds has changed little, the sum of what the other blocks added is reused.

        mean |r - r_last| / mean |r_last| <= threshold,    r = block_1(h) - h

    Args:
        threshold: 0: every evaluation is a full one; .05 to .2 are usual.

    References:
        ParaAttention (Cheng 2024), after Liu et al. 2024, arXiv:2411.19108.
    """

    threshold: float = 0.05
    config_name: ClassVar[str] = "FirstBlockCacheConfig"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise BadInput(f"first_block_cache: threshold must be 0 or more, found {self.threshold}")
