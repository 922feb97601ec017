"""The basis of a process whose corruption multiplies coordinates."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..errors import BadInput
from ..plan.basis import Basis


def diagonal_basis(process: Any) -> Basis:
    """The coordinates of a process of `processes._diagonal.Diagonal`, in groups of equal factors.

    Args:
        process: the denoiser's schedule.

    Raises:
        BadInput: for a schedule without such coordinates.
    """
    if not hasattr(process, "factor"):
        raise BadInput(f"this sampler deblurs, and the model's process is {type(process).__name__}: use unipc or heun")
    return _basis_of_process(process)


@lru_cache(maxsize=16)
def _basis_of_process(process: Any) -> Basis:
    """The basis of this process."""
    with torch.inference_mode(False):  # used under autograd later
        return Basis(torch.zeros(process.shape, dtype=torch.float64), process.keys, process.kind)
