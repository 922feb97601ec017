"""TaylorSeer of `diffusers`: the outputs of a transformer's attention and feed-forward layers are extrapolated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import BadInput, check_choice
from ._diffusers_cache import DiffusersCache

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TaylorSeerCache(DiffusersCache):
    """Between full evaluations the layers' outputs are their Taylor polynomials, by finite differences.

        F(k + d) = sum_n F^(n)(k) d^n / n!,    F^(n)(k) = (F^(n-1)(k) - F^(n-1)(k - i)) / i

    Args:
        cache_interval: one evaluation in so many is a full one.
        disable_cache_before_step: the evaluations before it are full ones.
        disable_cache_after_step: those from it on, too; None: none.
        max_order: of the polynomials.
        taylor_factors_dtype: of what is stored, "float32", "bfloat16" or "float16"; from order 2 on use "float32".
        use_lite_mode: extrapolate the network's last projection alone: less memory.

    References:
        Liu et al. 2025, arXiv:2503.06923.
    """

    cache_interval: int = 5
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    max_order: int = 1
    taylor_factors_dtype: str = "bfloat16"
    use_lite_mode: bool = False
    config_name: ClassVar[str] = "TaylorSeerCacheConfig"

    def __post_init__(self) -> None:
        check_choice("taylor_factors_dtype", self.taylor_factors_dtype, DTYPES)
        if self.cache_interval < 1 or self.disable_cache_before_step < 1 or self.max_order < 0:
            raise BadInput(
                "taylor_seer_cache: cache_interval and disable_cache_before_step are 1 or more, max_order 0 or more, "
                f"found {self.cache_interval}, {self.disable_cache_before_step} and {self.max_order}"
            )

    def options(self, steps: int) -> dict[str, Any]:
        """Keyword arguments of the configuration of diffusers."""
        return {**super().options(steps), "taylor_factors_dtype": getattr(torch, self.taylor_factors_dtype)}
