"""The structure term of a distillation: relations of a student's samples against those of their targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..train.sadm import Estimates, StructureTerm, clean_samples
from ..train.trained_module import TrainedModule
from ._task import DistillTask

RECORD = "structure"  # key of a batch


def related(task: DistillTask, modules: list[TrainedModule]) -> list[TrainedModule]:
    """The modules of a stage with the task's structure term on the first one, the student, and the term's encoder.

    The student's loss calls `relate`, or the function of `relation_recorder`.
    """
    if task.structure is None:
        return modules
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        structure = StructureTerm(task.structure, tuple(task.shape), task.ranks)
    student, *others = modules
    plain = student.loss

    def loss_fn(batch: dict[str, Any]) -> Tensor:
        loss, estimates = plain(batch), batch.pop(RECORD, None)
        if estimates is None or not structure.active:
            return loss
        return structure.add(loss, estimates.output, estimates, batch)

    student.loss = loss_fn
    return [student, *others, structure.trained_module(student.optimiser)]


def relate(
    task: DistillTask, batch: dict[str, Any], output: Tensor, x0: Tensor, target: Tensor, t: Tensor | None = None
) -> None:
    """Leave the student's estimates and their targets in the batch for the structure term, where there is one.

    Args:
        task: of the run.
        batch: of the step.
        output: what the student's loss is computed from (B, *S).
        x0: its estimates (B, *S), a function of `output`.
        target: (B, *S).
        t: times (B,), for the gate; None: all samples count alike.
    """
    if task.structure is None:
        return
    weights = None
    if t is not None and task.structure.gate not in ("auto", "none"):
        alpha, sigma = task.schedule.alpha(t), task.schedule.sigma(t)
        weights = task.structure.gate_at(alpha, sigma, "none").float().to(x0.device)
    batch[RECORD] = Estimates(output, x0, target, weights)


def relation_recorder(
    task: DistillTask, batch: dict[str, Any], student: Denoiser, z: Tensor, t: Tensor, target: Tensor
) -> Callable[[Tensor], None] | None:
    """A function that passes on what the network returned at z, t to `relate`; None without a structure term."""
    if task.structure is None:
        return None
    return lambda raw: relate(task, batch, raw, clean_samples(student, z, t, raw), target, t)
