"""Progressive distillation in the feature space of a classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput, check_choice
from ..nets.classifier import Classifier
from ..predictions import spread
from ..times import Trailing
from ._features import random_classifier, trained_classifier
from ._relations import relate, related
from ._targets import DeviceTimes, ddim_path, noised, output_weight, raw_target, time_nodes
from ._task import Distiller, DistillTask, Loss, Student
from .progressive import Progressive, check_nested_steps

__all__ = ["Rcfd"]

FEATURES = ("classifier", "random")


@dataclass(frozen=True)
class Rcfd(Distiller):
    """Progressive distillation whose last stages compare features of a frozen classifier in place of pixels.

    x* is the target of progressive distillation, phi the pooled features of a classifier, p its class probabilities:

        KL( softmax(phi(x*) / tau) || softmax(phi(x)) ) + beta [ gamma mean_b H(p_b) + (1 - gamma) sum_c m_c log m_c ]
            + pixel |x - x*|^2 (weighted),       x the student's prediction, m the mean of p over the batch

    The softmax runs over the features. tau < 1 sharpens the teacher's; the terms of beta favour images of one class
    each and batches of all classes. The pixel term, which the paper does without, stabilises small models.

    Paper: pixels down to 8 steps; then 4, 2, 1 with tau .9 and beta 0 (DenseNet-201) or tau .95, beta .003, gamma .75
    (ResNet-18), no pixel term, Adam 5e-5, cosine. Cost: 5 model evaluations a training step and image, and the
    classifier.

    Args:
        steps: of the students, decreasing, each a divisor of the one before.
        start: as in `progressive`.
        plain: students of at least so many steps are distilled without the classifier.
        tau, beta, gamma, pixel: as above.
        weight: of the pixel term and of the stages without the classifier, see `_targets.prediction_loss`.
        features: of a `"classifier"`, or of the same network with `"random"` weights, without labels (with beta=0).
        share: of the budget, training of the classifier relative to a stage; it is the first stage, `classifier`, on
            the task's labelled images.
        width: of the classifier.
        lr: peak learning rate of each stage.
        last: training of the stages of 2 steps and 1, relative to another stage's.

    Raises:
        BadInput: for steps that do not nest, numbers out of range, and a task without labels.

    References:
        Sun, Chen, Wang, Ye, Feng, Chen 2023, arXiv:2211.12039.
    """

    steps: tuple[int, ...] = (8, 4, 2, 1)
    start: int = 0
    plain: int = 8
    tau: float = 0.95
    beta: float = 0.003
    gamma: float = 0.75
    pixel: float = 0.1
    weight: str = "auto"
    features: str = "classifier"
    share: float = 0.3
    width: int = 32
    lr: float = 3e-4
    last: float = 2.0
    needs_data: ClassVar[bool] = True
    takes_structure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_nested_steps("rcfd", self.steps, self.start)
        check_choice("features of rcfd", self.features, FEATURES)
        if self.features == "random" and self.beta:
            raise BadInput("rcfd: the terms of beta need the classes of a classifier: with features=random use beta=0")
        if not self.tau > 0 or not self.beta >= 0 or not 0 <= self.gamma <= 1 or not self.pixel >= 0:
            raise BadInput("rcfd needs tau above 0, beta and pixel of at least 0, and gamma in [0, 1]")
        if min(self.steps) >= self.plain:
            raise BadInput(
                f"rcfd: with plain={self.plain} every student of {self.steps} is distilled without the "
                f"classifier: use progressive, or plain of at least {min(self.steps) + 1}"
            )
        if not self.share > 0:
            raise BadInput(f"rcfd: share must be above 0, got {self.share:g}")

    @property
    def compares_batch(self) -> bool:
        """The term of beta that favours batches of all classes depends on the whole batch."""
        return self.beta > 0 and self.gamma < 1

    @property
    def needs_labels(self) -> bool:
        """For the classifier."""
        return self.features == "classifier"

    @property
    def teacher_steps(self) -> int:
        """The teacher is evaluated at the nodes of its own steps alone."""
        return self.start or 2 * self.steps[0]

    def distill(self, task: DistillTask) -> Student:
        """Train the stages `classifier`, then `steps8`, `steps4`, ..., and return the last student."""
        if self.features == "classifier":
            net = trained_classifier(task, self.share, self.width).eval().requires_grad_(False)
        else:
            net = random_classifier(task, self.width).eval().requires_grad_(False)
        common = Progressive(self.steps, self.start, self.lr, self.weight, self.last)
        teacher: Any = task.teacher
        source, teacher_steps = task.initial, self.teacher_steps
        for n in self.steps:
            student = task.student(source)
            if n >= self.plain:
                loss_fn = common.loss_fn(task, teacher, student, n, teacher_steps // n)
            else:
                loss_fn = self.loss_fn(task, net, teacher, student, n, teacher_steps // n)
            weight = self.last if n <= 2 else 1.0
            modules = related(task, [task.trained_module("student", student, loss_fn, self.lr)])
            trained: Any = task.fit(f"steps{n}", modules, budget_weight=weight)
            teacher = source = trained["student"]
            result = Student(source, "ddim", "trailing", n)
            task.save_student(f"steps{n}", result)
            teacher_steps = n
        return result

    def loss_fn(
        self, task: DistillTask, net: Classifier, teacher: Callable[..., Tensor], student: Any, n: int, m: int
    ) -> Loss:
        """The loss of the student of n steps whose teacher takes m for each."""
        schedule, grid = task.schedule, DeviceTimes(time_nodes(Trailing(), task.schedule, n * m))

        def loss_fn(batch: dict[str, Tensor]) -> Tensor:
            x, cond = batch["x"], task.cond(batch)
            nodes = grid.at(x)
            i = m * torch.randint(1, n + 1, (len(x),), device=nodes.device)
            times = [nodes[i - k] for k in range(m + 1)]
            z = noised(schedule, x, times[0])
            with torch.no_grad():
                target = ddim_path(teacher, schedule, z, times, **cond)[1].to(z.dtype)
                target_features = net.features(target)
            # one output, used raw and as x0: neither is computed from the other by a division
            raw = student.raw(z, times[0], **cond)
            _, c_skip, c_out = student.prediction.coefficients(schedule.alpha(times[0]), schedule.sigma(times[0]))
            x0 = spread(c_skip, z) * z + spread(c_out, z) * raw
            relate(task, batch, raw, x0, target, times[0])
            features, logits = net(x0)
            total = feature_divergence(target_features, features, self.tau)
            if self.beta:
                total = total + self.beta * class_balance(logits, self.gamma)
            if self.pixel:
                error = (
                    (raw - raw_target(student, z, times[0], target).to(raw.dtype)).float().square().flatten(1).mean(1)
                )
                scale = output_weight(student, times[0], self.weight).to(error.device, torch.float32)
                total = total + self.pixel * (scale * error).mean()
            return total

        return loss_fn


def feature_divergence(teacher: Tensor, student: Tensor, tau: float) -> Tensor:
    """`KL(softmax(teacher / tau) || softmax(student))` over features (B, D), the mean over the batch; at least 0.

    It is 0 where student = teacher / tau + any constant of the sample.
    """
    target = torch.log_softmax(teacher / tau, 1)
    return F.kl_div(torch.log_softmax(student, 1), target, reduction="batchmean", log_target=True)


def class_balance(logits: Tensor, gamma: float) -> Tensor:
    """`gamma mean_b H(p_b) + (1 - gamma) sum_c m_c log m_c` of logits (B, K): the first in [0, log K], the sum in
    [-log K, 0].
    """
    log_p = torch.log_softmax(logits, 1)
    log_mean = torch.logsumexp(log_p, 0) - math.log(len(logits))
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return gamma * entropy + (1 - gamma) * (log_mean.exp() * log_mean).sum()
