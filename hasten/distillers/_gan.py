"""What the adversarial distillers share: losses of critic and student, and the R1 penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..denoiser import Denoiser
from ..nets.critic import Critic
from ..predictions import spread
from ..schedules.base import Schedule
from ._targets import noised

if TYPE_CHECKING:
    from ._task import DistillTask


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's `mean max(0, 1 - real) + mean max(0, 1 + fake)` of logits of any shape, a scalar."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def margin_loss(real: Tensor, fake: Tensor, limit: float) -> Tensor:
    """The critic's cross-entropy, with gradient exactly 0 for real logits above `limit` and fake ones below -`limit`:

        mean softplus(-min(real, limit)) + mean softplus(max(fake, -limit))

    Args:
        real, fake: logits of any shape.
        limit: the margin, infinity for none.

    Returns:
        A scalar.
    """
    return F.softplus(-real.clamp_max(limit)).mean() + F.softplus(fake.clamp_min(-limit)).mean()


def r1_penalty(heads: Callable[[Sequence[Tensor]], Tensor], features: Sequence[Tensor]) -> Tensor:
    """R1: the mean over the batch of `|d sum(logits) / d features|^2`, which itself is differentiable.

    The gradient is that of the heads' output in their own input, not in the pixels behind it.

    Args:
        heads: features -> logits.
        features: at real samples, each (B, ...).

    Returns:
        A scalar.
    """
    leaves = [f.detach().requires_grad_(True) for f in features]
    with torch.enable_grad():
        gradients = torch.autograd.grad(heads(leaves).float().sum(), leaves, create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1).mean().float() for g in gradients]).sum()


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
