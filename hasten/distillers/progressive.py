"""Progressive distillation: a student that needs half of its teacher's steps, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..times import Trailing
from ._targets import Nodes, finer_path, grid, loss, noised, path
from ._task import Student, Task

__all__ = ["Progressive"]


@dataclass(frozen=True)
class Progressive:
    """A student of N steps of DDIM that lands where N m steps of its teacher land; then it is the teacher.

    At a node t of the student's grid and z_t = alpha_t x + sigma_t eps from data, the teacher makes m steps of DDIM
    to the student's next node s, and the student's prediction is drawn to the x* whose single step from t lands there
    (`distillers._targets`). t = 1 .. 1/N; the sampler is DDIM on the same grid and ends with the last prediction.

    steps: of the students, falling, each a divisor of the one before. start: steps of the teacher itself, a multiple
        of the first (0: twice as many). lr: peak rate of each stage, whose optimiser starts afresh. weight: of the
        squared error, see `_targets.loss`; both of the paper's are there, "snr+1" and "truncated". last: how many
        times the training of another stage those of 2 steps and of 1 get. order: of the steps that the first student
        learns from: 1, DDIM, or 2, which takes two evaluations (`_targets.finer_path`).

    Paper: N from 8192 or 1024 by halves, Adam 1e-4, lr falling to 0 in each stage, no average of the weights.
    Cost: m + 3 evaluations a step of training and image.

    Reference: Salimans, Ho 2022, arXiv:2202.00512.
    """

    steps: tuple[int, ...] = (8, 4, 2, 1)
    start: int = 0
    lr: float = 3e-4
    weight: str = "auto"
    last: float = 2.0
    order: int = 1
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("progressive", self.steps, self.start)
        check_order("progressive", self.order)

    @property
    def teacher_steps(self) -> int:
        """It asks its teacher at the nodes of the teacher's own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: Task) -> Student:
        """Train the stages `steps8`, `steps4`, ...; the last student."""
        teacher, many = task.teacher, self.start or 2 * self.steps[0]
        source = task.initial
        for n in self.steps:
            student = task.student(source)
            players = [task.player("student", student, self.lesson(task, teacher, student, n, many // n), self.lr)]
            trained = task.fit(f"steps{n}", players, share=self.last if n <= 2 else 1.0)["student"]
            made = Student(trained, "ddim", "trailing", n)  # type: ignore[arg-type]
            task.keep(f"steps{n}", made)
            teacher = source = trained  # type: ignore[assignment]
            many = n
        return made

    def lesson(self, task: Task, teacher: nn.Module, student: Any, n: int, m: int) -> Any:
        """The loss of the student of n steps whose teacher makes m for each."""
        way = finer_path if self.order == 2 and teacher is task.teacher else path
        return halving(task, teacher, student, n, m, way, self.weight)


def halving(
    task: Task,
    teacher: nn.Module,
    student: Any,
    n: int,
    m: int,
    way: Callable[..., Any],
    weight: str,
    told: Callable[[Tensor], dict[str, Tensor]] = lambda x: {},
) -> Callable[[dict[str, Tensor]], Tensor]:
    """The loss of a student of n steps whose teacher goes the `way` of m steps for each; told: what both are told."""
    times_of = Nodes(grid(Trailing(), task.schedule, n * m))

    def lesson(batch: dict[str, Tensor]) -> Tensor:
        x, cond = batch["x"], {**task.cond(batch), **told(batch["x"])}
        nodes = times_of.at(x)
        i = m * torch.randint(1, n + 1, (len(x),), device=nodes.device)
        times = [nodes[i - k] for k in range(m + 1)]
        z = noised(task.schedule, x, times[0])
        with torch.no_grad():
            _, target = way(teacher, task.schedule, z, times, **cond)
        return loss(student, z, times[0], target, weight, **cond)

    return lesson


def check_order(name: str, order: int) -> None:
    """Refuse orders that there are not."""
    if order not in (1, 2):
        raise BadInput(f"{name}: the steps to learn from are of order 1 or 2, got {order}")


def check(name: str, steps: Sequence[int], start: int) -> None:
    """Refuse steps that do not nest. BadInput says which."""
    if not steps or any(n < 1 for n in steps):
        raise BadInput(f"{name} needs steps such as (8,4,2,1), got {steps}")
    chain = [*([start] if start else []), *steps]
    for many, few in zip(chain, chain[1:], strict=False):
        if many <= few or many % few:
            raise BadInput(
                f"{name}: {few} steps cannot follow {many}: each count must be a divisor of the one before, "
                f"such as {', '.join(str(d) for d in range(1, many) if many % d == 0) or 'none of 1'}"
            )
