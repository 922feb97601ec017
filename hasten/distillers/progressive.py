"""Progressive distillation: a student that needs half of its teacher's steps, again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..times import Trailing
from ._relations import related, relation_recorder
from ._targets import DeviceTimes, ddim_path, midpoint_path, noised, prediction_loss, time_nodes
from ._task import Distiller, DistillTask, Loss, Student

__all__ = ["Progressive"]


@dataclass(frozen=True)
class Progressive(Distiller):
    """A student of N steps of DDIM that lands where N m steps of its teacher land; then it is the teacher.

    At a node t of the student's grid and z_t = alpha_t x + sigma_t eps from data, the teacher takes m steps of DDIM to
    the student's next node s, and the student's prediction is trained towards the x* whose single step from t lands
    there (`distillers._targets`). t = 1 .. 1/N; the sampler is DDIM on the same grid and ends with the last prediction.

    Paper: N from 8192 or 1024 by halves, Adam 1e-4, lr decaying to 0 in each stage, no average of the weights.
    Cost: m + 3 model evaluations a training step and image.

    Args:
        steps: of the students, decreasing, each a divisor of the one before.
        start: steps of the teacher itself, a multiple of the first (0: twice as many).
        lr: peak learning rate of each stage, with a new optimizer.
        weight: of the squared error, see `_targets.prediction_loss`; the paper's are `"snr+1"` and `"truncated"`.
        last: training of the stages of 2 steps and 1, relative to another stage's.
        order: of the steps that the first student learns from: 1, DDIM, or 2, with two model evaluations each
            (`_targets.midpoint_path`).

    Raises:
        BadInput: for steps that do not nest, and another order.

    References:
        Salimans, Ho 2022, arXiv:2202.00512.
    """

    steps: tuple[int, ...] = (8, 4, 2, 1)
    start: int = 0
    lr: float = 3e-4
    weight: str = "auto"
    last: float = 2.0
    order: int = 1
    needs_data: ClassVar[bool] = True
    takes_structure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_nested_steps("progressive", self.steps, self.start)
        check_order("progressive", self.order)

    @property
    def teacher_steps(self) -> int:
        """The teacher is evaluated at the nodes of its own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: DistillTask) -> Student:
        """Train the stages `steps8`, `steps4`, ... and return the last student."""
        teacher, teacher_steps = task.teacher, self.teacher_steps
        source = task.initial
        for n in self.steps:
            student = task.student(source)
            loss_fn = self.loss_fn(task, teacher, student, n, teacher_steps // n)
            modules = related(task, [task.trained_module("student", student, loss_fn, self.lr)])
            trained: Any = task.fit(f"steps{n}", modules, budget_weight=self.last if n <= 2 else 1.0)["student"]
            result = Student(trained, "ddim", "trailing", n)
            task.save_student(f"steps{n}", result)
            teacher = source = trained
            teacher_steps = n
        return result

    def loss_fn(self, task: DistillTask, teacher: nn.Module, student: Any, n: int, m: int) -> Loss:
        """The loss of the student of n steps whose teacher takes m for each."""
        path = midpoint_path if self.order == 2 and teacher is task.teacher else ddim_path
        return halving_loss(task, teacher, student, n, m, path, self.weight)


def halving_loss(
    task: DistillTask,
    teacher: nn.Module,
    student: Any,
    n: int,
    m: int,
    path: Callable[..., Any],
    weight: str,
    inputs: Callable[[Tensor], dict[str, Tensor]] = lambda x: {},
) -> Loss:
    """The loss of a student that takes one step where its teacher takes several.

    Args:
        task: of the run.
        teacher: `teacher(z, t, **cond) -> x0`.
        student: in training.
        n: steps of the student.
        m: steps of the teacher for each.
        path: `ddim_path` or `midpoint_path`.
        weight: of the squared error, see `_targets.prediction_loss`.
        inputs: further conditions of both for a batch x.
    """
    grid = DeviceTimes(time_nodes(Trailing(), task.schedule, n * m))

    def loss_fn(batch: dict[str, Tensor]) -> Tensor:
        x, cond = batch["x"], {**task.cond(batch), **inputs(batch["x"])}
        nodes = grid.at(x)
        i = m * torch.randint(1, n + 1, (len(x),), device=nodes.device)
        times = [nodes[i - k] for k in range(m + 1)]
        z = noised(task.schedule, x, times[0])
        with torch.no_grad():
            _, target = path(teacher, task.schedule, z, times, **cond)
        record = relation_recorder(task, batch, student, z, times[0], target)
        return prediction_loss(student, z, times[0], target, weight, record, **cond)

    return loss_fn


def check_order(name: str, order: int) -> None:
    """Refuse an order that is not 1 or 2. Raises BadInput."""
    if order not in (1, 2):
        raise BadInput(f"{name}: order must be 1 or 2, got {order}")


def check_nested_steps(name: str, steps: Sequence[int], start: int) -> None:
    """Refuse steps of which one is no divisor of the one before. Raises BadInput."""
    if not steps or any(n < 1 for n in steps):
        raise BadInput(f"{name} needs steps such as (8,4,2,1), got {steps}")
    chain = [*([start] if start else []), *steps]
    for teacher_steps, student_steps in zip(chain, chain[1:], strict=False):
        if teacher_steps <= student_steps or teacher_steps % student_steps:
            divisors = [str(d) for d in range(1, teacher_steps) if teacher_steps % d == 0]
            raise BadInput(
                f"{name}: {student_steps} steps cannot follow {teacher_steps}: each count must be a divisor of the one "
                f"before, such as {', '.join(divisors) or 'none of 1'}"
            )
