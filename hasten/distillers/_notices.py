"""Notices to print before a distillation."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..pick import format_spec
from ..train.sadm import Sadm
from ._task import Distiller


def run_notices(
    distiller: Distiller, denoiser: nn.Module, batch_size: int, parts: int, structure: Sadm | None = None
) -> list[str]:
    """Notices to print before a run: about the dtype of the weights, split batches and eps networks.

    Args:
        distiller: the method.
        denoiser: the teacher's network.
        batch_size: samples in a batch.
        parts: number of parts that a batch is split into: processes times `accumulate`.
        structure: options of the structure term, which sees the parts of all processes at once.
    """
    lines = []
    narrow = {p.dtype for p in denoiser.parameters() if p.is_floating_point() and p.itemsize < 4}
    if narrow:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        lines.append(f"the teacher's weights are {names}: students are trained and saved in float32")
    method = format_spec(distiller).partition(":")[0]
    if parts > 1 and distiller.compares_batch:
        lines.append(
            f"{method} compares the samples of a batch with one another: split into {parts} parts (processes times "
            f"accumulate), its loss sees {batch_size // parts} of the {batch_size} at once"
        )
    if structure is not None and batch_size < 32:
        lines.append(f"structure compares the samples of a batch: {batch_size} are few, 32 or more show more of it")
    prediction: Any = getattr(denoiser, "prediction", None)
    schedule: Any = getattr(denoiser, "schedule", None)
    if distiller.compares_samples and prediction is not None and prediction.name == "eps":
        factor = float(schedule.q(schedule.t_max))
        lines.append(
            f"{method} compares samples, in which the error of a network that predicts eps is {factor:.3g} times as "
            "large at the noisy end: its students may be much worse than those of progressive, tract or guided"
        )
    return lines
