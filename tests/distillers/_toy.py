"""The 2-D mixture of three classes, exactly and as a small network, and what the tests of the distillers measure."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask, Student
from hasten.exact import GaussianMixture
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.predictions import V, spread
from hasten.sampling import Noise
from hasten.schedules import VPCosine
from hasten.train.data import Batches
from hasten.train.fit import Ema

MEANS = torch.tensor([[1.0, 0.3], [-0.8, 0.9], [-0.2, -1.1]], dtype=torch.float64)
STDS = torch.tensor([0.25, 0.35, 0.2], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


class Exact(GaussianMixture):
    """A mixture with `raw`, the output of a v network: finite at both ends."""

    prediction = V()

    def raw(self, x_t: Tensor, t: Tensor | float, label: Tensor | None = None, **cond: Any) -> Tensor:
        alpha, sigma = (spread(f(t), x_t) for f in (self.schedule.alpha, self.schedule.sigma))
        x0 = self(x_t, t, label)
        inside = sigma > 1e-9
        eps = (x_t - alpha * x0) / torch.where(inside, sigma, torch.ones_like(sigma))
        return torch.where(inside, alpha * eps, torch.zeros_like(x0)) - sigma * x0


def mixture() -> Exact:
    """The exact denoiser: float64, classes 0, 1, 2 (its three components) and the null label 3."""
    return Exact(WEIGHTS, MEANS, STDS[:, None].square().expand(3, 2), VPCosine(offset=0.0), labels=[0, 1, 2])


class Small(nn.Module):
    """`net(x (B, 2), time (B,), label=None, guidance=None)`, a perceptron with features of the time."""

    null_label = 3

    def __init__(
        self, width: int = 96, guidance: tuple[float, float] | None = None, steps: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.config = {"width": width, "guidance": guidance, "steps": steps}
        self.step_counts = steps
        self.steps = nn.Embedding(max(steps) + 1, width) if steps else None
        self.guidance_range = guidance
        self.label = nn.Embedding(4, width)
        self.into = nn.Linear(2 + 8, width)
        self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.out = nn.Linear(width, 2)
        self.guidance = nn.Linear(5, width) if guidance else None
        if self.guidance is not None:
            nn.init.zeros_(self.guidance.weight)
            nn.init.zeros_(self.guidance.bias)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        label: Tensor | None = None,
        guidance: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        phase = time[:, None] * math.pi / 2 * torch.arange(1, 5, dtype=x.dtype)
        h = self.into(torch.cat([x, phase.cos(), phase.sin()], 1).to(self.into.weight.dtype))
        h = h + self.label(torch.full_like(time, 3, dtype=torch.long) if label is None else label)
        if self.guidance is not None:
            assert guidance is not None and self.guidance_range is not None, "the network needs guidance="
            low, high = self.guidance_range
            u = ((guidance - low) / (high - low))[:, None].to(h.dtype)
            h = h + self.guidance(
                torch.cat([u, *(f(math.pi * k * u) for k in (1, 2) for f in (torch.sin, torch.cos))], 1)
            )
        if self.steps is not None:
            assert steps is not None, "the network needs steps="
            h = h + self.steps(steps)
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.out(nn.functional.silu(h))


@functools.cache
def _fitted() -> Denoiser:
    """The network fitted to the exact denoiser, with and without the class."""
    torch.manual_seed(0)
    exact, net = mixture(), Small()
    denoiser = Denoiser(net, VPCosine(offset=0.0), V())
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    steps = 800
    for k in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * k / steps))
        label = torch.randint(0, 3, (256,))
        x = MEANS[label] + STDS[label][:, None] * torch.randn(256, 2, dtype=torch.float64)
        t = torch.rand(256, dtype=torch.float64)
        z = spread(exact.schedule.alpha(t), x) * x + spread(exact.schedule.sigma(t), x) * torch.randn_like(x)
        label = torch.where(torch.rand(256) < 0.3, 3, label)
        error = denoiser.raw(z.float(), t, label=label) - exact.raw(z, t, label).float()
        optimiser.zero_grad()
        error.square().mean().backward()
        optimiser.step()
    return denoiser.eval().requires_grad_(False)


def toy() -> Denoiser:
    """The fitted small network, a fresh copy: a teacher with weights, of float32."""
    import copy

    return copy.deepcopy(_fitted())


class Draws:
    """Batches of the mixture without end: `batches[k]` is `{"x": (B, 2) float32, "label": (B,)}`."""

    def __init__(self, batch_size: int = 256, seed: int = 0) -> None:
        self.batch_size, self.seed = batch_size, seed

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        label = torch.multinomial(WEIGHTS, self.batch_size, replacement=True, generator=g)
        noise = torch.randn(self.batch_size, 2, generator=g, dtype=torch.float64)
        return {"x": (MEANS[label] + STDS[label][:, None] * noise).float(), "label": label}


class Steady(dict):
    """As many steps for every stage."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __missing__(self, key: str) -> int:
        return self.steps


def task(
    out: Path, steps: int | dict[str, int] = 300, teacher: nn.Module | None = None, batch_size: int = 256, **more: Any
) -> DistillTask:
    """A task on the mixture: students are copies of the small network; the teacher is it, too, or `teacher`."""
    base = toy()
    batches: Batches = Draws(batch_size)  # type: ignore[assignment]
    by_stage = Steady(steps) if isinstance(steps, int) else steps
    return DistillTask(teacher=teacher or base, denoiser=base, batches=batches, shape=(2,), out=out, steps=by_stage,
                show=False, **more)  # fmt: skip


def sample(student: Student, n: int = 2000, seed: int = 0, steps: int | None = None, **cond: Any) -> Tensor:
    """(n, 2) from the student as a user would get them, labels in the mixture's proportions by default."""
    if "label" not in cond:
        cond["label"] = proportional(n)
    sampler = pick("samplers", student.sampler)
    times = pick("times", student.times)(student.denoiser.schedule, steps or student.steps)
    noise = Noise(range(seed, seed + n), (2,))
    return draw(student.denoiser, sampler, times, noise, **cond)


def proportional(n: int) -> Tensor:
    """Labels (n,) in the mixture's proportions."""
    return torch.searchsorted(
        WEIGHTS.cumsum(0), torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ).clamp_max(2)


def energy(a: Tensor, b: Tensor) -> float:
    """`2 E|a - b| - E|a - a'| - E|b - b'|`, unbiased; about 0 +- .002 for 2,000 samples of the same distribution."""
    a, b = a.double(), b.double()
    own = (torch.cdist(c, c).sum() / (len(c) * (len(c) - 1)) for c in (a, b))
    return (2 * torch.cdist(a, b).mean() - sum(own)).item()


def truth(n: int = 4000) -> Tensor:
    """Samples of the mixture."""
    return mixture().sample(n, torch.Generator().manual_seed(9))


__all__ = ["Ema", "Exact", "Small", "energy", "mixture", "proportional", "sample", "task", "toy", "truth"]
