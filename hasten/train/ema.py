"""Exponential moving averages (EMA) of a module's weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import BadInput, check_choice
from ..nets.lora import base_parameters
from .shards import local_shard

KINDS = ("power", "constant")


@dataclass(frozen=True)
class Ema:
    """The decay of the averaged weights: `ema <- beta ema + (1 - beta) weights`, at each step of the trained module.

    `power`: `beta = (1 - 1/step)^(gamma + 1)`. After n steps, the weights of step i contribute the fraction
        `beta_n ... beta_{i+1} (1 - beta_i)`, about `(gamma + 1) i^gamma / n^(gamma + 1)`: the width is a fixed fraction
        of the run, near `1 / (gamma + 2)` for large gamma, and the initial weights contribute nothing.
    `constant`: `beta = min(decay, step / (step + 9))`; the second term is a warm-up that forgets the early weights.

    Args:
        kind: `power` or `constant`.
        gamma: exponent of `power`, > -1.
        decay: of `constant`, in [0, 1).

    Raises:
        BadInput: for an unknown kind, or a value out of range.

    References:
        Karras et al. 2024, arXiv:2312.02696 (power).
    """

    kind: str = "power"
    gamma: float = 12.0
    decay: float = 0.999

    def __post_init__(self) -> None:
        check_choice("EMA kind", self.kind, KINDS)
        if not self.gamma > -1 or not 0 <= self.decay < 1:
            raise BadInput(f"EMA needs gamma > -1 and decay in [0, 1), got {self.gamma} and {self.decay}")

    def beta(self, step: int) -> float:
        """The decay at `step`, counted from 1."""
        if self.kind == "power":
            return (1 - 1 / step) ** (self.gamma + 1)
        return min(self.decay, step / (step + 9))


def copy_for_average(module: nn.Module) -> nn.Module:
    """A frozen copy of a module in eval mode. It shares the base weights of networks with a LoRA."""
    shared: dict[int, Any] = {id(p): p for p in base_parameters(module)}
    return copy.deepcopy(module, shared).requires_grad_(False).eval()


@torch.no_grad()
def update_ema(ema: nn.Module, module: nn.Module, beta: float) -> None:
    """Update the parameters of `ema` in place to `beta ema + (1 - beta) module`, and copy the buffers.

    Parameters that both have, such as the base weights of a LoRA, are not written.
    """
    pairs = [(a, b) for a, b in zip(ema.parameters(), module.parameters(), strict=True) if a is not b]
    averages, weights = ([local_shard(pair[k].detach()) for pair in pairs] for k in (0, 1))
    torch._foreach_lerp_(averages, weights, 1 - beta)
    for average, buffer in zip(ema.buffers(), module.buffers(), strict=True):
        average.copy_(buffer)
