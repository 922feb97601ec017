"""Fine-tuning of a sampler for its own number of steps: its images and real ones must look alike to a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import BadInput, nearest
from ..schedules.base import Schedule
from ..times import Trailing
from ._features import classifier, untrained
from ._targets import clock, step
from ._task import Student, Task

__all__ = ["Mmd"]

KERNELS = ("cubic", "rbf")
FEATURES = ("classifier", "random")


@dataclass(frozen=True)
class Mmd:
    """A network fine-tuned through all S steps of DDIM at once, by the gradient of a distance between two samples.

        E[ MMD^2(phi(x), phi(G(z))) + anchor mean |G(z) - G_0(z)|^2 ],     G(z) the S-step sample from noise z

    MMD^2 is unbiased, over a batch of real images x and one of samples with their labels, under the cubic kernel
    (u.v / d + 1)^3 or the Gaussian exp(-|u - v|^2 / d), phi a frozen network, d the mean of |phi(x)|^2 over the batch.
    G_0 is the network before, which keeps G from adversaries of phi. The images are what is imitated, so guidance is
    not: a network in which it is built in moves towards the data.

    steps: S, on the grid "trailing". features: of a "classifier" that is trained first on the task's labelled images,
        the stage `classifier`, or of the same network at "random". It must not be the network that judges. kernel:
        "cubic" or "rbf". anchor: as above. share: of the budget, what the classifier gets for 1 of the fine-tuning.
        width: of the classifier. checkpointing: keep the states between steps only, and evaluate each step again going
        back, for large networks. lr: peak rate.

    Needs batches of 128 and more: what is estimated is not a sum over images.
    Paper: steps 5 to 15, cubic, Inception or CLIP features, no anchor, Adam 5e-6 for some hundred steps.
    Cost: 4 S evaluations a step of training and image with the anchor, 3 S without, S more with checkpointing.
    Raises BadInput for unknown choices, and for a classifier without labels.

    Reference: Aiello, Valsesia, Magli 2023, arXiv:2301.07969; Binkowski et al. 2018, arXiv:1801.01401 (the kernel).
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
    on_samples: ClassVar[bool] = True
    whole_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise BadInput(f"mmd: unknown features {self.features!r}: {nearest(self.features, FEATURES)}")
        if self.kernel not in KERNELS:
            raise BadInput(f"mmd: unknown kernel {self.kernel!r}: {nearest(self.kernel, KERNELS)}")
        if self.steps < 1 or not self.anchor >= 0 or not self.share > 0:
            raise BadInput("mmd needs steps of at least 1, anchor of at least 0 and share above 0")

    @property
    def teacher_steps(self) -> int:
        """The anchor asks it at the nodes of the student's own steps."""
        return self.steps if self.anchor else 0

    def distill(self, task: Task) -> Student:
        """Train the stages `classifier`, where it is wanted, and `mmd`; the student."""
        phi = classifier(task, self.share, self.width) if self.features == "classifier" else untrained(task, self.width)
        student = task.student()
        lesson = self.lesson(task, phi.eval().requires_grad_(False).features, student)
        trained: Any = task.fit("mmd", [task.player("student", student, lesson, self.lr)])["student"]
        made = Student(trained, "ddim", "trailing", self.steps, guidance=(1.0, 1.0))
        task.keep("mmd", made)
        return made

    def lesson(
        self, task: Task, phi: Callable[[Tensor], Tensor], student: Any
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """The loss of the stage `mmd`; phi (B, *S) -> (B, D)."""
        times = Trailing()(task.schedule, self.steps)
        start = float(task.schedule.prior_std(times[0]))

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], task.cond(batch)
            if len(x) < 2:
                raise BadInput("mmd compares samples: it needs batches of 2 and more, better 128")
            z = start * torch.randn_like(x)
            made = sampled(student, task.schedule, z, times, self.checkpointing, **cond)
            with torch.no_grad():
                real = phi(x)
                scale = real.square().sum(1).mean()
            total = mmd2(real, phi(made), self.kernel, scale)
            if self.anchor:
                with torch.no_grad():
                    before = sampled(task.denoiser, task.schedule, z, times, **cond)
                total = total + self.anchor * (made - before).float().square().mean()
            return total

        return lesson


def sampled(
    denoiser: Callable[..., Tensor], schedule: Schedule, z: Tensor, times: Tensor, again: bool = False, **cond: Any
) -> Tensor:
    """Where DDIM takes z (B, *S) along `times`, falling to a clean end, with gradients: the last answer, (B, *S).

    again: the activations of each step are computed a second time, going back, rather than kept.
    """
    there = times.to(clock(z))
    for k, t in enumerate(times[:-1]):
        if again:
            x0 = checkpoint(denoiser, z, t, use_reentrant=False, **cond)
        else:
            x0 = denoiser(z, t, **cond)
        z = step(schedule, z, x0, there[k], there[k + 1])
    return z


def mmd2(x: Tensor, y: Tensor, kernel: str = "cubic", scale: float | Tensor | None = None) -> Tensor:
    """Unbiased squared MMD of features x (M, D) and y (N, D), a scalar that may be negative, differentiable.

    kernel: "cubic" (u.v / scale + 1)^3, "rbf" exp(-|u - v|^2 / scale), "linear" u.v / scale; scale: by default D.
    In float64, where the device has it: the terms nearly cancel.
    """
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    x, y = x.to(dtype), y.to(dtype)
    d = x.shape[1] if scale is None else scale

    def k(u: Tensor, v: Tensor) -> Tensor:
        if kernel == "rbf":
            square = u.square().sum(1)[:, None] + v.square().sum(1) - 2 * u @ v.T
            return torch.exp(-square.clamp_min(0) / d)
        product = u @ v.T / d
        return product if kernel == "linear" else (product + 1) ** 3

    def own(u: Tensor) -> Tensor:
        values = k(u, u)
        return (values.sum() - values.diagonal().sum()) / (len(u) * (len(u) - 1))

    return own(x) + own(y) - 2 * k(x, y).mean()
