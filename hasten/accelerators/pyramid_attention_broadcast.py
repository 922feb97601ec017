"""Pyramid Attention Broadcast of `diffusers`: outputs of attention layers are reused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import BadInput
from ._diffusers_cache import DiffusersCache


@dataclass(frozen=True)
class PyramidAttentionBroadcast(DiffusersCache):
    """In the middle of a sampling the outputs of attention layers are computed once in several evaluations.

    Args:
        spatial_attention_block_skip_range: one evaluation in so many computes spatial attention; None: all.
        temporal_attention_block_skip_range: the same of temporal attention, of video transformers that have it apart.
        cross_attention_block_skip_range: of cross-attention.
        spatial_attention_timestep_skip_range: (low, high): the timesteps between which they are reused.
        temporal_attention_timestep_skip_range: the same.
        cross_attention_timestep_skip_range: the same.

    References:
        Zhao et al. 2024, arXiv:2408.12588.
    """

    spatial_attention_block_skip_range: int | None = 2
    temporal_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[int, ...] = (100, 800)
    temporal_attention_timestep_skip_range: tuple[int, ...] = (100, 800)
    cross_attention_timestep_skip_range: tuple[int, ...] = (100, 800)
    config_name: ClassVar[str] = "PyramidAttentionBroadcastConfig"
    needs_timestep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ranges = {
            name: getattr(self, f"{name}_attention_block_skip_range") for name in ("spatial", "temporal", "cross")
        }
        if not any(ranges.values()) or any(each is not None and each < 1 for each in ranges.values()):
            raise BadInput(
                "pyramid_attention_broadcast: give a block_skip_range of 1 or more for spatial, temporal or cross "
                f"attention, found {', '.join(f'{name} {each}' for name, each in ranges.items())}"
            )
        check_timesteps("pyramid_attention_broadcast", self)


def check_timesteps(who: str, method: DiffusersCache) -> None:
    """Refuse ranges of timesteps that are not (low, high).

    Args:
        who: the accelerator, for the message.
        method: whose fields are checked.

    Raises:
        BadInput: for other ranges.
    """
    for name, value in vars(method).items():
        if name.endswith("timestep_skip_range") and not (len(value) == 2 and value[0] < value[1]):
            raise BadInput(f"{who}: {name} must be (low, high), as in (100,800), found {value}")
