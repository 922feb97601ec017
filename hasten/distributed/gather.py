"""Tensors of all processes, with gradients to the part of this one."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from .heartbeat import peer_errors
from .ranks import Ranks

__all__ = ["gather_rows", "mean_over_ranks"]


def gather_rows(x: Tensor, ranks: Ranks) -> Tensor:
    """The rows (K B, ...) of all K processes in order, from those of this one (B, ...), as many in each.

    The gradient of this process's own rows is K times that of the result, and those of others get none: where
    gradients are averaged over the processes afterwards, as in training, their mean is the gradient of the whole.

    Args:
        x: this process's rows; of a floating type, its gradient is kept.
        ranks: the processes.
    """
    if ranks.world == 1:
        return x
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks.world)]
    with peer_errors():
        distributed.all_gather(parts, own)
    if x.requires_grad:
        parts[ranks.rank] = own + ranks.world * (x - own)
    return torch.cat(parts)


def mean_over_ranks(x: Tensor, ranks: Ranks) -> Tensor:
    """The mean of a tensor without gradient over all processes."""
    if ranks.world == 1:
        return x
    x = x.detach().clone()
    with peer_errors():
        distributed.all_reduce(x)
    return x / ranks.world
