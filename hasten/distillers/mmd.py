"""Fine-tuning of a sampler for its own number of steps, by the maximum mean discrepancy to real samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import BadInput, check_choice
from ..nets.joint import with_source
from ..schedules.base import Schedule
from ..times import Trailing
from ..utils.devices import has_float64
from ._features import random_classifier, trained_classifier
from ._targets import ddim_step, time_device
from ._task import Distiller, DistillTask, Student

__all__ = ["Mmd"]

KERNELS = ("cubic", "rbf")
FEATURES = ("classifier", "random")


@dataclass(frozen=True)
class Mmd(Distiller):
    """A network fine-tuned through all S steps of DDIM at once, by the gradient of a distance between two samples.

        E[ MMD^2(phi(x), phi(G(z))) + anchor mean |G(z) - G_0(z)|^2 ],     G(z) the S-step sample from noise z

    MMD^2 is unbiased, over a batch of real images x and one of samples with their labels, under the cubic kernel
    (u.v / d + 1)^3 or the Gaussian exp(-|u - v|^2 / d), phi a frozen network, d the mean of |phi(x)|^2 over the batch.
    G_0 is the initial network, which keeps G from adversarial examples of phi. The target is the data, so guidance is
    not imitated: a network in which it is built in moves towards the data. Of a network that reads a source image phi
    reads [x, source], and the distance is that of the joint distributions.

    Needs batches of at least 128: the estimate is not a sum over images.
    Paper: steps 5 to 15, cubic, Inception or CLIP features, no anchor, Adam 5e-6 for some hundred steps.
    Cost: 4 S model evaluations a training step and image with the anchor, 3 S without, S more with checkpointing.

    Args:
        steps: S, on the grid "trailing".
        features: of a `"classifier"` that is trained first on the task's labelled images, the stage `classifier`, or of
            the same network with `"random"` weights. It must not be the network that evaluates the samples.
        kernel: `"cubic"` or `"rbf"`.
        anchor: weight of the anchor.
        share: of the budget, training of the classifier relative to the fine-tuning.
        width: of the classifier.
        checkpointing: store the states between steps only, and evaluate each step again in the backward pass, for large
            networks.
        lr: peak learning rate.

    Raises:
        BadInput: for unknown choices, numbers out of range, and a classifier without labels.

    References:
        Aiello, Valsesia, Magli 2023, arXiv:2301.07969.
        Binkowski et al. 2018, arXiv:1801.01401, for the kernel.
    """

    steps: int = 4
    features: str = "classifier"
    kernel: str = "cubic"
    anchor: float = 0.01
    share: float = 0.1
    width: int = 32
    checkpointing: bool = False
    lr: float = 5e-5
    needs_data: ClassVar[bool] = True
    compares_samples: ClassVar[bool] = True
    compares_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("features of mmd", self.features, FEATURES)
        check_choice("kernel of mmd", self.kernel, KERNELS)
        if self.steps < 1 or not self.anchor >= 0 or not self.share > 0:
            raise BadInput("mmd needs steps of at least 1, anchor of at least 0 and share above 0")

    @property
    def needs_labels(self) -> bool:
        """For the classifier."""
        return self.features == "classifier"

    @property
    def teacher_steps(self) -> int:
        """The anchor evaluates the teacher at the nodes of the student's own steps."""
        return self.steps if self.anchor else 0

    def distill(self, task: DistillTask) -> Student:
        """Train the stages `classifier`, where it is needed, and `mmd`, and return the student."""
        phi = (
            trained_classifier(task, self.share, self.width, joint=True)
            if self.features == "classifier"
            else random_classifier(task, self.width, joint=True)
        )
        student = task.student()
        loss_fn = self.loss_fn(task, phi.eval().requires_grad_(False).features, student)
        trained: Any = task.fit("mmd", [task.trained_module("student", student, loss_fn, self.lr)])["student"]
        result = Student(trained, "ddim", "trailing", self.steps, guidance=(1.0, 1.0))
        task.save_student("mmd", result)
        return result

    def loss_fn(
        self, task: DistillTask, phi: Callable[[Tensor], Tensor], student: Any
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """The loss of the stage `mmd`; phi (B, *S) -> (B, D)."""
        times = Trailing()(task.schedule, self.steps)
        start = float(task.schedule.prior_std(times[0]))

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], task.cond(batch)
            if len(x) < 2:
                raise BadInput("mmd compares samples: it needs batches of at least 2, better 128")
            z = start * torch.randn_like(x)
            generated = ddim_sample(student, task.schedule, z, times, cond, self.checkpointing)
            with torch.no_grad():
                real = phi(with_source(x, cond))
                scale = real.square().sum(1).mean()
            total = mmd2(real, phi(with_source(generated, cond)), self.kernel, scale)
            if self.anchor:
                with torch.no_grad():
                    before = ddim_sample(task.denoiser, task.schedule, z, times, cond)
                total = total + self.anchor * (generated - before).float().square().mean()
            return total

        return loss_fn


def ddim_sample(
    denoiser: Callable[..., Tensor],
    schedule: Schedule,
    z: Tensor,
    times: Tensor,
    cond: dict[str, Tensor],
    checkpointing: bool = False,
) -> Tensor:
    """The DDIM sample (B, *S) from z (B, *S), with gradients.

    Args:
        denoiser: `denoiser(z, t, **cond) -> x0`.
        schedule: of the noise.
        z: state (B, *S) at the first time.
        times: decreasing to a clean end.
        cond: conditions of the denoiser.
        checkpointing: compute the activations of each step again in the backward pass instead of storing them.
    """
    on_device = times.to(time_device(z))
    for k, t in enumerate(times[:-1]):
        if checkpointing:
            x0 = checkpoint(functools.partial(denoiser, **cond), z, t, use_reentrant=False)
        else:
            x0 = denoiser(z, t, **cond)
        z = ddim_step(schedule, z, x0, on_device[k], on_device[k + 1])
    return z


def mmd2(x: Tensor, y: Tensor, kernel: str = "cubic", scale: float | Tensor | None = None) -> Tensor:
    """Unbiased squared MMD of two sets of features, a scalar that may be negative, differentiable.

    Computed in float64, where the device has it: the terms nearly cancel.

    Args:
        x, y: features (M, D) and (N, D).
        kernel: `"cubic"` (u.v / scale + 1)^3, `"rbf"` exp(-|u - v|^2 / scale), `"linear"` u.v / scale.
        scale: of the kernel; None: D.
    """
    dtype = torch.float64 if has_float64(x.device) else torch.float32
    x, y = x.to(dtype), y.to(dtype)
    d = x.shape[1] if scale is None else scale

    def k(u: Tensor, v: Tensor) -> Tensor:
        if kernel == "rbf":
            square = u.square().sum(1)[:, None] + v.square().sum(1) - 2 * u @ v.T
            return torch.exp(-square.clamp_min(0) / d)
        product = u @ v.T / d
        return product if kernel == "linear" else (product + 1) ** 3

    def off_diagonal_mean(u: Tensor) -> Tensor:
        values = k(u, u)
        return (values.sum() - values.diagonal().sum()) / (len(u) * (len(u) - 1))

    return off_diagonal_mean(x) + off_diagonal_mean(y) - 2 * k(x, y).mean()
