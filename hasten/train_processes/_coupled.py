"""Training between two sets whose images are paired within each batch."""

from __future__ import annotations

from torch import Tensor

from ..denoiser import Denoiser
from ..errors import check_choice
from ..train.coupling import couple
from ..train.process_loss import ProcessLoss
from ..train.trained_module import TrainedModule
from ._base import TrainSettings

COUPLINGS = ("none", "ot", "paired")


def check_coupling(coupling: str) -> None:
    """Raise BadInput for an unknown coupling."""
    check_choice("coupling", coupling, COUPLINGS)


def couple_batch(batch: dict[str, Tensor], coupling: str) -> dict[str, Tensor]:
    """The batch with its sources in the order of the coupling: "ot", or "none" and "paired", which leave it."""
    if coupling != "ot":
        return batch
    return {**batch, "source": couple(batch["x"], batch["source"], "ot")}


def coupled_modules(denoiser: Denoiser, settings: TrainSettings, coupling: str) -> list[TrainedModule]:
    """The denoiser as the one trained module, with the loss of its process on coupled batches."""
    loss = ProcessLoss(label_drop=settings.label_drop)

    def coupled_loss(batch: dict[str, Tensor]) -> Tensor:
        return loss(denoiser, couple_batch(batch, coupling))

    return [TrainedModule("model", denoiser, coupled_loss, lr=settings.lr, optimiser=settings.optimizer)]
