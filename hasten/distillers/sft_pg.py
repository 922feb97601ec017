"""Shortcut fine-tuning by policy gradient: the few-step chain itself is trained to end in the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, check_choice
from ..nets.critic import plain_critic, text_width
from ..nets.joint import JointCritic, with_source_shape
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import Trailing
from ._gan import initial_or_noised
from ._targets import TINY, time_device, time_nodes
from ._task import Distiller, DistillTask, Student

__all__ = ["SFTPG"]

BOUNDS = ("gradient", "spectral")


@dataclass(frozen=True)
class SFTPG(Distiller):
    """A DDPM chain of `steps` steps as a policy whose reward is that a critic cannot tell its samples from data.

    The chain x_S -> ... -> x_0 samples x_{k-1} ~ N(mu(x_k), V_k), the steps of `samplers.ddpm` (the last with standard
    deviation `last`, so that it has a density). With a critic f and a value network V:

        f maximises   mean f(x_0) - mean f(x), its gradient bounded                    (generated against data)
        V minimises   mean (V(x_k, k) - f(x_0))^2
        the chain     mean [ (f(x_0) - V(x_k, k)) grad log p(x_{k-1} | x_k) ]          descends

    log p is the mean over the pixels, not the sum. No gradient passes through the chain. Each training step samples one
    new set of chains with the present weights, which the three losses share; none is reused, so there is no importance
    ratio. The sampler is "ddpm" on the same nodes.

    Paper's code: S = 10, rates 1e-6, 1e-4, 1e-4, five sets of 128 chains for ten updates of the policy with 128 steps
    each, clip 0.1; no bound on the gradient for images.
    Cost: steps + 3 picks model evaluations a training step and image.

    Args:
        steps: S.
        picks: random steps of each chain that train the policy and the value, out of its S (all, where S is smaller).
        last: standard deviation of the last step.
        balance: weight the term of each step by its standard deviation, which equalises the noise of the gradient,
            1/std without it; the sum is then a descent direction for each step, not the gradient of one objective.
        bound: of the critic's gradient: `"gradient"`, a penalty on norms above 1 between generated and real samples; or
            `"spectral"`, spectral norm 1 of every layer.
        penalty: weight of the gradient penalty.
        lr, critic_lr, value_lr: peak learning rates.

    Raises:
        BadInput: for steps or picks below 1, an unknown bound, and `last` not above 0.

    References:
        Fan, Lee 2023, arXiv:2301.13362.
        Gulrajani et al. 2017, arXiv:1704.00028, for the penalty.
    """

    steps: int = 10
    picks: int = 2
    last: float = 1e-3
    balance: bool = False
    bound: str = "gradient"
    penalty: float = 10.0
    lr: float = 1e-6
    critic_lr: float = 1e-4
    value_lr: float = 1e-4
    needs_data: ClassVar[bool] = True
    teacher_steps: ClassVar[int] = 0  # it only provides initial weights

    def __post_init__(self) -> None:
        if self.steps < 1 or self.picks < 1:
            raise BadInput(f"sft_pg needs steps and picks of at least 1, found {self.steps} and {self.picks}")
        if not self.last > 0:
            raise BadInput(f"sft_pg needs last > 0, a standard deviation, found {self.last}")
        check_choice("bound of sft_pg", self.bound, BOUNDS)

    def distill(self, task: DistillTask) -> Student:
        """Train the stage `policy`."""
        torch.manual_seed(task.seed)  # the critic's first weights
        student, classes, text = task.student(), task.label_count, text_width(task.one_cond())
        shape = with_source_shape(task.shape, task.one_cond())
        critic = JointCritic(plain_critic(shape, classes, spectral=self.bound == "spectral", text=text))
        value = JointCritic(plain_critic(shape, classes, text=text))
        chain, picks = DDPMChain(student, task.schedule, self.steps, self.last), min(self.picks, self.steps)

        def chains(batch: dict[str, Tensor]) -> Tensor:
            """The chains of this step, (S + 1, B, *S) from noise to sample."""
            if "chain" not in batch:
                batch["chain"] = chain.run(batch["x"], **task.cond(batch))
            return batch["chain"]

        def reward(batch: dict[str, Tensor]) -> Tensor:
            """f(x_0), (B,): what the policy lowers. The same numbers for the value and the policy."""
            with torch.no_grad():
                return critic(chains(batch)[-1], 0.0, **task.cond(batch))[:, 0].float()

        def critic_loss(batch: dict[str, Tensor]) -> Tensor:
            for key in ("chain", "advantage"):  # the critic comes first in a step: new chains
                batch.pop(key, None)
            cond, x, fake = task.cond(batch), batch["x"], chains(batch)[-1]
            loss = critic(x, 0.0, **cond).float().mean() - critic(fake, 0.0, **cond).float().mean()
            if self.bound == "gradient":
                loss = loss + self.penalty * gradient_penalty(critic, x, fake, **cond)
            return loss

        def value_loss(batch: dict[str, Tensor]) -> Tensor:
            f = reward(batch)
            k, states = random_moves(len(f), self.steps, picks, time_device(f)), chains(batch)
            rows = torch.arange(len(f), device=f.device).repeat(picks)
            at, cond = states[k, rows], {key: each[rows] for key, each in task.cond(batch).items()}
            batch["k"] = k
            prediction = value(at, chain.on(at).times[k], **cond)[:, 0].float()
            batch["advantage"] = f[rows] - prediction.detach()
            return (prediction - f[rows]).square().mean()

        def policy_loss(batch: dict[str, Tensor]) -> Tensor:
            if "advantage" not in batch:  # before the value network of this step
                with torch.no_grad():
                    value_loss(batch)
            k, states = batch["k"], chains(batch)
            rows = torch.arange(len(batch["x"]), device=batch["x"].device).repeat(picks)
            cond = {key: each[rows] for key, each in task.cond(batch).items()}
            logp = chain.logp(states[k, rows], states[k + 1, rows], k, **cond)
            scale = chain.on(logp).std[k].to(logp) if self.balance else 1.0
            return (scale * batch["advantage"] * logp).mean()

        modules = [
            task.trained_module("critic", critic, critic_loss, self.critic_lr, betas=(0.5, 0.99)),
            task.trained_module("value", value, value_loss, self.value_lr),
            task.trained_module("student", student, policy_loss, self.lr, betas=(0.9, 0.999)),
        ]
        trained: Any = task.fit("policy", modules)["student"]
        result = Student(trained, "ddpm", "trailing", self.steps)
        task.save_student("policy", result)
        return result


class DDPMChain:
    """The DDPM chain of a student: its steps k = 0 .. S - 1, from times[k] to times[k + 1], as Gaussians.

    Args:
        student: in training.
        schedule: of the noise.
        steps: S.
        last: standard deviation of the last step, which DDPM takes without noise.
    """

    def __init__(self, student: Denoiser, schedule: Schedule, steps: int, last: float) -> None:
        self.student, self.schedule = student, schedule
        self.times = time_nodes(Trailing(), schedule, steps).flip(0)
        r, s = self.times[:-1], self.times[1:]
        a, ratio = schedule.alpha(r) / schedule.alpha(s), schedule.sigma(s) / schedule.sigma(r).clamp_min(TINY)
        noise_fraction = 1 - (a * ratio) ** 2
        self.z_scale, self.x0_scale = a * ratio**2, schedule.alpha(s) * noise_fraction
        self.std = schedule.sigma(s) * noise_fraction.sqrt()
        self.std[-1] = last

    def on(self, x: Tensor) -> DDPMChain:
        """The chain with its coefficients on the device for the times of a batch x."""
        if self.times.device != time_device(x):
            for name in ("times", "z_scale", "x0_scale", "std"):
                setattr(self, name, getattr(self, name).to(time_device(x)))
        return self

    def mean(self, z: Tensor, k: Tensor, **cond: Any) -> Tensor:
        """The mean of x_{k+1} given x_k = z (B, *S); k (B,)."""
        self.on(z).student.eval()  # no dropout: the density must be that of the sampled chain
        return spread(self.z_scale[k], z) * z + spread(self.x0_scale[k], z) * self.student(z, self.times[k], **cond)

    @torch.no_grad()
    def run(self, like: Tensor, **cond: Any) -> Tensor:
        """Chains from noise, (S + 1, B, *S); `like` (B, *S) gives their number and shape."""
        n = len(like)
        states = [initial_or_noised(self.schedule, like, self.on(like).times[:1].expand(n))]
        for move in range(len(self.std)):
            k = torch.full((n,), move, device=time_device(like))
            mean = self.mean(states[-1], k, **cond)
            states.append(mean + spread(self.std[k], mean) * torch.randn_like(mean))
        return torch.stack(states)

    def logp(self, z: Tensor, after: Tensor, k: Tensor, **cond: Any) -> Tensor:
        """The log-density of `after` (B, *S) given z at the steps k (B,), a mean over the pixels, (B,)."""
        std = self.on(z).std[k]
        error = (after - self.mean(z, k, **cond)).float() / spread(std, z)
        return -0.5 * error.square().flatten(1).mean(1) - (std.log() + 0.5 * math.log(2 * math.pi)).to(error)


def random_moves(n: int, steps: int, picks: int, device: torch.device | str = "cpu") -> Tensor:
    """`picks` different steps for each of n chains, int64 (picks n,): the first of each chain, then the second, ..."""
    return torch.rand(n, steps, device=device).argsort(1)[:, :picks].T.flatten()


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, **cond: Any) -> Tensor:
    """`mean max(0, |grad f| - 1)^2` at random points between the real and the generated samples."""
    fraction = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device).to(real)
    between = (fraction * real + (1 - fraction) * fake).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(between, 0.0, **cond).float().sum(), between, create_graph=True)
    return (gradient.float().flatten(1).norm(dim=1) - 1).clamp_min(0).square().mean()
