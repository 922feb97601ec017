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
from ._targets import Nodes, grid, loss, noised, signal, step, weight_for
from ._task import Student, Task
from .progressive import check

__all__ = ["Tract"]


@dataclass(frozen=True)
class Tract:
    """A student that jumps from every node of its teacher's grid to the end of the segment that the node lies in.

    A phase takes a teacher of T steps to a student of n = T / S steps. Of T + 1 nodes those 0, S, 2S, ... are ends of
    segments. At a node i = e + 1 .. e + S of the segment that ends at e, and z_i = alpha_i x + sigma_i eps from data:

        z'  = one DDIM step of the teacher from i to i - 1
        z_e = one jump of the self-teacher, an average of the student itself, from z' at i - 1 to e;  z' where i - 1 = e

    and the student's prediction at z_i is drawn to the x* whose single step from i lands at z_e. The sampler is DDIM on
    the ends of the segments; the other nodes are how the jump is learnt, so that a phase may skip any factor S.

    phases: steps of the teacher, then of each phase's student; each a divisor of the one before. momentum: of the
        self-teacher, in [0, 1), corrected for its short past. lr: peak rate of each phase. weight: of the squared
        error, see `_targets.loss`; "auto" is "raw" for a network that predicts eps and "truncated" for every other.
        last: how many times the training of another phase those to 2 steps and to 1 get.

    Paper: phases 1024, 32, 1, momentum 0.5, max(1, SNR), Adam 2e-4. Cost: 5 evaluations a step of training and image.
    Raises BadInput for phases that do not nest.

    Reference: Berthelot, Autef, Lin, Yap, Zhai, Hu, Zheng, Talbott, Gu 2023, arXiv:2303.04248.
    """

    phases: tuple[int, ...] = (64, 8, 1)
    momentum: float = 0.5
    lr: float = 3e-4
    weight: str = "auto"
    last: float = 2.0
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.phases) < 2:
            raise BadInput(f"tract needs phases such as (64,8,1), the teacher's steps first, got {self.phases}")
        check("tract", self.phases[1:], self.phases[0])
        if not 0 <= self.momentum < 1:
            raise BadInput(f"tract: momentum must lie in [0, 1), got {self.momentum:g}")

    @property
    def teacher_steps(self) -> int:
        """It asks its teacher at the nodes of the teacher's own steps alone."""
        return self.phases[0]

    def distill(self, task: Task) -> Student:
        """Train the stages `steps8`, `steps1`, ...; the last student."""
        teacher: Any = task.teacher
        source = task.initial
        for many, n in zip(self.phases, self.phases[1:], strict=False):
            shadow = EMATarget(task.student(source))
            players = [task.player("student", shadow, self.lesson(task, teacher, shadow, n, many // n), self.lr)]
            trained: Any = task.fit(f"steps{n}", players, share=self.last if n <= 2 else 1.0)["student"]
            teacher = source = trained.student
            made = Student(source, "ddim", "trailing", n)
            task.keep(f"steps{n}", made)
        return made

    def lesson(
        self, task: Task, teacher: Callable[..., Tensor], shadow: EMATarget, n: int, S: int
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """The loss of a phase whose student has n segments of S nodes."""
        schedule, times_of = task.schedule, Nodes(grid(Trailing(), task.schedule, n * S))
        weight = weight_for(shadow.student, self.weight, "truncated")

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            shadow.update(self.momentum)
            x, cond = batch["x"], task.cond(batch)
            nodes = times_of.at(x)
            end = S * torch.randint(0, n, (len(x),), device=nodes.device)
            i = end + torch.randint(1, S + 1, (len(x),), device=nodes.device)
            times = nodes[i], nodes[i - 1], nodes[end]
            z = noised(schedule, x, times[0])
            with torch.no_grad():
                target = jump(teacher, shadow.copy, schedule, z, *times, **cond)
            return loss(shadow.student, z, times[0], target, weight, **cond)

        return lesson


def jump(
    teacher: Callable[..., Tensor],
    itself: Callable[..., Tensor],
    schedule: Schedule,
    z: Tensor,
    t: Tensor,
    middle: Tensor,
    end: Tensor,
    **cond: Any,
) -> Tensor:
    """The x* (B, *S) of the jump from z (B, *S) at t to `end`, both (B,): a step of `teacher` to `middle`, then one of
    `itself`, of whose answer nothing is used where `middle` is `end`.

    It is the mean of both predictions, weighted by what each step gains in k = alpha / sigma.
    """
    first = teacher(z, t, **cond)
    second = itself(step(schedule, z, first, t, middle), middle, **cond)
    sigma = schedule.sigma(end)
    gained = sigma * (signal(schedule, middle) - signal(schedule, t))
    share = gained / (schedule.alpha(end) - sigma * signal(schedule, t))
    mixed = second + spread(share, z) * (first - second)
    return torch.where((middle == end).to(z.device).view(-1, *[1] * (z.ndim - 1)), first, mixed)
