"""Adversarial diffusion distillation: few steps, trained by a critic and by the teacher's denoising of the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..nets.critic import Critic
from ..schedules.base import Schedule
from ..times import Trailing
from ..train.adversarial import hinge_loss, r1_penalty
from ..train.augment import Augment
from ..train.losses import LogitNormal
from ..train.trained_module import frozen_parameters
from ._gan import build_critic, initial_or_noised
from ._targets import noised, time_device, time_nodes
from ._task import Distiller, DistillTask, Loss, Student
from .progressive import Progressive

__all__ = ["Adversarial"]

DISTANCES = ("exponential", "sds")
STARTS = ("teacher", "progressive")


@dataclass(frozen=True)
class Adversarial(Distiller):
    """A student of `steps` steps whose samples a critic takes for real and the teacher leaves unchanged.

    At one of the nodes s = 1 .. 1/steps and z_s = alpha_s x + sigma_s eps from data (pure noise at s = 1), with
    x_hat = student(z_s, s):

        L_student = - mean D(x_hat) + strength mean_t c(t) |x_hat - teacher(alpha_t x_hat + sigma_t e, t)|^2 / d
        L_critic  = mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat)) + r1 |dD/dfeatures|^2 at real samples

    No gradient passes through the teacher or its input. The critic: convolutional heads on the frozen network's own
    features (`nets.critic`), of x or x_hat augmented and noised to the same random t = sigmoid(level + u), u normal.
    The sampler is "consistency": x_hat, noised again to the next node, and so on.

    Paper: 4 nodes, lambda 2.5, r1 1e-5, features of a self-supervised transformer, batch 128, 4,000 iterations.
    Cost: about 7 model evaluations a training step and image, 8 with a guided teacher.

    Args:
        steps: of the student (nodes of its training).
        strength: lambda, weight of the teacher's term.
        distance: c(t): `"exponential"` alpha_t; `"sds"` alpha_t sigma_t / 2, whose gradient is
            sigma_t^2 (eps_teacher - e), score distillation.
        r1: weight of the R1 penalty at the heads' input.
        start: the student is initialised as the teacher's network, `"teacher"`, or as a progressive student of as many
            steps, trained first, `"progressive"`.
        level: mean and standard deviation of the logit of t for the critic.
        lr, critic_lr: peak learning rates.
        augment: augment real and generated images alike; not where the network reads a source image, which the shifted
            ones would no longer match.
        every: the student is updated at the steps that this divides.

    Raises:
        BadInput: for steps below 1 and unknown choices.

    References:
        Sauer, Lorenz, Blattmann, Rombach 2023, arXiv:2311.17042.
        Sauer et al. 2024, arXiv:2403.12015, for the teacher's own features of noised samples.
    """

    steps: int = 4
    strength: float = 2.5
    distance: str = "exponential"
    r1: float = 1e-5
    start: str = "teacher"
    level: tuple[float, float] = (1.0, 1.0)
    lr: float = 5e-5
    critic_lr: float = 2e-4
    augment: bool = True
    every: int = 1
    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"adversarial needs steps of at least 1, found {self.steps}")
        check_choice("distance of adversarial", self.distance, DISTANCES)
        check_choice("start of adversarial", self.start, STARTS)

    @property
    def teacher_steps(self) -> int | None:
        """Without the distillation term the teacher only provides initial weights, and features at all times."""
        return 0 if not self.strength and self.start == "teacher" else None

    def distill(self, task: DistillTask) -> Student:
        """Train the stage `adversarial`, after the stages of a progressive student where the start needs them."""
        source = task.initial
        if self.start == "progressive":
            source = Progressive(steps=(4 * self.steps, 2 * self.steps, self.steps)).distill(task).denoiser
        torch.manual_seed(task.seed)  # the critic's first weights
        student, critic = task.student(source), build_critic(task)
        modules = [
            task.trained_module("student", student, self.student_loss(task, student, critic), self.lr, self.every),
            task.trained_module(
                "critic", critic.heads, self.critic_loss(task, student, critic), self.critic_lr, betas=(0.0, 0.99)
            ),
        ]
        trained: Any = task.fit("adversarial", modules)["student"]
        result = Student(trained, "consistency", "trailing", self.steps)
        task.save_student("adversarial", result)
        return result

    def student_loss(self, task: DistillTask, student: Denoiser, critic: Critic) -> Loss:
        """The student's loss; its samples are left in the batch for the critic."""

        def student_loss(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            fake = self.generate(task, student, batch)
            batch["fake"] = fake.detach()
            with frozen_parameters(critic.heads):
                logits = critic(*self.critic_input(task, fake, **cond), **cond)
            loss = -logits.mean()
            if self.strength:
                loss = loss + self.strength * self.distillation_loss(task.teacher, task.schedule, fake, **cond)
            return loss

        return student_loss

    def critic_loss(self, task: DistillTask, student: Denoiser, critic: Critic) -> Loss:
        """The critic's loss."""

        def critic_loss(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            if "fake" not in batch:  # at a step that does not update the student
                with torch.no_grad():
                    batch["fake"] = self.generate(task, student, batch)
            t = self.sample_times(task, len(batch["x"]), time_device(batch["x"]))
            images = batch["x"], batch["fake"]
            with torch.no_grad():
                features = [critic.features(*self.critic_input(task, x, t, **cond), **cond) for x in images]
            real, fake = (critic.head_logits(each, t, **cond) for each in features)
            loss = hinge_loss(real, fake)
            if self.r1:
                loss = loss + self.r1 * r1_penalty(lambda real: critic.head_logits(real, t, **cond), features[0])
            return loss

        return critic_loss

    def generate(self, task: DistillTask, student: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """x_hat (B, *S), each at a random node."""
        x = batch["x"]
        nodes = time_nodes(Trailing(), task.schedule, self.steps)[1:].to(time_device(x))
        s = nodes[torch.randint(0, self.steps, (len(x),), device=nodes.device)]
        return student(initial_or_noised(task.schedule, x, s), s, **task.cond(batch))

    def sample_times(self, task: DistillTask, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Random times (n,) at which the critic sees samples."""
        return LogitNormal(*self.level)(task.schedule, torch.rand(n, dtype=torch.float64, device=device))

    def critic_input(self, task: DistillTask, x: Tensor, t: Tensor | None = None, **cond: Any) -> tuple[Tensor, Tensor]:
        """The critic's input for x (B, *S): x augmented and noised to t, and t, random where it is None."""
        t = self.sample_times(task, len(x), time_device(x)) if t is None else t
        augmented = Augment()(x) if self.augment and "source" not in cond else x
        return noised(task.schedule, augmented, t), t

    def distillation_loss(self, teacher: nn.Module, schedule: Schedule, fake: Tensor, **cond: Any) -> Tensor:
        """The weighted squared error between `fake` (B, *S) and the teacher's denoising of it, a mean over all."""
        # a little below pure noise, where the weight is 0 and an eps network carries no information
        u = torch.rand(len(fake), dtype=torch.float64, device=time_device(fake))
        t = schedule.t_min + (0.999 * schedule.t_max - schedule.t_min) * u
        with torch.no_grad():
            target = teacher(noised(schedule, fake.detach(), t), t, **cond)
        error = (fake - target).square().flatten(1).mean(1)
        return (self.time_weight(schedule, t).to(error.device, error.dtype) * error).mean()

    def time_weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """c(t), float64 (B,)."""
        alpha = schedule.alpha(t)
        return alpha if self.distance == "exponential" else 0.5 * alpha * schedule.sigma(t)
