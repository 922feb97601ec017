"""Diffusion GANs: a diffusion network made to jump by a critic that sees noised samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..denoiser import Denoiser
from ..errors import BadInput, nearest
from ..nets.critic import zeroed
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import Trailing
from ._gan import critic_of, entry, margin, predict, slope, still
from ._targets import TINY, clock, grid, noised, raw_target
from ._task import Student, Task

__all__ = ["DiffusionGAN"]

Judge = Callable[..., Tensor]
CRITICS = ("net", "heads")
TIMES = ("nodes", "all")


@dataclass(frozen=True)
class DiffusionGAN:
    """A student whose samples, noised to the next time, a critic takes for data noised to that time.

    From z_t = alpha_t x + sigma_t eps, with x_hat = student(z_t, t) and t' = max(t - 1/steps, 0):

        fake y' = alpha_t' x_hat + sigma_t' e1,      real y = alpha_t' x + sigma_t' e2
        L_student = softplus(-min(D(y', t'), m)) + strength w(t) |x - x_hat|^2 / d
        L_critic  = softplus(-min(D(y, t'), m)) + softplus(max(D(y', t'), -m))         m: the margin

    The fake comes from x_hat alone with fresh noise, and not from z_t, which is what makes one step enough; the second
    term keeps x_hat tied to z_t. The sampler is "consistency" with 1, 2 or `steps` steps: what divides `steps`.

    posterior: the hybrid of the denoising diffusion GAN: real and fake are drawn at t' from the Gaussian posterior
        q(z_t' | z_t, x) and q(z_t' | z_t, x_hat), and the critic, always feature heads here, judges the pair
        (z_t', z_t). The sampler is then "ddpm" on the same `steps` nodes, whose steps are that posterior; the only
        chance in x_hat is that of z_t (the paper's generator has a latent variable beside it).

    steps: K, coarse steps. times: those of training: "nodes" 1, 1 - 1/K, .. 1/K, or "all" in (0, 1]. critic: "net", a
        second copy of the network whose last layer starts at zero, its output the map of logits; or "heads" on the
        frozen network's features (`nets.critic`). margin: None for none. strength: of the reconstruction. r1: weight of
        the squared slope of the heads in their input, at real samples. lr, critic_lr: peak rates. every: the critic
        learns on the steps that this divides.

    Paper's code: K = 4, t among all, critic "net", Adam 1e-4 for both, critic every 2nd step, batch 512.
    Cost: about 8 evaluations a step of training and image with the critic "net".

    Reference: Xu, Zhao, Xiao, Hou 2023, arXiv:2311.09257; used for one step by Zhao et al. 2023, arXiv:2311.16567;
    the posterior: Xiao, Kreis, Vahdat 2021, arXiv:2112.07804.
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
    needs_data: ClassVar[bool] = True
    teacher_steps: ClassVar[int] = 0  # it only lends its weights

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"diffusion_gan needs steps of at least 1, found {self.steps}")
        for name, choices in (("critic", CRITICS), ("times", TIMES)):
            if getattr(self, name) not in choices:
                asked = getattr(self, name)
                raise BadInput(f"diffusion_gan: unknown {name} {asked!r}: {nearest(asked, choices)}")
        if self.r1 and self.critic == "net" and not self.posterior:
            raise BadInput(f"diffusion_gan: r1={self.r1:g} is the slope at the heads' input: use critic=heads, or r1=0")

    def distill(self, task: Task) -> Student:
        """Train the stage `gan`."""
        torch.manual_seed(task.seed)  # the critic's first weights
        student = task.student()
        critic, module, steep = self.judge(task)
        critic_lesson = self.trial(task, student, critic, steep)
        players = [
            task.player("student", student, self.lesson(task, student, critic, module), self.lr, betas=(0.9, 0.999)),
            task.player("critic", module, critic_lesson, self.critic_lr, self.every, betas=(0.0, 0.999)),
        ]
        trained = task.fit("gan", players)["student"]
        made = Student(trained, "ddpm" if self.posterior else "consistency", "trailing", self.steps)  # type: ignore[arg-type]
        task.keep("gan", made)
        return made

    def judge(self, task: Task) -> tuple[Judge, nn.Module, Judge]:
        """The critic, the part of it that learns, and its squared slope, asked as the critic is."""
        if self.posterior or self.critic == "heads":
            heads = critic_of(task, pair=self.posterior)
            features = heads.pair_features if self.posterior else heads.features

            def steep(*seen: Tensor, **cond: Any) -> Tensor:
                with torch.no_grad():
                    found = features(*seen, **cond)
                return slope(lambda maps: heads.judge(maps, seen[-1], **cond), found)

            return (heads.pair if self.posterior else heads), heads.heads, steep
        copied = task.student(task.denoiser)
        try:
            zeroed(copied.net)
        except ValueError as e:
            raise BadInput(f"diffusion_gan: {e}: critic=heads") from e

        def judge(y: Tensor, s: Tensor, **cond: Any) -> Tensor:
            return copied.raw(y, s, **cond).flatten(1).float()

        return judge, copied, judge  # whose slope __post_init__ rules out

    def lesson(self, task: Task, student: Denoiser, critic: Judge, module: nn.Module) -> Any:
        """The student's loss; what it made is left in the batch for the critic."""

        def lesson(batch: dict[str, Tensor]) -> Tensor:
            cond, x = task.cond(batch), batch["x"]
            raw = self.make(task, student, batch)
            t, fake = batch["t"], batch["fake"]
            with still(module):
                judged = critic(*self.shown(task.schedule, fake, batch), **cond)
            loss = F.softplus(-(judged if self.margin is None else judged.clamp_max(self.margin))).mean()
            if self.strength:
                error = (raw - raw_target(student, batch["z"], t, x).to(raw.dtype)).float().square().flatten(1).mean(1)
                loss = loss + self.strength * error.mean()
            batch["fake"] = fake.detach()
            return loss

        return lesson

    def trial(self, task: Task, student: Denoiser, critic: Judge, steep: Judge) -> Any:
        """The critic's loss."""

        def trial(batch: dict[str, Tensor]) -> Tensor:
            cond = task.cond(batch)
            if "fake" not in batch:
                with torch.no_grad():
                    self.make(task, student, batch)
            seen = self.shown(task.schedule, batch["x"], batch)
            real = critic(*seen, **cond)
            fake = critic(*self.shown(task.schedule, batch["fake"], batch), **cond)
            loss = margin(real, fake, float("inf") if self.margin is None else self.margin)
            if self.r1:
                loss = loss + self.r1 * steep(*seen, **cond)
            return loss

        return trial

    def make(self, task: Task, student: Denoiser, batch: dict[str, Tensor]) -> Tensor:
        """Puts `t`, `z` and `fake` (x_hat) in the batch; what the network said."""
        x, schedule = batch["x"], task.schedule
        if self.times == "nodes":
            nodes = grid(Trailing(), schedule, self.steps)[1:].to(clock(x))
            t = nodes[torch.randint(0, self.steps, (len(x),), device=nodes.device)]
        else:
            t = schedule.t_max * (1 - torch.rand(len(x), dtype=torch.float64, device=clock(x)))
        batch["t"], batch["z"] = t, entry(schedule, x, t)
        raw, batch["fake"] = predict(student, batch["z"], t, **task.cond(batch))
        return raw

    def shown(self, schedule: Schedule, x: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What the critic is asked about x (B, *S), data or x_hat: (y, t') or the pair's (y, t', z, t)."""
        z, t = batch["z"], batch["t"]
        s = (t - schedule.t_max / self.steps).clamp_min(0)
        s = torch.where(s < 1e-9, 0.0, s)
        if not self.posterior:
            return noised(schedule, x, s), s
        return posterior(schedule, z, x, t, s), s, z, t


def posterior(schedule: Schedule, z: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """A draw of q(z_s | z_t = z, x0), (B, *S), of the forward process; t, s (B,), s < t.

    `z_s = (a sigma_s^2 / sigma_t^2) z + alpha_s f x0 + sigma_s sqrt(f) e`, a = alpha_t / alpha_s,
    f = 1 - (a sigma_s / sigma_t)^2: a step of `samplers.ddpm` with its small variance, and of DDIM with eta = 1.
    """
    a, ratio = schedule.alpha(t) / schedule.alpha(s), schedule.sigma(s) / schedule.sigma(t).clamp_min(TINY)
    fresh = 1 - (a * ratio) ** 2
    mean = spread(a * ratio**2, z) * z + spread(schedule.alpha(s) * fresh, z) * x0
    return mean + spread(schedule.sigma(s) * fresh.sqrt(), z) * torch.randn_like(z)
