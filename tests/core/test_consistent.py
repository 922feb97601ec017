"""What is known of an image stays known whatever the sampler asks: second moments, some samples, several states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.exact import Gaussian
from hasten.guides import DynamicThreshold
from hasten.samplers import DDIM, SNDPM, AdaptiveSDE, Picard, ProbabilityFlow
from hasten.sampling import Noise, walk
from hasten.schedules import VPCosine
from hasten.starts import CCDF
from hasten.starts.ccdf import Consistent, down
from hasten.times import Trailing

F64, S = torch.float64, (1, 4, 4)
SCHEDULE = VPCosine(offset=0.0)


class Exact(Gaussian):
    """Independent pixels, each image of the batch with the same mean and variance, with its second moments."""

    def __init__(self) -> None:
        super().__init__(torch.linspace(-0.5, 0.5, 16, dtype=F64), torch.linspace(0.05, 0.4, 16, dtype=F64), SCHEDULE)

    def forward(self, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        return super().forward(x_t.flatten(1), t).reshape(x_t.shape)

    def moments(self, x_t: Tensor, t: Any, **cond: Any) -> tuple[Tensor, Tensor]:
        """E[eps^2] = eps^2 + C / q^2, C the posterior variance v q^2 / (v + q^2)."""
        x0, q2 = self(x_t, t), self.schedule.q(t) ** 2
        v = torch.linspace(0.05, 0.4, 16, dtype=F64).reshape(S)
        eps = (x_t - self.schedule.alpha(t) * x0) / self.schedule.sigma(t)
        return x0, eps**2 + v / (v + q2)


def degraded(task: str, B: int) -> Tensor:
    images = torch.linspace(-0.9, 0.9, B * 16).reshape(B, *S)
    if task == "inpainting":
        images[..., 2:] = float("nan")
        return images
    return down(images, 2)


@pytest.mark.parametrize("task", ["inpainting", "super_resolution"])
@pytest.mark.parametrize(
    "sampler",
    [
        DDIM(),
        SNDPM(pixels=0.0),
        SNDPM("ddim"),
        Picard(window=3),
        Picard(),
        AdaptiveSDE(0.1),
        ProbabilityFlow(1e-3, 1e-3),
    ],
    ids=str,
)
def test_every_answer_is_consistent(sampler: Any, task: str) -> None:
    """Samples at their own paces are told apart: with images of different brightness a mix-up would show."""
    B = 3
    start, images = CCDF(time=0.9, factor=2, task=task), degraded(task, 3)
    denoiser = start.wrap(Exact(), images)
    noise = Noise(range(B), S, F64)
    times = Trailing(start=0.9)(SCHEDULE, 8)
    x = start.begin(denoiser, noise, times[0], images)
    made = walk(sampler, denoiser, x, times, noise.rows(slice(None)))
    seen = made[..., :2] if task == "inpainting" else down(made, 2)
    known = images[..., :2] if task == "inpainting" else images
    assert (seen - known).abs().max() < 1e-5
    alone = [
        walk(sampler, start.wrap(Exact(), images[k : k + 1]), x[k : k + 1], times, noise.rows(slice(k, k + 1)))
        for k in range(B)
    ]
    assert (torch.cat(alone) - made).abs().max() < 1e-4


def test_what_is_known_has_no_variance() -> None:
    """So SN-DPM adds no more noise to it than the deterministic rest; elsewhere the inner variance stays."""
    x_t, t = Noise([0], S, F64).initial(), torch.tensor(0.5, dtype=F64)
    inner = Exact()
    C = (inner.moments(x_t, t)[1] - ((x_t - SCHEDULE.alpha(t) * inner(x_t, t)) / SCHEDULE.sigma(t)) ** 2)[0]

    def variance(task: str) -> Tensor:
        x0, second = Consistent(inner, degraded(task, 1), 1 if task == "inpainting" else 2).moments(x_t, t)
        eps = (x_t - SCHEDULE.alpha(t) * x0) / SCHEDULE.sigma(t)
        return (second - eps**2)[0]

    painted = variance("inpainting")
    assert painted[..., :2].abs().max() < 1e-12 and torch.allclose(painted[..., 2:], C[..., 2:])
    # of independent pixels less the mean of their square: Var[x_i - mean] = (1 - 2 / n) C_i + mean(C) / n
    detail = torch.eye(4, dtype=F64) - 0.25
    square = C[0, :2, :2].flatten()
    assert torch.allclose(variance("super_resolution")[0, :2, :2].flatten(), (detail @ square.diag() @ detail.T).diag())


def test_consistency_inside_another_wrapper_is_told_the_samples_too() -> None:
    images = degraded("inpainting", 3)
    start = CCDF(time=0.9, task="inpainting")
    denoiser = DynamicThreshold(1.0, 9.0).wrap(start.wrap(Exact(), images))
    noise, times = Noise(range(3), S, F64), Trailing(start=0.9)(SCHEDULE, 8)
    made = walk(Picard(window=3), denoiser, start.begin(denoiser, noise, times[0], images), times)
    assert (made[..., :2] - images[..., :2]).abs().max() < 1e-5
