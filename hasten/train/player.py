"""A network that is trained, with its optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadInput, nearest
from .muon import Muon, split

OPTIMISERS = ("adamw", "muon")


@dataclass
class TrainedModule:
    """A module, its loss, and its optimiser's settings. A loop trains one player or several.

    name: of its part in the checkpoint and of its loss in the log.
    loss: `batch -> scalar`; it reaches the module through its own closure. Batches lie on the module's device. Its
        random numbers must come from torch's global generator, which is what makes a resumed run exact.
    lr, betas, weight_decay: AdamW's (Loshchilov & Hutter 2019, 1711.05101); `lr` is the peak rate. The decay is
        decoupled, `w <- w - lr weight_decay w`, and applies to every trained parameter.
    optimiser: `adamw`, or `muon` for hidden matrices with AdamW at `lr` for the rest (see `train.muon`).
    muon_lr: Muon's own peak rate.
    every: the player learns on the steps that this divides.
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

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise BadInput(f"unknown optimiser {self.optimiser!r}: {nearest(self.optimiser, OPTIMISERS)}")
        if not self.lr > 0 or self.every < 1:
            raise BadInput(f"{self.name}: lr must be positive and every at least 1, got {self.lr} and {self.every}")

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimiser over the module's trainable parameters. BadInput where they are of less than 32 bits."""
        for name, p in self.module.named_parameters():
            if p.requires_grad and p.is_floating_point() and p.itemsize < 4:
                raise BadInput(
                    f"{self.name}: the weights {name} are {str(p.dtype).removeprefix('torch.')}, in which small steps "
                    "are lost: train float32 weights (module.float()); precision='bf16' computes in bf16 with them"
                )
        if self.optimiser == "muon":
            matrices, others = split(self.module)
            return Muon(
                matrices, others, self.muon_lr, adam_lr=self.lr, betas=self.betas, weight_decay=self.weight_decay
            )
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        fused = all(p.is_floating_point() for p in parameters)  # it knows no complex numbers
        return torch.optim.AdamW(parameters, self.lr, self.betas, weight_decay=self.weight_decay, fused=fused)
