"""The first model evaluation of a few-step student by its teacher, which restores the diversity that it lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput
from ..schedules.base import Schedule

__all__ = ["FirstEvaluation", "check_same_schedule"]


class FirstEvaluation(Wrapper):
    """A student whose evaluation at the first time of a trajectory is the teacher's.

    Distilled models choose the layout of an image in their first step, and most of the diversity within a prompt is
    lost there: with the teacher's x0 in that step, and the student's from then on, it comes back for the cost of one
    evaluation of the teacher.

    Args:
        student: with its guidance.
        teacher: with its guidance, on the same schedule.
        scale: the guidance scale of the student, the only one that this denoiser has.

    References:
        Gandikota, Bau 2025, arXiv:2503.10637.
    """

    step_counts = None
    net_takes_guidance = False

    def __init__(self, student: nn.Module, teacher: nn.Module, scale: float) -> None:
        super().__init__(student)
        check_same_schedule(student, teacher)
        self.teacher = teacher
        self.guidance_range = (scale, scale)
        self.first: float | None = None

    @property
    def counted(self) -> list[nn.Module]:
        """The networks whose evaluations are counted."""
        return [self.denoiser.net, self.teacher.net]

    def reset(self) -> None:
        """Begin a trajectory: its first evaluation is the teacher's."""
        self.first = None

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """x0 (B, *S)."""
        now = float(torch.as_tensor(t).max())
        if self.first is None:
            self.first = now
        denoiser = self.teacher if now == self.first else self.denoiser
        x0: Tensor = denoiser(x_t, t, **cond)
        return x0


def check_same_schedule(student: nn.Module, teacher: nn.Module) -> None:
    """Raise BadInput where two denoisers have other noise levels at the same times."""
    one, other = student.schedule, teacher.schedule
    assert isinstance(one, Schedule) and isinstance(other, Schedule)
    times = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    for t in times:
        pair = [(float(s.alpha(t)), float(s.sigma(t))) for s in (one, other)]
        if max(abs(a - b) for a, b in zip(*pair, strict=True)) > 1e-4:
            raise BadInput(
                "the first evaluation by a teacher needs the student's noise schedule: at t = "
                f"{float(t):.2g} alpha is {pair[0][0]:.4g} for the student and {pair[1][0]:.4g} for the teacher"
            )
