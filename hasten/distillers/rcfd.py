"""Progressive distillation through a classifier's eyes: what the student must match is a distribution over features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput
from ..nets.classifier import Classifier
from ..predictions import spread
from ..times import Trailing
from ._features import classifier
from ._targets import Nodes, factor, grid, noised, path, raw_target
from ._task import Student, Task
from .progressive import Progressive, check

__all__ = ["Rcfd"]


@dataclass(frozen=True)
class Rcfd:
    """Progressive distillation whose last stages compare features of a frozen classifier in place of pixels.

    x* is the target of progressive distillation, phi the pooled features of a classifier, p its class probabilities:

        KL( softmax(phi(x*) / tau) || softmax(phi(x)) ) + beta [ gamma mean_b H(p_b) + (1 - gamma) sum_c m_c log m_c ]
            + pixel |x - x*|^2 (weighted),       x the student's answer, m the mean of p over the batch

    The softmax runs over the features. tau < 1 sharpens the teacher's; the terms of beta want each image to be of one
    class and the batch to be of all. The pixel term, which the paper does without, holds small models in place.

    steps: of the students, falling, each a divisor of the one before. start: as in `progressive`. plain: students of
        at least so many steps are distilled the plain way. tau, beta, gamma, pixel: as above. weight: of the pixel
        term and of the plain stages, see `_targets.loss`. share: of the budget, what the classifier gets for 1 of a
        stage; it is the first stage, `classifier`, on the task's labelled images. width: of it. lr: peak rate of each
        stage. last: how many times the training of another stage those of 2 steps and of 1 get.

    Paper: plain down to 8; then 4, 2, 1 with tau .9 and beta 0 (DenseNet-201) or tau .95, beta .003, gamma .75
    (ResNet-18), no pixel term, Adam 5e-5, cosine. Cost: 5 evaluations a step of training and image, and the classifier.
    Raises BadInput for steps that do not nest, settings out of range, and a task without labels.

    Reference: Sun, Chen, Wang, Ye, Feng, Chen 2023, arXiv:2211.12039.
    """

    steps: tuple[int, ...] = (8, 4, 2, 1)
    start: int = 0
    plain: int = 8
    tau: float = 0.95
    beta: float = 0.003
    gamma: float = 0.75
    pixel: float = 0.1
    weight: str = "auto"
    share: float = 0.3
    width: int = 32
    lr: float = 3e-4
    last: float = 2.0
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("rcfd", self.steps, self.start)
        if not self.tau > 0 or not self.beta >= 0 or not 0 <= self.gamma <= 1 or not self.pixel >= 0:
            raise BadInput("rcfd needs tau above 0, beta and pixel of at least 0, and gamma in [0, 1]")
        if min(self.steps) >= self.plain:
            raise BadInput(
                f"rcfd: with plain={self.plain} every student of {self.steps} is a plain one: "
                f"use progressive, or plain={min(self.steps) + 1} and more"
            )
        if not self.share > 0:
            raise BadInput(f"rcfd: share must be above 0, got {self.share:g}")

    @property
    def whole_batches(self) -> bool:
        """The term of beta that wants a batch to be of all classes sees the whole batch."""
        return self.beta > 0 and self.gamma < 1

    @property
    def teacher_steps(self) -> int:
        """It asks its teacher at the nodes of the teacher's own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: Task) -> Student:
        """Train the stages `classifier`, then `steps8`, `steps4`, ...; the last student."""
        net = classifier(task, self.share, self.width).eval().requires_grad_(False)
        common = Progressive(self.steps, self.start, self.lr, self.weight, self.last)
        teacher: Any = task.teacher
        source, many = task.initial, self.start or 2 * self.steps[0]
        for n in self.steps:
            student = task.student(source)
            if n >= self.plain:
                lesson = common.lesson(task, teacher, student, n, many // n)
            else:
                lesson = self.lesson(task, net, teacher, student, n, many // n)
            share = self.last if n <= 2 else 1.0
            trained: Any = task.fit(f"steps{n}", [task.player("student", student, lesson, self.lr)], share=share)
            teacher = source = trained["student"]
            made = Student(source, "ddim", "trailing", n)
            task.keep(f"steps{n}", made)
            many = n
        return made

    def lesson(
        self, task: Task, net: Classifier, teacher: Callable[..., Tensor], student: Any, n: int, m: int
    ) -> Callable[[dict[str, Tensor]], Tensor]:
        """The loss of the student of n steps whose teacher makes m for each."""
        schedule, times_of = task.schedule, Nodes(grid(Trailing(), task.schedule, n * m))

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], task.cond(batch)
            nodes = times_of.at(x)
            i = m * torch.randint(1, n + 1, (len(x),), device=nodes.device)
            times = [nodes[i - k] for k in range(m + 1)]
            z = noised(schedule, x, times[0])
            with torch.no_grad():
                target = path(teacher, schedule, z, times, **cond)[1].to(z.dtype)  # the classifier's, too
                wanted = net.features(target)
            # what the network says once, and as an image: neither is made from the other by a division
            raw = student.raw(z, times[0], **cond)
            _, c_skip, c_out = student.prediction.coefficients(schedule.alpha(times[0]), schedule.sigma(times[0]))
            features, logits = net(spread(c_skip, z) * z + spread(c_out, z) * raw)
            total = divergence(wanted, features, self.tau)
            if self.beta:
                total = total + self.beta * balance(logits, self.gamma)
            if self.pixel:
                error = (
                    (raw - raw_target(student, z, times[0], target).to(raw.dtype)).float().square().flatten(1).mean(1)
                )
                scale = factor(student, times[0], self.weight).to(error.device, torch.float32)
                total = total + self.pixel * (scale * error).mean()
            return total

        return lesson


def divergence(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """`KL(softmax(teacher / tau) || softmax(student))` over features (B, D), the mean over the batch; at least 0.

    It is 0 where student = teacher / tau + any constant of the sample.
    """
    wanted = torch.log_softmax(teacher / tau, 1)
    return F.kl_div(torch.log_softmax(student, 1), wanted, reduction="batchmean", log_target=True)


def balance(logits: Tensor, gamma: float) -> Tensor:
    """`gamma mean_b H(p_b) + (1 - gamma) sum_c m_c log m_c` of logits (B, K): the first in [0, log K], the sum in
    [-log K, 0]."""
    log_p = torch.log_softmax(logits, 1)
    log_mean = torch.logsumexp(log_p, 0) - math.log(len(logits))
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return gamma * entropy + (1 - gamma) * (log_mean.exp() * log_mean).sum()
