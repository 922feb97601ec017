"""Shortcut fine-tuning by policy gradient: the few-step chain itself is made to end in the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput, nearest
from ..nets.critic import plain_critic
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import Trailing
from ._gan import entry
from ._targets import TINY, clock, grid
from ._task import Student, Task

__all__ = ["SFTPG"]

BOUNDS = ("gradient", "spectral")


@dataclass(frozen=True)
class SFTPG:
    """A DDPM chain of `steps` steps as a policy whose reward is that a critic cannot tell its end from data.

    The chain x_S -> ... -> x_0 draws x_{k-1} ~ N(mu(x_k), V_k), the steps of `samplers.ddpm` (the last with standard
    deviation `last`, so that it has a density). With a critic f and a value network V:

        f maximises   mean f(x_0) - mean f(x), its slope bounded                       (made against data)
        V minimises   mean (V(x_k, k) - f(x_0))^2
        the chain     mean [ (f(x_0) - V(x_k, k)) grad log p(x_{k-1} | x_k) ]          descends

    log p is the mean over the pixels, not the sum. No gradient passes the chain. Each step of training makes one fresh
    set of chains with the chain's present weights, which the three share; none is kept, so there is no importance
    ratio to account for. The sampler is "ddpm" on the same nodes.

    steps: S. picks: how many of its S steps each chain trains the policy and the value on, drawn at random (all, where
        S is fewer). last: see above. balance: weigh the term of each move by its standard deviation, which makes the
        noise that each brings to the gradient the same, 1/std without it; the sum is then a direction of descent for
        each move, not the gradient of one objective. bound: of the critic's slope: "gradient", a penalty on slopes
        above 1 between made and real samples, weighed by `penalty`; or "spectral", spectral norm 1 of every layer. lr,
        critic_lr, value_lr: peak rates.

    Paper's code: S = 10, rates 1e-6, 1e-4, 1e-4, five sets of 128 chains for ten updates of the policy with 128 steps
    each, clip 0.1; no bound on the slope for images.
    Cost: steps + 3 picks evaluations a step of training and image.

    Reference: Fan, Lee 2023, arXiv:2301.13362; the penalty: Gulrajani et al. 2017, arXiv:1704.00028.
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
    teacher_steps: ClassVar[int] = 0  # it only lends its weights

    def __post_init__(self) -> None:
        if self.steps < 1 or self.picks < 1:
            raise BadInput(f"sft_pg needs steps and picks of at least 1, found {self.steps} and {self.picks}")
        if not self.last > 0:
            raise BadInput(f"sft_pg needs last > 0, a standard deviation, found {self.last}")
        if self.bound not in BOUNDS:
            raise BadInput(f"sft_pg: unknown bound {self.bound!r}: {nearest(self.bound, BOUNDS)}")

    def distill(self, task: Task) -> Student:
        """Train the stage `policy`."""
        torch.manual_seed(task.seed)  # the critic's first weights
        student, classes = task.student(), task.label_count
        critic = plain_critic(task.shape, classes, spectral=self.bound == "spectral")
        value = plain_critic(task.shape, classes)
        chain, picks = Chain(student, task.schedule, self.steps, self.last), min(self.picks, self.steps)

        def made(batch: dict[str, Tensor]) -> Tensor:
            """The chains of this step, (S + 1, B, *S) from noise to sample."""
            if "chain" not in batch:
                batch["chain"] = chain.run(batch["x"], **task.cond(batch))
            return batch["chain"]

        def reward(batch: dict[str, Tensor]) -> Tensor:
            """f(x_0), (B,): what the policy lowers. The same numbers for the value and the policy."""
            with torch.no_grad():
                return critic(made(batch)[-1], 0.0, **task.cond(batch))[:, 0].float()

        def judged(batch: dict[str, Tensor]) -> Tensor:
            for key in ("chain", "advantage"):  # the critic comes first: a new step, new chains
                batch.pop(key, None)
            cond, x, fake = task.cond(batch), batch["x"], made(batch)[-1]
            loss = critic(x, 0.0, **cond).float().mean() - critic(fake, 0.0, **cond).float().mean()
            if self.bound == "gradient":
                loss = loss + self.penalty * steepness(critic, x, fake, **cond)
            return loss

        def valued(batch: dict[str, Tensor]) -> Tensor:
            f = reward(batch)
            k, states = picked(len(f), self.steps, picks, clock(f)), made(batch)
            rows = torch.arange(len(f), device=f.device).repeat(picks)
            at, cond = states[k, rows], {key: each[rows] for key, each in task.cond(batch).items()}
            batch["k"] = k
            found = value(at, chain.on(at).times[k], **cond)[:, 0].float()
            batch["advantage"] = f[rows] - found.detach()
            return (found - f[rows]).square().mean()

        def acted(batch: dict[str, Tensor]) -> Tensor:
            if "advantage" not in batch:  # asked before the value
                with torch.no_grad():
                    valued(batch)
            k, states = batch["k"], made(batch)
            rows = torch.arange(len(batch["x"]), device=batch["x"].device).repeat(picks)
            cond = {key: each[rows] for key, each in task.cond(batch).items()}
            logp = chain.logp(states[k, rows], states[k + 1, rows], k, **cond)
            share = chain.on(logp).std[k].to(logp) if self.balance else 1.0
            return (share * batch["advantage"] * logp).mean()

        players = [
            task.player("critic", critic, judged, self.critic_lr, betas=(0.5, 0.99)),
            task.player("value", value, valued, self.value_lr),
            task.player("student", student, acted, self.lr, betas=(0.9, 0.999)),
        ]
        trained = task.fit("policy", players)["student"]
        result = Student(trained, "ddpm", "trailing", self.steps)  # type: ignore[arg-type]
        task.keep("policy", result)
        return result


