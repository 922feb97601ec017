"""Samples with the source images that they were made from, as one input of critics and feature networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["JointCritic", "with_source", "with_source_shape"]


def with_source(x: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """Samples x (B, C, H, W) followed by their source along the channels, enlarged to the size of x; x without one.

    Args:
        x: samples, or points (B, D).
        cond: with `source` (B, K, h, w), of points (B, K), or without.
    """
    source = cond.get("source")
    if source is None:
        return x
    source = source.to(x.dtype)
    if x.ndim == 4 and source.shape[2:] != x.shape[2:]:
        source = F.interpolate(source, tuple(x.shape[2:]), mode="bicubic", antialias=True)
    return torch.cat([x, source], 1)


def with_source_shape(shape: Sequence[int], cond: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The shape of `with_source` of one sample of this shape."""
    source = None if cond is None else cond.get("source")
    return (shape[0] + (0 if source is None else source.shape[1]), *shape[1:])


class JointCritic(nn.Module):
    """A critic from scratch that reads each sample with its source: `(x (B, *S), t, **cond) -> logits`.

    Args:
        critic: of `with_source`, such as `plain_critic` of `with_source_shape`.
    """

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, x: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The critic's logits."""
        logits: Tensor = self.critic(with_source(x, cond), t, **cond)
        return logits
