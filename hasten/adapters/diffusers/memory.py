"""Memory savings in the training of networks of `diffusers`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import BadInput

__all__ = ["enable_gradient_checkpointing"]


def enable_gradient_checkpointing(net: nn.Module) -> None:
    """Recompute the activations of a network's blocks in the backward pass in place of keeping them.

    Args:
        net: a `SplitNetwork`, or a network of diffusers.

    Raises:
        BadInput: where the network has no gradient checkpointing.

    References:
        Chen et al. 2016, arXiv:1604.06174.
    """
    inner: Any = getattr(net, "net", net)
    enable = getattr(inner, "enable_gradient_checkpointing", None)
    if not callable(enable) or not getattr(inner, "_supports_gradient_checkpointing", True):
        raise BadInput(f"{type(inner).__name__} has no gradient checkpointing: leave it out, or use grad_accumulation")
    try:
        enable()
    except ValueError as e:
        raise BadInput(f"{type(inner).__name__} has no gradient checkpointing ({e}): use grad_accumulation") from e
