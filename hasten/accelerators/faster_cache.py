"""FasterCache of `diffusers`: attention outputs and guidance's unconditional branch are reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BadInput, check_choice
from ._diffusers_cache import DiffusersCache
from .pyramid_attention_broadcast import check_timesteps

FORMATS = ("BCFHW", "BFCHW", "BCHW")


@dataclass(frozen=True)
class FasterCache(DiffusersCache):
    """Attention outputs are extrapolated between evaluations, and the unconditional branch is rebuilt in frequencies.

    Args:
        spatial_attention_block_skip_range: one evaluation in so many computes spatial attention.
        temporal_attention_block_skip_range: the same of temporal attention; None: all.
        spatial_attention_timestep_skip_range: (low, high): the timesteps between which it is reused.
        temporal_attention_timestep_skip_range: the same.
        unconditional_batch_skip_range: one evaluation in so many computes the unconditional branch.
        unconditional_batch_timestep_skip_range: the same.
        tensor_format: of the latents: "BCFHW", "BFCHW" or "BCHW".
        is_guidance_distilled: the network has no unconditional branch in its batch.

    References:
        Lv et al. 2024, arXiv:2410.19355.
    """

    spatial_attention_block_skip_range: int = 2
    temporal_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[int, ...] = (-1, 681)
    temporal_attention_timestep_skip_range: tuple[int, ...] = (-1, 681)
    unconditional_batch_skip_range: int = 5
    unconditional_batch_timestep_skip_range: tuple[int, ...] = (-1, 641)
    tensor_format: str = "BCFHW"
    is_guidance_distilled: bool = False
    config_name: ClassVar[str] = "FasterCacheConfig"
    needs_timestep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("tensor_format", self.tensor_format, FORMATS)
        for name in ("spatial_attention_block_skip_range", "unconditional_batch_skip_range"):
            if getattr(self, name) < 1:
                raise BadInput(f"faster_cache: {name} must be 1 or more, found {getattr(self, name)}")
        check_timesteps("faster_cache", self)
