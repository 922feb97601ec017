"""What the adversarial distillers share: the critic, and the noised samples and outputs that it judges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..nets.critic import Critic
from ..predictions import spread
from ..schedules.base import Schedule
from ._targets import noised

if TYPE_CHECKING:
    from ._task import DistillTask


def build_critic(task: DistillTask, pair: bool = False) -> Critic:
    """The critic with heads on the features of a task's network, for the task's number of classes."""
    return Critic(task.denoiser, task.shape, pair=pair, classes=task.label_count, cond=task.one_cond())


def initial_or_noised(schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    """Samples noised to the times t, or pure noise, independent of x, where t is `t_max`, as at the start of sampling.

    Args:
        schedule: of the noise.
        x: samples (B, *S).
        t: times (B,).

    Returns:
        (B, *S).
    """
    noise = torch.randn_like(x)
    at_start = spread((t >= schedule.t_max).to(t.dtype), x)
    pure = spread(schedule.prior_std(t), x) * noise
    return torch.where(at_start > 0, pure, noised(schedule, x, t, noise))


def predict_raw_and_x0(student: Denoiser, z: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
    """The network's output at z, t (B,), and the x0 that it corresponds to, each (B, *S)."""
    raw = student.raw(z, t, **cond)
    _, skip, out = student.prediction.coefficients(student.schedule.alpha(t), student.schedule.sigma(t))
    # alpha is 0 only there; elsewhere no check that waits for the device is needed
    if student.prediction.name == "eps" and student.schedule.zero_snr and not torch.isfinite(skip).all():
        student(z, t, **cond)  # raises the error
    return raw, spread(skip, z) * z + spread(out, z) * raw
