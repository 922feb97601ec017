"""ProDiff: a student that predicts the clean sample in half of its teacher's few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput, nearest
from ..schedules.base import Schedule
from ..schedules.discrete import Discrete
from ..times import UniformTime
from ._targets import Nodes, noised, path
from ._task import Student, Task
from .progressive import check

__all__ = ["ProDiff", "prodiff_schedule"]

LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class ProDiff:
    """Progressive distillation of a teacher of few steps, on the clean sample itself:

        L = mean | x^(z_t) - x* |,   z_t from data at a node t of the student,

    x* the prediction whose one DDIM step lands where the teacher's steps do (`distillers._targets`). It is made for
    networks that predict x0 and is the same loss for others. Sampling is DDIM on the student's nodes and returns its
    last prediction, never a noisy sample: on `prodiff_schedule` the last node is at sigma = .75, because the teacher's
    last node is the first entry of a table that does not begin clean.

    A batch may hold `mask`, 1 where there is something and 0 where there is padding: (B, frames) for the last dimension
    of x, or any shape that goes with x. What is masked is zero in what teacher and student are given, in what they
    say, and counts for nothing in the mean.

    steps: of the students, falling, each a divisor of the one before. start: of the teacher, 0 for twice the first. On
        a `Discrete` schedule of start + 1 entries the nodes are those entries, and student and teacher are both told
        the index of the entry that they are asked at; on others they are equally spaced down to t = 0.
    loss: "l1" or "l2". frozen: parts of the network, by the beginning of their parameters' names, that stay as the
        teacher has them, such as a text encoder. lr: peak rate of each stage.

    Paper: 4 -> 2 steps, the student initialised from the teacher, its text encoder frozen, 200,000 updates.
    Cost: 5 evaluations a step of training and image for a halving.

    Reference: Huang, Zhao, Liu, Liu, Cui, Ren 2022, arXiv:2207.06389.
    """

    steps: tuple[int, ...] = (2,)
    start: int = 0
    loss: str = "l1"
    frozen: tuple[str, ...] = ()
    lr: float = 3e-4
    needs_data: ClassVar[bool] = True
    on_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("prodiff", self.steps, self.start)
        if self.loss not in LOSSES:
            raise BadInput(f"prodiff has no loss {self.loss!r}: {nearest(self.loss, LOSSES)}")

    @property
    def teacher_steps(self) -> int:
        """It asks its teacher at the nodes of the teacher's own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: Task) -> Student:
        """Train the stages `steps2`, ...; the last student."""
        teacher, source, many = task.teacher, task.initial, self.start or 2 * self.steps[0]
        finest = nodes(task.schedule, many)
        for n in self.steps:
            student: Any = task.student(source)
            self.freeze(student)
            lesson = self.lesson(task, teacher, student, finest[:: (len(finest) - 1) // many], many // n)
            trained: Any = task.fit(f"steps{n}", [task.player("student", student, lesson, self.lr)])["student"]
            made = Student(trained, "ddim", self.times(finest, n), n)
            task.keep(f"steps{n}", made)
            teacher, source, many = trained, trained, n
        return made

    def lesson(self, task: Task, teacher: nn.Module, student: Any, times: Tensor, m: int) -> Any:
        """The loss of the student whose teacher makes m steps for each of its own. times: the teacher's, increasing."""
        times_of = Nodes(times)

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], task.cond(batch)
            mask = mask_of(batch)
            nodes = times_of.at(x)
            i = m * torch.randint(1, (len(nodes) - 1) // m + 1, (len(x),), device=nodes.device)
            visited = [nodes[i - k] for k in range(m + 1)]
            z = noised(task.schedule, x, visited[0])
            with torch.no_grad():
                _, target = path(masked(teacher, mask), task.schedule, z, visited, **cond)
            error = (masked(student, mask)(z, visited[0], **cond) - target).float()
            error = error.abs() if self.loss == "l1" else error.square()
            if mask is None:
                return error.mean()
            return (error * mask).sum() / mask.expand_as(error).sum().clamp_min(1)

        return lesson

    def freeze(self, student: nn.Module) -> None:
        """Keep the parts `frozen` from training. BadInput where the network has none of that name."""
        names = dict(student.net.named_parameters())  # type: ignore[union-attr, operator]
        for beginning in self.frozen:
            chosen = [p for name, p in names.items() if name == beginning or name.startswith(beginning + ".")]
            if not chosen:
                raise BadInput(f"prodiff: no parameters begin with {beginning!r}: "
                               f"{nearest(beginning, sorted({name.partition('.')[0] for name in names}))}")  # fmt: skip
            for parameter in chosen:
                parameter.requires_grad_(False)

    def times(self, finest: Tensor, n: int) -> str:
        """The student's times as a user spells them: its nodes, and 0 for the answer at the last one."""
        mine = finest.flip(0)[:: (len(finest) - 1) // n][:-1].tolist()
        return f"explicit:values=({','.join(repr(t) for t in [*mine, 0.0])})"


def prodiff_schedule(steps: int = 4, beta_min: float = 0.1, beta_max: float = 40.0) -> Discrete:
    """The paper's table of T' = steps + 1 entries:

        alpha^2_k = prod_{j <= k + 1} (1 - b_j),
        b_j = 1 - exp(-beta_min / T' - (beta_max - beta_min)(2 j - 1) / (2 T'^2))

    For 4 steps alpha is .664, .199, .027, .0016, 4e-5: even entry 0 is mostly noise.
    """
    T = steps + 1
    betas = [1 - math.exp(-beta_min / T - 0.5 * (beta_max - beta_min) * (2 * j - 1) / T**2) for j in range(1, T + 1)]
    return Discrete.from_betas(betas)


def nodes(schedule: Schedule, steps: int) -> Tensor:
    """The teacher's times, increasing, float64 (steps + 1,): a table's own entries, or equally spaced from 0."""
    if isinstance(schedule, Discrete) and len(schedule.alphas_cumprod) == steps + 1:
        return UniformTime(end=schedule.t_min)(schedule, steps).flip(0)
    return torch.linspace(0, schedule.t_max, steps + 1, dtype=torch.float64)


def mask_of(batch: dict[str, Tensor]) -> Tensor | None:
    """The batch's mask, of as many dimensions as x, or None."""
    if "mask" not in batch:
        return None
    x, mask = batch["x"], batch["mask"].to(batch["x"].dtype)
    if mask.ndim < x.ndim:
        mask = mask.reshape(len(mask), *[1] * (x.ndim - mask.ndim), *mask.shape[1:])
    if any(have not in (1, want) for have, want in zip(mask.shape, x.shape)):
        raise BadInput(f"prodiff: a mask of shape {tuple(batch['mask'].shape)} does not go with x {tuple(x.shape)}")
    return mask


def masked(denoiser: Any, mask: Tensor | None) -> Any:
    """The denoiser with what is masked set to zero before and after it."""
    if mask is None:
        return denoiser
    return lambda z, t, **cond: denoiser(z * mask, t, **cond) * mask
