"""Averages of a module's weights over its training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import BadInput, nearest
from .shards import local


@dataclass(frozen=True)
class Ema:
    """How a player's weights are averaged: `ema <- beta ema + (1 - beta) weights`, once a step of the player.

    `power`: `beta = (1 - 1/step)^(gamma + 1)`. After n steps, weights i have the share
        `beta_n ... beta_{i+1} (1 - beta_i)`, about `(gamma + 1) i^gamma / n^(gamma + 1)`: the width stays a fixed part
        of the run, near `1 / (gamma + 2)` of it for large gamma, and the first step's weights leave no trace
        (Karras et al. 2024, 2312.02696).
    `constant`: `beta = min(decay, step / (step + 9))`; the second term keeps the early weights from staying.

    gamma > -1; decay in [0, 1). BadInput otherwise.
    """

    kind: str = "power"
    gamma: float = 12.0
    decay: float = 0.999

    def __post_init__(self) -> None:
        if self.kind not in ("power", "constant"):
            raise BadInput(f"unknown EMA kind {self.kind!r}: {nearest(self.kind, ('power', 'constant'))}")
        if not self.gamma > -1 or not 0 <= self.decay < 1:
            raise BadInput(f"EMA needs gamma > -1 and decay in [0, 1), got {self.gamma} and {self.decay}")

    def beta(self, step: int) -> float:
        """The decay at `step`, counted from 1."""
        if self.kind == "power":
            return (1 - 1 / step) ** (self.gamma + 1)
        return min(self.decay, step / (step + 9))


@torch.no_grad()
def average(ema: nn.Module, module: nn.Module, beta: float) -> None:
    """Move the parameters of `ema` by `1 - beta` of the way to those of `module`; copy the buffers."""
    old, new = ([local(p.detach()) for p in one.parameters()] for one in (ema, module))
    torch._foreach_lerp_(old, new, 1 - beta)
    for kept, now in zip(ema.buffers(), module.buffers(), strict=True):
        kept.copy_(now)
