"""Distribution matching distillation, second form: samples pushed along the difference of two scores, and a GAN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoiser import Denoiser
from ..errors import BadInput
from ..nets.critic import FeatureHeads, label_count, plain_critic
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import Trailing
from ._gan import still
from ._targets import clock, grid, loss, noised
from ._task import Student, Task

__all__ = ["DMD"]


@dataclass(frozen=True)
class DMD:
    """A few-step student whose samples have the law of the data, by the teacher's denoiser and one of the samples.

    x = student(z_s, s) at a random node s of its `steps` = 1 .. 1/steps, where z_s is what its own steps before, run
    without gradient from noise, arrive at. With z_t = alpha_t x + sigma_t e, a fake denoiser that is always being
    trained on the student's samples, and a critic C on the middle features of the fake network:

        g         = (fake(z_t) - teacher(z_t)) / mean_d |x - teacher(z_t)|          a sample; no gradient passes it
        L_student = |x - sg(x - g)|^2 / 2d + gan softplus(-C(z_t))
        L_fake    = w(t) |fake(z_t) - sg(x)|^2 / d + critic [softplus(C(z_t, fake)) + softplus(-C(z_t, real))]

    The teacher is guided, where the task is; the fake denoiser is not. The sampler is "consistency".

    steps: of the student. every: the fake side learns at every step of training, the student at each `every`-th.
    gan, critic: the weights of the GAN, lambda_G and lambda_C; gan = 0 leaves it out. low, high: the times t, uniform
        between them. lr, fake_lr: peak rates.

    Paper: 1 step, 5 updates of the fake side to one of the student, gan 3e-3, critic 1e-2, rate 2e-6 for both, batch
    280; its times are those of a 1,000-step table of noise levels, and w is EDM's, here that of the network.
    Cost: about 7 evaluations a step of training and image, and 6 more at each `every`-th.

    Reference: Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman 2024, arXiv:2405.14867.
    """

    steps: int = 1
    every: int = 5
    gan: float = 3e-3
    critic: float = 1e-2
    low: float = 0.02
    high: float = 0.98
    lr: float = 5e-5
    fake_lr: float = 5e-5
    needs_data: ClassVar[bool] = True
    on_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 1:
            raise BadInput(f"dmd needs steps and every of at least 1, found {self.steps} and {self.every}")
        if not 0 < self.low < self.high < 1:
            raise BadInput(f"dmd needs 0 < low < high < 1, found {self.low} and {self.high}")

    def distill(self, task: Task) -> Student:
        """Train the stage `dmd`."""
        torch.manual_seed(task.seed)  # the critic's first weights
        student, fake = task.student(), Fake(task.student(task.denoiser), task.shape, task.label_count, task.one_cond())
        players = [
            task.player("fake", fake, self.chase(task, student, fake), self.fake_lr, betas=(0.0, 0.999)),
            task.player("student", student, self.lesson(task, student, fake), self.lr, self.every, betas=(0.0, 0.999)),
        ]
        trained = task.fit("dmd", players)["student"]
        made = Student(trained, "consistency", "trailing", self.steps)  # type: ignore[arg-type]
        task.keep("dmd", made)
        return made

    def lesson(self, task: Task, student: Denoiser, fake: Fake) -> Any:
        """The student's loss."""

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            x = self.make(task, student, batch)
            t = self.levels(task.schedule, len(x), clock(x))
            z = noised(task.schedule, x, t)
            with torch.no_grad():
                g = push(x, fake.denoiser(z, t, **cond), task.teacher(z, t, **cond))
            value = 0.5 * (x - (x - g).detach()).square().mean()
            if self.gan:
                with still(fake):
                    value = value + self.gan * F.softplus(-fake.judge(z, t, **cond)).mean()
            return value

        return lesson

    def chase(self, task: Task, student: Denoiser, fake: Fake) -> Any:
        """The loss of the fake denoiser and of the critic on its features."""

        def chase(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            with torch.no_grad():
                x = self.make(task, student, batch)
            t = self.levels(task.schedule, len(x), clock(x))
            z = noised(task.schedule, x, t)
            value = loss(fake.denoiser, z, t, x, "raw", **cond)
            if self.gan:
                real = fake.judge(noised(task.schedule, batch["x"], t), t, **cond)
                made = fake.judge(z, t, **cond)
                value = value + self.critic * (F.softplus(made).mean() + F.softplus(-real).mean())
            return value

        return chase

    def levels(self, schedule: Schedule, n: int, device: torch.device | str = "cpu") -> Tensor:
        """The times (n,) at which the scores are compared."""
        low, high = max(self.low, schedule.t_min), min(self.high, schedule.t_max)
        return low + (high - low) * torch.rand(n, dtype=torch.float64, device=device)

    def make(self, task: Task, student: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """The student's samples (B, *S) at a node drawn for the batch, from where its own steps lead."""
        cond, schedule = task.cond(batch), task.schedule
        nodes = grid(Trailing(), schedule, self.steps).flip(0)
        last = int(torch.randint(0, self.steps, ()))
        z = float(schedule.prior_std(nodes[0])) * torch.randn_like(batch["x"])
        there = nodes.to(clock(z))
        with torch.no_grad():
            for k in range(last):
                z = noised(schedule, student(z, nodes[k], **cond), there[k + 1].expand(len(z)))
        return student(z, nodes[last], **cond)


class Fake(nn.Module):
    """The denoiser of the student's samples, and a critic's head on its middle features (or on z, without any).

    classes: how many labels there are; None: as many as the denoiser says. cond: what the network is told with
    one sample, to look at its features once; None: label 0, where there are classes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: tuple[int, ...],
        classes: int | None = None,
        cond: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        net, classes = denoiser.net, label_count(denoiser) if classes is None else classes
        self.seam = len(shape) == 3 and all(callable(getattr(net, name, None)) for name in ("embed", "encode"))
        self.head: nn.Module
        if self.seam:
            first = next(net.parameters())
            if cond is None:
                cond = {"label": torch.zeros(1, dtype=torch.long, device=first.device)} if classes else {}
            with torch.no_grad():
                middle, _ = denoiser.features(torch.zeros(1, *shape, device=first.device), 0.5, **cond)
            self.head = FeatureHeads([middle.shape[1]], classes).to(first.device)
        else:
            self.head = plain_critic(shape, classes)

    def judge(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Logits (B, M) of z (B, *S) at t (B,): high for noised data."""
        seen = self.denoiser.features(z, t, **cond)[0] if self.seam else z
        return self.head([seen], t, cond.get("label")).float()


def push(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """`(fake - real) / mean_d |x - real|`, (B, *S): the direction away from the data, of the size of one error."""
    size = (x - real).abs().flatten(1).mean(1).clamp_min(1e-6)
    return (fake - real) / spread(size, x)
