"""ProDiff: a student that predicts the clean sample in half of its teacher's few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice, nearest
from ..schedules.base import Schedule
from ..schedules.discrete import Discrete
from ..times import UniformTime
from ._relations import relate, related
from ._targets import DeviceTimes, ddim_path, noised
from ._task import Distiller, DistillTask, Loss, Student
from .progressive import check_nested_steps

__all__ = ["ProDiff", "prodiff_schedule"]

LOSSES = ("l1", "l2")


@dataclass(frozen=True)
class ProDiff(Distiller):
    """Progressive distillation of a teacher of few steps, on the clean sample itself:

        L = mean | x^(z_t) - x* |,   z_t from data at a node t of the student,

    with x* the prediction whose one DDIM step lands where the teacher's steps do (`distillers._targets`). It was
    designed for networks that predict x0 and is the same loss for others. Sampling is DDIM on the student's nodes and
    returns its last prediction, never a noisy sample: on `prodiff_schedule` the last node is at sigma = .75, because
    the teacher's last node is the first entry of a table that does not begin clean.

    A batch may hold `mask`, 1 for data and 0 for padding: (B, frames) for the last dimension of x, or any shape that
    broadcasts to x. Masked entries are zero in the inputs and outputs of teacher and student, and are excluded from the
    mean.

    Paper: 4 -> 2 steps, the student initialised from the teacher, its text encoder frozen, 200,000 updates.
    Cost: 5 model evaluations a training step and image for a halving.

    Args:
        steps: of the students, decreasing, each a divisor of the one before.
        start: of the teacher, 0 for twice the first. On a `Discrete` schedule of start + 1 entries the nodes are those
            entries, and both networks get the index of the entry as their time; on others they are equally spaced down
            to t = 0.
        loss: `"l1"` or `"l2"`.
        frozen: prefixes of the names of parameters that keep the teacher's values, such as those of a text encoder.
        lr: peak learning rate of each stage.

    Raises:
        BadInput: for steps that do not nest, an unknown loss, prefixes that match nothing, and masks of other shapes.

    References:
        Huang, Zhao, Liu, Liu, Cui, Ren 2022, arXiv:2207.06389.
    """

    steps: tuple[int, ...] = (2,)
    start: int = 0
    loss: str = "l1"
    frozen: tuple[str, ...] = ()
    lr: float = 3e-4
    needs_data: ClassVar[bool] = True
    takes_structure: ClassVar[bool] = True
    compares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_nested_steps("prodiff", self.steps, self.start)
        check_choice("loss of prodiff", self.loss, LOSSES)

    @property
    def teacher_steps(self) -> int:
        """The teacher is evaluated at the nodes of its own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: DistillTask) -> Student:
        """Train the stages `steps2`, ... and return the last student."""
        teacher, source, teacher_steps = task.teacher, task.initial, self.teacher_steps
        finest = teacher_nodes(task.schedule, teacher_steps)
        for n in self.steps:
            student: Any = task.student(source)
            self.freeze(student)
            times = finest[:: (len(finest) - 1) // teacher_steps]
            loss_fn = self.loss_fn(task, teacher, student, times, teacher_steps // n)
            modules = related(task, [task.trained_module("student", student, loss_fn, self.lr)])
            trained: Any = task.fit(f"steps{n}", modules)["student"]
            result = Student(trained, "ddim", self.times(finest, n), n)
            task.save_student(f"steps{n}", result)
            teacher, source, teacher_steps = trained, trained, n
        return result

    def loss_fn(self, task: DistillTask, teacher: nn.Module, student: Any, times: Tensor, m: int) -> Loss:
        """The loss of the student whose teacher takes m steps for each of its own; times: the teacher's, increasing."""
        grid = DeviceTimes(times)

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], task.cond(batch)
            mask = batch_mask(batch)
            nodes = grid.at(x)
            i = m * torch.randint(1, (len(nodes) - 1) // m + 1, (len(x),), device=nodes.device)
            times = [nodes[i - k] for k in range(m + 1)]
            z = noised(task.schedule, x, times[0])
            with torch.no_grad():
                _, target = ddim_path(masked(teacher, mask), task.schedule, z, times, **cond)
            x0 = masked(student, mask)(z, times[0], **cond)
            relate(task, batch, x0, x0, target, times[0])
            error = (x0 - target).float()
            error = error.abs() if self.loss == "l1" else error.square()
            if mask is None:
                return error.mean()
            return (error * mask).sum() / mask.expand_as(error).sum().clamp_min(1)

        return loss_fn

    def freeze(self, student: Denoiser) -> None:
        """Exclude the parameters of `frozen` from training. BadInput where a prefix matches none."""
        names = dict(student.net.named_parameters())
        for prefix in self.frozen:
            matching = [p for name, p in names.items() if name == prefix or name.startswith(prefix + ".")]
            if not matching:
                first = sorted({name.partition(".")[0] for name in names})
                raise BadInput(f"prodiff: no parameter names start with {prefix!r}: {nearest(prefix, first)}")
            for parameter in matching:
                parameter.requires_grad_(False)

    def times(self, finest: Tensor, n: int) -> str:
        """The spelling of the student's times: its nodes, and 0 for the prediction at the last one."""
        times = finest.flip(0)[:: (len(finest) - 1) // n][:-1].tolist()
        return f"explicit:values=({','.join(repr(t) for t in [*times, 0.0])})"


def prodiff_schedule(steps: int = 4, beta_min: float = 0.1, beta_max: float = 40.0) -> Discrete:
    """The paper's table of T' = steps + 1 entries:

        alpha^2_k = prod_{j <= k + 1} (1 - b_j),
        b_j = 1 - exp(-beta_min / T' - (beta_max - beta_min)(2 j - 1) / (2 T'^2))

    For 4 steps alpha is .664, .199, .027, .0016, 4e-5: even entry 0 is mostly noise.

    Args:
        steps: of the teacher.
        beta_min, beta_max: as above.
    """
    T = steps + 1
    betas = [1 - math.exp(-beta_min / T - 0.5 * (beta_max - beta_min) * (2 * j - 1) / T**2) for j in range(1, T + 1)]
    return Discrete.from_betas(betas)


def teacher_nodes(schedule: Schedule, steps: int) -> Tensor:
    """The teacher's times, increasing, float64 (steps + 1,): a table's own entries, or equally spaced from 0."""
    if isinstance(schedule, Discrete) and len(schedule.alphas_cumprod) == steps + 1:
        return UniformTime(end=schedule.t_min)(schedule, steps).flip(0)
    return torch.linspace(0, schedule.t_max, steps + 1, dtype=torch.float64)


def batch_mask(batch: dict[str, Tensor]) -> Tensor | None:
    """The batch's mask, of as many dimensions as x, or None."""
    if "mask" not in batch:
        return None
    x, mask = batch["x"], batch["mask"].to(batch["x"].dtype)
    if mask.ndim < x.ndim:
        mask = mask.reshape(len(mask), *[1] * (x.ndim - mask.ndim), *mask.shape[1:])
    if any(size not in (1, full) for size, full in zip(mask.shape, x.shape)):
        raise BadInput(
            f"prodiff: a mask of shape {tuple(batch['mask'].shape)} does not broadcast to x {tuple(x.shape)}"
        )
    return mask


def masked(denoiser: Any, mask: Tensor | None) -> Any:
    """The denoiser with its input and output set to zero where the mask is."""
    if mask is None:
        return denoiser
    return lambda z, t, **cond: denoiser(z * mask, t, **cond) * mask
