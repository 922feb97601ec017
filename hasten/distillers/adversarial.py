"""Adversarial diffusion distillation: few steps, judged by a critic and by what the teacher makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, nearest
from ..nets.critic import Critic
from ..schedules.base import Schedule
from ..times import Trailing
from ..train.augment import Augment
from ..train.losses import LogitNormal
from ._gan import critic_of, entry, hinge, slope, still
from ._targets import clock, grid, noised
from ._task import Student, Task
from .progressive import Progressive

__all__ = ["Adversarial"]

DISTANCES = ("exponential", "sds")
STARTS = ("teacher", "progressive")


@dataclass(frozen=True)
class Adversarial:
    """A student of `steps` steps whose samples a critic takes for real and the teacher leaves where they are.

    At one of the nodes s = 1 .. 1/steps and z_s = alpha_s x + sigma_s eps from data (nothing but noise at s = 1), with
    x_hat = student(z_s, s):

        L_student = - mean D(x_hat) + strength mean_t c(t) |x_hat - teacher(alpha_t x_hat + sigma_t e, t)|^2 / d
        L_critic  = mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat)) + r1 |dD/dfeatures|^2 at real samples

    No gradient passes the teacher or its input. The critic: convolutional heads on the frozen network's own features
    (`nets.critic`), of x or x_hat augmented and noised to the same random t = sigmoid(level + u), u normal.
    The sampler is "consistency": x_hat, noised anew to the next node, and so on.

    steps: of the student (nodes of its training). strength: lambda, of the teacher's term. distance: c(t):
        "exponential" alpha_t; "sds" alpha_t sigma_t / 2, whose gradient is sigma_t^2 (eps_teacher - e), score
        distillation. r1: weight of the slope at the heads' input. start: the student begins as the teacher's network,
        or "progressive", as a progressive student of as many steps, trained first. level: mean and standard deviation
        of the logit of t for the critic. lr, critic_lr: peak rates. augment: of real and made images alike. every: the
        student learns on the steps that this divides.

    Paper: 4 nodes, lambda 2.5, r1 1e-5, features of a self-supervised transformer, batch 128, 4,000 iterations.
    Cost: about 7 evaluations a step of training and image, 8 with a guided teacher.

    Reference: Sauer, Lorenz, Blattmann, Rombach 2023, arXiv:2311.17042; the teacher's own features, renoised:
    Sauer et al. 2024, arXiv:2403.12015.
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
        for name, choices in (("distance", DISTANCES), ("start", STARTS)):
            if getattr(self, name) not in choices:
                asked = getattr(self, name)
                raise BadInput(f"adversarial: unknown {name} {asked!r}: {nearest(asked, choices)}")

    @property
    def teacher_steps(self) -> int | None:
        """Without the distance from its answers the teacher only lends its weights, and features at all times."""
        return 0 if not self.strength and self.start == "teacher" else None

    def distill(self, task: Task) -> Student:
        """Train the stage `adversarial`, after the stages of the start where it needs any."""
        source = task.initial
        if self.start == "progressive":
            source = Progressive(steps=(4 * self.steps, 2 * self.steps, self.steps)).distill(task).denoiser
        torch.manual_seed(task.seed)  # the critic's first weights
        student, critic = task.student(source), critic_of(task)
        players = [
            task.player("student", student, self.lesson(task, student, critic), self.lr, self.every),
            task.player("critic", critic.heads, self.trial(task, student, critic), self.critic_lr, betas=(0.0, 0.99)),
        ]
        trained = task.fit("adversarial", players)["student"]
        made = Student(trained, "consistency", "trailing", self.steps)  # type: ignore[arg-type]
        task.keep("adversarial", made)
        return made

    def lesson(self, task: Task, student: Denoiser, critic: Critic) -> Any:
        """The student's loss; what it made is left in the batch for the critic."""

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            fake = self.make(task, student, batch)
            batch["fake"] = fake.detach()
            with still(critic.heads):
                judged = critic(*self.shown(task, fake), **cond)
            loss = -judged.mean()
            if self.strength:
                loss = loss + self.strength * self.pull(task.teacher, task.schedule, fake, **cond)
            return loss

        return lesson

    def trial(self, task: Task, student: Denoiser, critic: Critic) -> Any:
        """The critic's loss."""

        def trial(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            if "fake" not in batch:  # on a step when the student does not learn
                with torch.no_grad():
                    batch["fake"] = self.make(task, student, batch)
            t = self.levels(task, len(batch["x"]), clock(batch["x"]))
            with torch.no_grad():
                seen = [critic.features(*self.shown(task, x, t), **cond) for x in (batch["x"], batch["fake"])]
            real, fake = (critic.head_logits(features, t, **cond) for features in seen)
            loss = hinge(real, fake)
            if self.r1:
                loss = loss + self.r1 * slope(lambda features: critic.head_logits(features, t, **cond), seen[0])
            return loss

        return trial

    def make(self, task: Task, student: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """x_hat (B, *S) at a random node each."""
        x = batch["x"]
        nodes = grid(Trailing(), task.schedule, self.steps)[1:].to(clock(x))
        s = nodes[torch.randint(0, self.steps, (len(x),), device=nodes.device)]
        return student(entry(task.schedule, x, s), s, **task.cond(batch))

    def levels(self, task: Task, n: int, device: torch.device | str = "cpu") -> Tensor:
        """The times (n,) at which the critic sees samples."""
        return LogitNormal(*self.level)(task.schedule, torch.rand(n, dtype=torch.float64, device=device))

    def shown(self, task: Task, x: Tensor, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the critic sees of x (B, *S): augmented and noised to t (drawn where not given), and t."""
        t = self.levels(task, len(x), clock(x)) if t is None else t
        return noised(task.schedule, Augment()(x) if self.augment else x, t), t

    def pull(self, teacher: nn.Module, schedule: Schedule, fake: Tensor, **cond: Any) -> Tensor:
        """The distance of `fake` (B, *S) from what the teacher makes of it, noised: weighted, a mean over all."""
        # a little below pure noise, where the weight is 0 and an eps network says nothing
        u = torch.rand(len(fake), dtype=torch.float64, device=clock(fake))
        t = schedule.t_min + (0.999 * schedule.t_max - schedule.t_min) * u
        with torch.no_grad():
            target = teacher(noised(schedule, fake.detach(), t), t, **cond)
        error = (fake - target).square().flatten(1).mean(1)
        return (self.factor(schedule, t).to(error.device, error.dtype) * error).mean()

    def factor(self, schedule: Schedule, t: Tensor) -> Tensor:
        """c(t), float64 (B,)."""
        alpha = schedule.alpha(t)
        return alpha if self.distance == "exponential" else 0.5 * alpha * schedule.sigma(t)
