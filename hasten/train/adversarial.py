"""Losses of critics and what they judge, and the R1 penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["hinge_loss", "margin_loss", "r1_penalty"]


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's `mean max(0, 1 - real) + mean max(0, 1 + fake)` of logits of any shape, a scalar."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def margin_loss(real: Tensor, fake: Tensor, limit: float) -> Tensor:
    """The critic's cross-entropy, with gradient exactly 0 for real logits above `limit` and fake ones below -`limit`:

        mean softplus(-min(real, limit)) + mean softplus(max(fake, -limit))

    Args:
        real, fake: logits of any shape.
        limit: the margin, infinity for none.

    Returns:
        A scalar.
    """
    return F.softplus(-real.clamp_max(limit)).mean() + F.softplus(fake.clamp_min(-limit)).mean()


def r1_penalty(heads: Callable[[Sequence[Tensor]], Tensor], features: Sequence[Tensor]) -> Tensor:
    """R1: the mean over the batch of `|d sum(logits) / d features|^2`, which itself is differentiable.

    The gradient is that of the heads' output in their own input, not in the pixels behind it.

    Args:
        heads: features -> logits.
        features: at real samples, each (B, ...).

    Returns:
        A scalar.
    """
    leaves = [f.detach().requires_grad_(True) for f in features]
    with torch.enable_grad():
        gradients = torch.autograd.grad(heads(leaves).float().sum(), leaves, create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1).mean().float() for g in gradients]).sum()
