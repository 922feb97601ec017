"""What the adversarial distillers share: losses of a critic and of what it judges, and the penalty on its slope."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoiser import Denoiser
from ..nets.critic import Critic
from ..predictions import spread
from ..schedules.base import Schedule
from ._targets import noised

if TYPE_CHECKING:
    from ._task import Task


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's `mean max(0, 1 - real) + mean max(0, 1 + fake)` of logits of any shape."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def margin(real: Tensor, fake: Tensor, most: float) -> Tensor:
    """The critic's cross-entropy whose gradient is exactly 0 for real logits above `most` and fake ones below -`most`:

    `mean softplus(-min(real, most)) + mean softplus(max(fake, -most))`.
    """
    return F.softplus(-real.clamp_max(most)).mean() + F.softplus(fake.clamp_min(-most)).mean()


def slope(judge: Callable[[Sequence[Tensor]], Tensor], features: Sequence[Tensor]) -> Tensor:
    """R1: the mean over the batch of `|d sum(logits) / d features|^2`, which itself can be differentiated.

    The gradient is that of the heads' output in their own input, not in the pixels behind it.
    """
    leaves = [f.detach().requires_grad_(True) for f in features]
    with torch.enable_grad():
        gradients = torch.autograd.grad(judge(leaves).float().sum(), leaves, create_graph=True)
    return torch.stack([g.square().flatten(1).sum(1).mean().float() for g in gradients]).sum()


def critic_of(task: Task, pair: bool = False) -> Critic:
    """The critic with heads on the features of a task's network, told as many classes as the task has."""
    return Critic(task.denoiser, task.shape, pair=pair, classes=task.label_count, cond=task.one_cond())


@contextlib.contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Within, what is computed sends no gradient to the module's parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def entry(schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    """Samples x at the times t (B,), (B, *S), those at `t_max` as sampling begins: pure noise, with nothing of x."""
    noise = torch.randn_like(x)
    start = spread((t >= schedule.t_max).to(t.dtype), x)
    pure = spread(schedule.prior_std(t), x) * noise
    return torch.where(start > 0, pure, noised(schedule, x, t, noise))


def predict(student: Denoiser, z: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
    """What the network says at z, t (B,), and the x0 that it means."""
    raw = student.raw(z, t, **cond)
    _, skip, out = student.prediction.coefficients(student.schedule.alpha(t), student.schedule.sigma(t))
    # only there may alpha be 0; elsewhere the numbers are not waited for
    if student.prediction.name == "eps" and student.schedule.zero_snr and not torch.isfinite(skip).all():
        student(z, t, **cond)  # which refuses in its own words
    return raw, spread(skip, z) * z + spread(out, z) * raw
