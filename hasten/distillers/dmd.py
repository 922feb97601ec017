"""Distribution matching distillation, second form: gradients from the difference of two scores, and a GAN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoiser import Denoiser
from ..errors import BadInput
from ..nets.critic import FeatureHeads, label_count, plain_critic, text_width
from ..nets.joint import with_source, with_source_shape
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import Trailing
from ..train.trained_module import frozen_parameters
from ._targets import noised, prediction_loss, time_device, time_nodes
from ._task import Distiller, DistillTask, Loss, Student

__all__ = ["DMD"]


@dataclass(frozen=True)
class DMD(Distiller):
    """A few-step student whose samples have the data's distribution, by the teacher's denoiser and one of the samples.

    x = student(z_s, s) at a random node s of its `steps` = 1 .. 1/steps, where z_s is what its own earlier steps, run
    without gradient from noise, arrive at. With z_t = alpha_t x + sigma_t e, a fake denoiser that is continually
    trained on the student's samples, and a critic C on the middle features of the fake network:

        g         = (fake(z_t) - teacher(z_t)) / mean_d |x - teacher(z_t)|        per sample; no gradient passes through
        it L_student = |x - sg(x - g)|^2 / 2d + gan softplus(-C(z_t))
        L_fake    = w(t) |fake(z_t) - sg(x)|^2 / d + critic [softplus(C(z_t, fake)) + softplus(-C(z_t, real))]

    The teacher is guided, where the task is; the fake denoiser is not. The sampler is "consistency".

    Paper: 1 step, 5 updates of the fake denoiser to one of the student, gan 3e-3, critic 1e-2, rate 2e-6 for both,
    batch 280; its times are those of a 1,000-step table of noise levels, and w is EDM's, here that of the network.
    Cost: about 7 model evaluations a training step and image, and 6 more at each `every`-th.

    Args:
        steps: of the student.
        every: the fake denoiser is updated at every training step, the student at each `every`-th.
        gan, critic: lambda_G and lambda_C, weights of the GAN; gan = 0: none.
        low, high: range of the uniform times t, in (0, 1).
        lr, fake_lr: peak learning rates.

    Raises:
        BadInput: for steps or `every` below 1, and times out of range.

    References:
        Yin, Gharbi, Park, Zhang, Shechtman, Durand, Freeman 2024, arXiv:2405.14867.
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
    compares_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 1:
            raise BadInput(f"dmd needs steps and every of at least 1, found {self.steps} and {self.every}")
        if not 0 < self.low < self.high < 1:
            raise BadInput(f"dmd needs 0 < low < high < 1, found {self.low} and {self.high}")

    def distill(self, task: DistillTask) -> Student:
        """Train the stage `dmd`."""
        torch.manual_seed(task.seed)  # the critic's first weights
        student = task.student()
        fake = FakeScore(task.full_copy(task.denoiser), task.shape, task.label_count, task.one_cond())
        modules = [
            task.trained_module("fake", fake, self.fake_loss(task, student, fake), self.fake_lr, betas=(0.0, 0.999)),
            task.trained_module(
                "student", student, self.student_loss(task, student, fake), self.lr, self.every, betas=(0.0, 0.999)
            ),
        ]
        trained: Any = task.fit("dmd", modules)["student"]
        result = Student(trained, "consistency", "trailing", self.steps)
        task.save_student("dmd", result)
        return result

    def student_loss(self, task: DistillTask, student: Denoiser, fake: FakeScore) -> Loss:
        """The student's loss."""

        def student_loss(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            x = self.generate(task, student, batch)
            t = self.sample_times(task.schedule, len(x), time_device(x))
            z = noised(task.schedule, x, t)
            with torch.no_grad():
                g = score_difference(x, fake.denoiser(z, t, **cond), task.teacher(z, t, **cond))
            value = 0.5 * (x - (x - g).detach()).square().mean()
            if self.gan:
                with frozen_parameters(fake):
                    value = value + self.gan * F.softplus(-fake.logits(z, t, **cond)).mean()
            return value

        return student_loss

    def fake_loss(self, task: DistillTask, student: Denoiser, fake: FakeScore) -> Loss:
        """The loss of the fake denoiser and of the critic on its features."""

        def fake_loss(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            with torch.no_grad():
                x = self.generate(task, student, batch)
            t = self.sample_times(task.schedule, len(x), time_device(x))
            z = noised(task.schedule, x, t)
            value = prediction_loss(fake.denoiser, z, t, x, "raw", None, **cond)
            if self.gan:
                real = fake.logits(noised(task.schedule, batch["x"], t), t, **cond)
                generated = fake.logits(z, t, **cond)
                value = value + self.critic * (F.softplus(generated).mean() + F.softplus(-real).mean())
            return value

        return fake_loss

    def sample_times(self, schedule: Schedule, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Random times (n,) at which the scores are compared."""
        low, high = max(self.low, schedule.t_min), min(self.high, schedule.t_max)
        return low + (high - low) * torch.rand(n, dtype=torch.float64, device=device)

    def generate(self, task: DistillTask, student: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """The student's samples (B, *S) at a random node of the batch, from the end of its own earlier steps."""
        cond, schedule = task.cond(batch), task.schedule
        nodes = time_nodes(Trailing(), schedule, self.steps).flip(0)
        last = int(torch.randint(0, self.steps, ()))
        z = float(schedule.prior_std(nodes[0])) * torch.randn_like(batch["x"])
        times = nodes.to(time_device(z))
        with torch.no_grad():
            for k in range(last):
                z = noised(schedule, student(z, nodes[k], **cond), times[k + 1].expand(len(z)))
        return student(z, nodes[last], **cond)


class FakeScore(nn.Module):
    """The denoiser of the student's samples, and a critic's head on its middle features (without features on z, with
    its source image where there is one).

    Args:
        denoiser: to train on the student's samples.
        shape: S of one sample.
        classes: number of labels; None: as many as the denoiser has.
        cond: conditions of one sample, to evaluate the features once; None: label 0, where there are classes.
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
        self.has_features = len(shape) == 3 and all(callable(getattr(net, name, None)) for name in ("embed", "encode"))
        self.head: nn.Module
        if self.has_features:
            device = next(net.parameters()).device
            if cond is None:
                cond = {"label": torch.zeros(1, dtype=torch.long, device=device)} if classes else {}
            with torch.no_grad():
                middle, _ = denoiser.features(torch.zeros(1, *shape, device=device), 0.5, **cond)
            self.head = FeatureHeads([middle.shape[1]], classes, text=text_width(cond)).to(device)
        else:
            self.head = plain_critic(with_source_shape(shape, cond), classes, text=text_width(cond))

    def logits(self, z: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Logits (B, M) of z (B, *S) at t (B,): high for noised data."""
        features = self.denoiser.features(z, t, **cond)[0] if self.has_features else with_source(z, cond)
        return self.head([features], t, **cond).float()


def score_difference(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """`(fake - real) / mean_d |x - real|`, (B, *S): the direction away from the data, normalised by the mean error."""
    size = (x - real).abs().flatten(1).mean(1).clamp_min(1e-6)
    return (fake - real) / spread(size, x)
