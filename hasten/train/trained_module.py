"""A module that is trained, with its loss and optimiser."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import BadInput, check_choice
from .muon import Muon, split_parameters

OPTIMISERS = ("adamw", "muon", "adamw8bit", "paged-adamw8bit")
EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged-adamw8bit": "PagedAdamW8bit"}  # classes of bitsandbytes


@dataclass
class TrainedModule:
    """A module, its loss, and its optimiser's settings. A training loop trains one or several.

    Args:
        name: names its state in the checkpoint and its loss in the log.
        module: the module; its parameters that require gradients are trained.
        loss: `batch -> scalar`, a closure over the module. Batches are on the module's device. Random numbers must come
            from torch's global generator, which makes a resumed run exact.
        lr: AdamW's peak learning rate, > 0.
        betas: AdamW's.
        weight_decay: decoupled, `w <- w - lr weight_decay w`, of every trained parameter.
        optimiser: `adamw`, or `muon` for hidden matrices with AdamW at `lr` for the rest (see `train.muon`);
            `adamw8bit`, AdamW with a state of 8 bits, or `paged-adamw8bit`, which moves it to the CPU where the GPU
            is full: both of bitsandbytes, on CUDA.
        muon_lr: Muon's peak learning rate.
        every: the module is updated on the steps that are multiples of this, >= 1.
        start: the fraction of the budget before which it is not updated, in [0, 1).

    Raises:
        BadInput: for an unknown optimiser, or a value out of range.

    References:
        Loshchilov, Hutter 2019, arXiv:1711.05101 (AdamW).
    """

    name: str
    module: nn.Module
    loss: Callable[[dict[str, Tensor]], Tensor]
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    optimiser: str = "adamw"
    muon_lr: float = 0.02
    every: int = 1
    start: float = 0.0

    def __post_init__(self) -> None:
        check_choice("optimiser", self.optimiser, OPTIMISERS)
        if not self.lr > 0 or self.every < 1:
            raise BadInput(f"{self.name}: lr must be positive and every at least 1, got {self.lr} and {self.every}")
        if not 0 <= self.start < 1:
            raise BadInput(f"{self.name}: start is a fraction of the budget in [0, 1), got {self.start}")

    def optimizer(self) -> torch.optim.Optimizer:
        """A new optimiser of the module's trainable parameters. Raises BadInput if they have fewer than 32 bits."""
        for name, p in self.module.named_parameters():
            if p.requires_grad and p.is_floating_point() and p.itemsize < 4:
                raise BadInput(
                    f"{self.name}: the weights {name} are {str(p.dtype).removeprefix('torch.')}, where small updates "
                    "are lost: train float32 weights (module.float()); precision='bf16' computes in bf16 with them"
                )
        if self.optimiser == "muon":
            matrices, others = split_parameters(self.module)
            return Muon(
                matrices, others, self.muon_lr, adam_lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
            )
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if self.optimiser in EIGHT_BIT:
            return eight_bit_adamw(self.optimiser, parameters, self.lr, self.betas, self.weight_decay)
        fused = all(p.is_floating_point() for p in parameters)  # the fused kernel does not support complex numbers
        return torch.optim.AdamW(parameters, self.lr, self.betas, weight_decay=self.weight_decay, fused=fused)


def eight_bit_adamw(
    name: str, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An AdamW of bitsandbytes. Raises BadInput where `check_eight_bit` does."""
    check_eight_bit(name, next((p.device for p in parameters), torch.device("cpu")))
    kind = getattr(importlib.import_module("bitsandbytes").optim, EIGHT_BIT[name])
    optimiser: torch.optim.Optimizer = kind(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    return optimiser


def check_eight_bit(name: str, device: torch.device) -> None:
    """Refuse an 8-bit optimiser where it cannot run.

    Args:
        name: of the optimiser; others than the 8-bit ones are fine anywhere.
        device: of the parameters.

    Raises:
        BadInput: for another device than CUDA, or without bitsandbytes.
    """
    if name not in EIGHT_BIT:
        return
    if device.type != "cuda":
        raise BadInput(f"the optimiser {name} runs on CUDA, not on {device.type}: use adamw, or --device cuda")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput(f"the optimiser {name} needs bitsandbytes: pip install bitsandbytes, or use adamw")


@runtime_checkable
class OncePerStep(Protocol):
    """A module whose loss updates some state once in a step, not once for each micro-batch.

    `again` is set to True while the loss of the second and later micro-batches of a step is computed.
    """

    again: bool


@contextlib.contextmanager
def frozen_parameters(module: nn.Module) -> Iterator[None]:
    """A context within which the module's parameters get no gradient, though its input does."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
