"""The small network of the toy as a teacher that predicts eps on DDPM's table, and its twin that predicts v."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import torch

from hasten.denoiser import Denoiser
from hasten.distillers import DistillTask
from hasten.predictions import spread
from hasten.schedules import Discrete

from ._toy import MEANS, STDS, Draws, Small, Steady

TABLE = Discrete.linear()


@functools.cache
def _fitted(prediction: str, steps: int) -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(Small(), TABLE, prediction)
    optimiser = torch.optim.Adam(denoiser.parameters(), 3e-3)
    for k in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * k / steps))
        label = torch.randint(0, 3, (256,))
        x = MEANS[label] + STDS[label][:, None] * torch.randn(256, 2, dtype=torch.float64)
        t, noise = torch.rand(256, dtype=torch.float64).clamp_min(1e-3), torch.randn_like(x)
        alpha, sigma = TABLE.alpha(t), TABLE.sigma(t)
        z = spread(alpha, x) * x + spread(sigma, x) * noise
        label = torch.where(torch.rand(256) < 0.3, 3, label)
        error = denoiser.raw(z.float(), t, label=label) - denoiser.prediction.target(x, noise, alpha, sigma).float()
        optimiser.zero_grad()
        error.square().mean().backward()
        optimiser.step()
    return denoiser.eval().requires_grad_(False)


def teacher(prediction: str, steps: int = 400) -> Denoiser:
    """The fitted network of DDPM's table that predicts "eps" or "v", a fresh copy."""
    return copy.deepcopy(_fitted(prediction, steps))


def table_task(out: Path, prediction: str, steps: int = 200, **more: Any) -> DistillTask:
    """A task on the mixture with that network as its teacher."""
    base = teacher(prediction)
    return DistillTask(teacher=base, denoiser=base, batches=Draws(256), shape=(2,), out=out, steps=Steady(steps), show=False,
                **more)  # type: ignore[arg-type]  # fmt: skip