class Chain:
    """The DDPM chain of a student: its moves k = 0 .. S - 1, from times[k] to times[k + 1], as Gaussians.

    times: S + 1, from noise to 0. last: standard deviation of the last move, which DDPM makes without noise.
    """

    def __init__(self, student: Denoiser, schedule: Schedule, steps: int, last: float) -> None:
        self.student, self.schedule = student, schedule
        self.times = grid(Trailing(), schedule, steps).flip(0)
        r, s = self.times[:-1], self.times[1:]
        a, ratio = schedule.alpha(r) / schedule.alpha(s), schedule.sigma(s) / schedule.sigma(r).clamp_min(TINY)
        fresh = 1 - (a * ratio) ** 2
        self.keep, self.gain = a * ratio**2, schedule.alpha(s) * fresh
        self.std = schedule.sigma(s) * fresh.sqrt()
        self.std[-1] = last

    def on(self, x: Tensor) -> Chain:
        """The chain with its numbers where the times of a batch x are drawn."""
        if self.times.device != clock(x):
            for name in ("times", "keep", "gain", "std"):
                setattr(self, name, getattr(self, name).to(clock(x)))
        return self

    def mean(self, z: Tensor, k: Tensor, **cond: Any) -> Tensor:
        """Of x_{k+1} given x_k = z (B, *S); k (B,)."""
        self.on(z).student.eval()  # no dropout: the density must be that of the chain that was drawn
        return spread(self.keep[k], z) * z + spread(self.gain[k], z) * self.student(z, self.times[k], **cond)

    @torch.no_grad()
    def run(self, like: Tensor, **cond: Any) -> Tensor:
        """Chains from noise, (S + 1, B, *S); `like` (B, *S) says how many and of what shape."""
        n = len(like)
        states = [entry(self.schedule, like, self.on(like).times[:1].expand(n))]
        for move in range(len(self.std)):
            k = torch.full((n,), move, device=clock(like))
            mean = self.mean(states[-1], k, **cond)
            states.append(mean + spread(self.std[k], mean) * torch.randn_like(mean))
        return torch.stack(states)

    def logp(self, z: Tensor, after: Tensor, k: Tensor, **cond: Any) -> Tensor:
        """The log-density of `after` (B, *S) given z at the moves k (B,), a mean over the pixels, (B,)."""
        std = self.on(z).std[k]
        off = (after - self.mean(z, k, **cond)).float() / spread(std, z)
        return -0.5 * off.square().flatten(1).mean(1) - (std.log() + 0.5 * math.log(2 * math.pi)).to(off)


def picked(n: int, steps: int, picks: int, device: torch.device | str = "cpu") -> Tensor:
    """`picks` different moves for each of n chains, int64 (picks n,): the first of each chain, then the second, ..."""
    return torch.rand(n, steps, device=device).argsort(1)[:, :picks].T.flatten()


def steepness(critic: nn.Module, real: Tensor, fake: Tensor, **cond: Any) -> Tensor:
    """`mean max(0, |grad f| - 1)^2` at points between the real and the made samples."""
    share = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device).to(real)
    between = (share * real + (1 - share) * fake).requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(between, 0.0, **cond).float().sum(), between, create_graph=True)
    return (gradient.float().flatten(1).norm(dim=1) - 1).clamp_min(0).square().mean()
