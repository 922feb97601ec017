"""Diffusion GANs: a diffusion network that takes large steps, trained by a critic of noised samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..nets.critic import zeroed
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import Trailing
from ..train.adversarial import margin_loss, r1_penalty
from ..train.trained_module import frozen_parameters
from ._gan import build_critic, initial_or_noised, predict_raw_and_x0
from ._targets import TINY, noised, raw_target, time_device, time_nodes
from ._task import Distiller, DistillTask, Loss, Student

__all__ = ["DiffusionGAN"]

CriticFn = Callable[..., Tensor]
CRITICS = ("net", "heads")
TIMES = ("nodes", "all")


@dataclass(frozen=True)
class DiffusionGAN(Distiller):
    """A student whose samples, noised to the next time, a critic takes for data noised to that time.

    From z_t = alpha_t x + sigma_t eps, with x_hat = student(z_t, t) and t' = max(t - 1/steps, 0):

        fake y' = alpha_t' x_hat + sigma_t' e1,      real y = alpha_t' x + sigma_t' e2
        L_student = softplus(-min(D(y', t'), m)) + strength w(t) |x - x_hat|^2 / d
        L_critic  = softplus(-min(D(y, t'), m)) + softplus(max(D(y', t'), -m))         m: the margin

    The fake comes from x_hat alone with new noise, and not from z_t, which is what makes one step enough; the second
    term ties x_hat to z_t. The sampler is "consistency" with 1, 2 or `steps` steps: any divisor of `steps`.

    Paper's code: K = 4, t among all, critic "net", Adam 1e-4 for both, critic every 2nd step, batch 512.
    Cost: about 8 model evaluations a training step and image with the critic "net".

    Args:
        steps: K, coarse steps.
        times: of training: `"nodes"` 1, 1 - 1/K, .. 1/K, or `"all"` in (0, 1].
        critic: `"net"`, a second copy of the network whose last layer starts at zero, its output the map of logits; or
            `"heads"` on the frozen network's features (`nets.critic`).
        posterior: the hybrid of the denoising diffusion GAN: real and fake are samples at t' of the Gaussian posteriors
            q(z_t' | z_t, x) and q(z_t' | z_t, x_hat), and the critic, always feature heads here, sees the pair
            (z_t', z_t). The sampler is then "ddpm" on the same `steps` nodes, whose steps are that posterior; the only
            randomness of x_hat is that of z_t (the paper's generator also has a latent variable).
        margin: m; None: infinite.
        strength: weight of the reconstruction.
        r1: weight of the R1 penalty at the heads' input.
        lr, critic_lr: peak learning rates.
        every: the critic is updated at the steps that this divides.
        sampled: steps of the recommended sampler, a divisor of K; 0: K. UFOGen and MobileDiffusion train with K = 4 and
            times "all", which leaves z_t informative about x, and sample in 1.

    Raises:
        BadInput: for steps below 1, unknown choices, `r1` without heads, and `sampled` that is no divisor.

    References:
        Xu, Zhao, Xiao, Hou 2023, arXiv:2311.09257; used for one step by Zhao et al. 2023, arXiv:2311.16567.
        Xiao, Kreis, Vahdat 2021, arXiv:2112.07804, for the posterior.
    """

    steps: int = 4
    times: str = "nodes"
    critic: str = "net"
    posterior: bool = False
    margin: float | None = 0.5
    strength: float = 1.0
    r1: float = 0.0
    lr: float = 1e-4
    critic_lr: float = 1e-4
    every: int = 2
    sampled: int = 0
    needs_data: ClassVar[bool] = True
    teacher_steps: ClassVar[int] = 0  # it only provides initial weights

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"diffusion_gan needs steps of at least 1, found {self.steps}")
        if self.sampled and (self.sampled < 1 or self.steps % self.sampled or self.posterior):
            raise BadInput(
                f"diffusion_gan: sampled must be a divisor of steps={self.steps}, 0 with posterior, got {self.sampled}"
            )
        check_choice("critic of diffusion_gan", self.critic, CRITICS)
        check_choice("times of diffusion_gan", self.times, TIMES)
        if self.r1 and self.critic == "net" and not self.posterior:
            raise BadInput(
                f"diffusion_gan: r1={self.r1:g} penalises the gradient at the heads' input: use critic=heads, or r1=0"
            )

    def distill(self, task: DistillTask) -> Student:
        """Train the stage `gan`."""
        torch.manual_seed(task.seed)  # the critic's first weights
        student = task.student()
        critic, module, penalty = self.build_critic(task)
        critic_loss = self.critic_loss(task, student, critic, penalty)
        modules = [
            task.trained_module(
                "student", student, self.student_loss(task, student, critic, module), self.lr, betas=(0.9, 0.999)
            ),
            task.trained_module("critic", module, critic_loss, self.critic_lr, self.every, betas=(0.0, 0.999)),
        ]
        trained: Any = task.fit("gan", modules)["student"]
        steps = self.sampled or self.steps
        result = Student(trained, "ddpm" if self.posterior else "consistency", "trailing", steps)
        task.save_student("gan", result)
        return result

    def build_critic(self, task: DistillTask) -> tuple[CriticFn, nn.Module, CriticFn]:
        """The critic, its trained module, and its R1 penalty, called with the critic's arguments."""
        if self.posterior or self.critic == "heads":
            heads = build_critic(task, pair=self.posterior)
            features = heads.pair_features if self.posterior else heads.features

            def penalty(*inputs: Tensor, **cond: Any) -> Tensor:
                with torch.no_grad():
                    maps = features(*inputs, **cond)
                return r1_penalty(lambda maps: heads.head_logits(maps, inputs[-1], **cond), maps)

            return (heads.pair if self.posterior else heads), heads.heads, penalty
        copied = task.full_copy(task.denoiser)
        try:
            zeroed(copied.net)
        except ValueError as e:
            raise BadInput(f"diffusion_gan: {e}: critic=heads") from e

        def logits(y: Tensor, s: Tensor, **cond: Any) -> Tensor:
            return copied.raw(y, s, **cond).flatten(1).float()

        return logits, copied, logits  # r1 is 0 here: see __post_init__

    def student_loss(self, task: DistillTask, student: Denoiser, critic: CriticFn, module: nn.Module) -> Loss:
        """The student's loss; its samples are left in the batch for the critic."""

        def student_loss(batch: dict[str, Tensor]) -> Tensor:
            cond, x = task.cond(batch), batch["x"]
            raw = self.generate(task, student, batch)
            t, fake = batch["t"], batch["fake"]
            with frozen_parameters(module):
                logits = critic(*self.critic_input(task.schedule, fake, batch), **cond)
            loss = F.softplus(-(logits if self.margin is None else logits.clamp_max(self.margin))).mean()
            if self.strength:
                error = (raw - raw_target(student, batch["z"], t, x).to(raw.dtype)).float().square().flatten(1).mean(1)
                loss = loss + self.strength * error.mean()
            batch["fake"] = fake.detach()
            return loss

        return student_loss

    def critic_loss(self, task: DistillTask, student: Denoiser, critic: CriticFn, penalty: CriticFn) -> Loss:
        """The critic's loss."""

        def critic_loss(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            if "fake" not in batch:
                with torch.no_grad():
                    self.generate(task, student, batch)
            inputs = self.critic_input(task.schedule, batch["x"], batch)
            real = critic(*inputs, **cond)
            fake = critic(*self.critic_input(task.schedule, batch["fake"], batch), **cond)
            loss = margin_loss(real, fake, float("inf") if self.margin is None else self.margin)
            if self.r1:
                loss = loss + self.r1 * penalty(*inputs, **cond)
            return loss

        return critic_loss

    def generate(self, task: DistillTask, student: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """Put `t`, `z` and `fake` (x_hat) into the batch and return the network's output."""
        x, schedule = batch["x"], task.schedule
        if self.times == "nodes":
            nodes = time_nodes(Trailing(), schedule, self.steps)[1:].to(time_device(x))
            t = nodes[torch.randint(0, self.steps, (len(x),), device=nodes.device)]
        else:
            t = schedule.t_max * (1 - torch.rand(len(x), dtype=torch.float64, device=time_device(x)))
        batch["t"], batch["z"] = t, initial_or_noised(schedule, x, t)
        raw, batch["fake"] = predict_raw_and_x0(student, batch["z"], t, **task.cond(batch))
        return raw

    def critic_input(self, schedule: Schedule, x: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The critic's input for x (B, *S), data or x_hat: (y, t') or, of a pair, (y, t', z, t)."""
        z, t = batch["z"], batch["t"]
        s = (t - schedule.t_max / self.steps).clamp_min(0)
        s = torch.where(s < 1e-9, 0.0, s)
        if not self.posterior:
            return noised(schedule, x, s), s
        return posterior_sample(schedule, z, x, t, s), s, z, t


def posterior_sample(schedule: Schedule, z: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """A sample of q(z_s | z_t = z, x0), (B, *S), of the forward process; t, s (B,), s < t.

    `z_s = (a sigma_s^2 / sigma_t^2) z + alpha_s f x0 + sigma_s sqrt(f) e`, a = alpha_t / alpha_s,
    f = 1 - (a sigma_s / sigma_t)^2: a step of `samplers.ddpm` with its small variance, and of DDIM with eta = 1.
    """
    a, ratio = schedule.alpha(t) / schedule.alpha(s), schedule.sigma(s) / schedule.sigma(t).clamp_min(TINY)
    noise_fraction = 1 - (a * ratio) ** 2
    mean = spread(a * ratio**2, z) * z + spread(schedule.alpha(s) * noise_fraction, z) * x0
    return mean + spread(schedule.sigma(s) * noise_fraction.sqrt(), z) * torch.randn_like(z)
