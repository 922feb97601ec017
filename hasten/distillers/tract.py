"""TRACT: from many steps to a few in one phase, with the student as its own teacher for all but the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import BadInput
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import Trailing
from ._ema_target import EMATarget
from ._relations import related, relation_recorder
from ._targets import DeviceTimes, ddim_step, noised, prediction_loss, resolve_weight, signal_to_noise, time_nodes
from ._task import Distiller, DistillTask, Loss, Student
from .progressive import check_nested_steps

__all__ = ["Tract"]


@dataclass(frozen=True)
class Tract(Distiller):
    """A student that steps from every node of its teacher's grid to the end of the node's segment.

    A phase takes a teacher of T steps to a student of n = T / S steps. Of T + 1 nodes those 0, S, 2S, ... are ends of
    segments. At a node i = e + 1 .. e + S of the segment that ends at e, and z_i = alpha_i x + sigma_i eps from data:

        z'  = one DDIM step of the teacher from i to i - 1
        z_e = one step of the self-teacher, an average of the student, from z' at i - 1 to e;  z' where i - 1 = e

    and the student's prediction at z_i is trained towards the x* whose single step from i lands at z_e. The sampler is
    DDIM on the ends of the segments; the other nodes are needed to learn the large step, so a phase may have any factor
    S.

    Paper: phases 1024, 32, 1, momentum 0.5, max(1, SNR), Adam 2e-4. Cost: 5 model evaluations a training step and
    image.

    Args:
        phases: steps of the teacher, then of each phase's student; each a divisor of the one before.
        momentum: of the self-teacher, in [0, 1), bias-corrected.
        lr: peak learning rate of each phase.
        weight: of the squared error, see `_targets.prediction_loss`; `"auto"` is `"raw"` for a network that predicts
            eps and `"truncated"` for every other.
        last: training of the phases to 2 steps and 1, relative to another phase's.

    Raises:
        BadInput: for phases that do not nest.

    References:
        Berthelot, Autef, Lin, Yap, Zhai, Hu, Zheng, Talbott, Gu 2023, arXiv:2303.04248.
    """

    phases: tuple[int, ...] = (64, 8, 1)
    momentum: float = 0.5
    lr: float = 3e-4
    weight: str = "auto"
    last: float = 2.0
    needs_data: ClassVar[bool] = True
    takes_structure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.phases) < 2:
            raise BadInput(f"tract needs phases such as (64,8,1), the teacher's steps first, got {self.phases}")
        check_nested_steps("tract", self.phases[1:], self.phases[0])
        if not 0 <= self.momentum < 1:
            raise BadInput(f"tract: momentum must lie in [0, 1), got {self.momentum:g}")

    @property
    def teacher_steps(self) -> int:
        """The teacher is evaluated at the nodes of its own steps alone."""
        return self.phases[0]

    def distill(self, task: DistillTask) -> Student:
        """Train the stages `steps8`, `steps1`, ... and return the last student."""
        teacher: Any = task.teacher
        source = task.initial
        for teacher_steps, n in zip(self.phases, self.phases[1:], strict=False):
            module = EMATarget(task.student(source))
            loss_fn = self.loss_fn(task, teacher, module, n, teacher_steps // n)
            modules = related(task, [task.trained_module("student", module, loss_fn, self.lr)])
            trained: Any = task.fit(f"steps{n}", modules, budget_weight=self.last if n <= 2 else 1.0)["student"]
            teacher = source = trained.student
            result = Student(source, "ddim", "trailing", n)
            task.save_student(f"steps{n}", result)
        return result

    def loss_fn(self, task: DistillTask, teacher: Callable[..., Tensor], module: EMATarget, n: int, S: int) -> Loss:
        """The loss of a phase whose student has n segments of S nodes."""
        schedule, grid = task.schedule, DeviceTimes(time_nodes(Trailing(), task.schedule, n * S))
        weight = resolve_weight(module.student, self.weight, "truncated")

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            module.update(self.momentum)
            x, cond = batch["x"], task.cond(batch)
            nodes = grid.at(x)
            end = S * torch.randint(0, n, (len(x),), device=nodes.device)
            i = end + torch.randint(1, S + 1, (len(x),), device=nodes.device)
            times = nodes[i], nodes[i - 1], nodes[end]
            z = noised(schedule, x, times[0])
            with torch.no_grad():
                target = two_step_target(teacher, module.copy, schedule, z, *times, **cond)
            record = relation_recorder(task, batch, module.student, z, times[0], target)
            return prediction_loss(module.student, z, times[0], target, weight, record, **cond)

        return loss_fn


def two_step_target(
    teacher: Callable[..., Tensor],
    target_model: Callable[..., Tensor],
    schedule: Schedule,
    z: Tensor,
    t: Tensor,
    middle: Tensor,
    end: Tensor,
    **cond: Any,
) -> Tensor:
    """The x* (B, *S) of the step from z (B, *S) at t to `end` over `middle`, by `teacher` and then by `target_model`.

    It is the mean of both predictions, weighted by the increase of k = alpha / sigma; the second is not used where
    `middle` is `end`. The times are (B,).
    """
    first = teacher(z, t, **cond)
    second = target_model(ddim_step(schedule, z, first, t, middle), middle, **cond)
    sigma = schedule.sigma(end)
    gain = sigma * (signal_to_noise(schedule, middle) - signal_to_noise(schedule, t))
    fraction = gain / (schedule.alpha(end) - sigma * signal_to_noise(schedule, t))
    mixed = second + spread(fraction, z) * (first - second)
    return torch.where((middle == end).to(z.device).view(-1, *[1] * (z.ndim - 1)), first, mixed)
