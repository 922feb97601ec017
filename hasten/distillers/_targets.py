"""What a student that jumps far has to say so that it lands where small steps of its teacher land.

A step of DDIM from t to s with the prediction x0 is `z_s = alpha_s x0 + (sigma_s / sigma_t) (z_t - alpha_t x0)`. After
several steps with predictions x_1, x_2, ... the one prediction that reaches the same point in a single step is their
mean, weighted by how much each step gains in signal to noise k = alpha / sigma:

    x* = sum_i (k_{i+1} - k_i) x_i / (k_end - k_start),   likewise   e* = sum_i (q_{i+1} - q_i) e_i / (q_end - q_start)

with q = sigma / alpha for the noise. No difference of nearly equal images is ever taken, so float32 does for any
number of steps, at both ends and in both directions. With z = alpha x* + sigma e* either one gives the other, except
that at sigma = 0 only e* says anything, and at alpha = 0 only x*.

Reference: Salimans, Ho 2022, arXiv:2202.00512, appendix G, for the target; the weighted mean is an identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import BadInput, nearest
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import TimeGrid

TINY = 1e-6  # the smallest alpha or sigma that is divided by
WEIGHTS = ("auto", "snr+1", "truncated", "snr", "x0", "raw")


def grid(law: TimeGrid, schedule: Schedule, steps: int) -> Tensor:
    """The times of `steps` steps in increasing order, float64 (steps + 1,): node i of a path that ends clean at 0."""
    return law(schedule, steps).flip(0)


def clock(x: Tensor) -> torch.device:
    """Where the times of a batch x are drawn: on its device, so that none of their coefficients waits for a copy.

    MPS has no float64: there they stay on the CPU.
    """
    return torch.device("cpu") if x.device.type == "mps" else x.device


class Nodes:
    """Times (N,) that are moved to a device once: `nodes.at(x)` where those of the batch x are drawn."""

    def __init__(self, times: Tensor) -> None:
        self.times = times
        self._moved: dict[torch.device, Tensor] = {}

    def at(self, x: Tensor) -> Tensor:
        """The times, float64 (N,), on the device `clock(x)`."""
        device = clock(x)
        if device not in self._moved:
            self._moved[device] = self.times.to(device)
        return self._moved[device]


def noised(schedule: Schedule, x: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
    """`alpha_t x + sigma_t noise` (B, *S) at the times t (B,); the noise is drawn where it is not given."""
    noise = torch.randn_like(x) if noise is None else noise
    return spread(schedule.alpha(t), x) * x + spread(schedule.sigma(t), x) * noise


def step(schedule: Schedule, z: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM from t to s, both (B,), with the prediction `x0` (B, *S) at z."""
    ratio = schedule.sigma(s) / schedule.sigma(t).clamp_min(TINY)
    return spread(ratio, z) * z + spread(schedule.alpha(s) - ratio * schedule.alpha(t), z) * x0


def path(
    denoiser: Callable[..., Tensor], schedule: Schedule, z: Tensor, times: Sequence[Tensor], **cond: Any
) -> tuple[Tensor, Tensor]:
    """Where DDIM steps along `times`, each (B,), take z (B, *S), and the x* of the jump there: `(z_end, x*)`.

    times: falling. The mean is taken with the weights above times sigma_end, which are finite at the clean end.
    """
    end, total = times[-1], schedule.alpha(times[-1]) - schedule.sigma(times[-1]) * signal(schedule, times[0])
    target = torch.zeros_like(z)
    for t, s in zip(times, times[1:], strict=False):
        x0 = denoiser(z, t, **cond)
        upper = schedule.alpha(end) if s is end else schedule.sigma(end) * signal(schedule, s)
        gain = (upper - schedule.sigma(end) * signal(schedule, t)) / total
        target = target + spread(gain, z) * x0
        z = step(schedule, z, x0, t, s)
    return z, target


def finer_path(
    denoiser: Callable[..., Tensor], schedule: Schedule, z: Tensor, times: Sequence[Tensor], **cond: Any
) -> tuple[Tensor, Tensor]:
    """As `path`, by steps of second order: two evaluations each, the second in the middle of the step.

    From t to s over their mean m, with x_m and e_m = (z_m - alpha_m x_m) / sigma_m at the state that DDIM reaches at m:
    `z_s = alpha_s x_m + (sigma_s / sigma_t) (z_t - alpha_t x_m)` where q_t q_s > 1, and
    `z_s = (alpha_s / alpha_t) z_t + (sigma_s - alpha_s sigma_t / alpha_t) e_m` nearer to the clean end, so that neither
    end divides by what is small. The jump's x* is found by `landing`: for jumps that are not tiny.
    """
    start = z
    for t, s in zip(times, times[1:], strict=False):
        m = 0.5 * (t + s)
        z_m = step(schedule, z, denoiser(z, t, **cond), t, m)
        x_m = denoiser(z_m, m, **cond)
        by_x = step(schedule, z, x_m, t, s)
        alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        e_m = (z_m - spread(schedule.alpha(m), z) * x_m) / spread(schedule.sigma(m).clamp_min(TINY), z)
        scale = alpha_s / alpha_t.clamp_min(TINY)
        by_e = spread(scale, z) * z + spread(sigma_s - scale * sigma_t, z) * e_m
        z = torch.where(spread(sigma_t * sigma_s > alpha_t * alpha_s, z).bool(), by_x, by_e)
    return z, landing(schedule, start, z, times[0], times[-1])


def signal(schedule: Schedule, t: Tensor) -> Tensor:
    """`alpha / sigma`, with sigma kept from zero."""
    return schedule.alpha(t) / schedule.sigma(t).clamp_min(TINY)


def landing(schedule: Schedule, z: Tensor, end: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x* whose one DDIM step takes z at t to `end` at s: by subtraction, for ends that no weighted mean gives.

    Two nearly equal images are subtracted where t and s are close: compute in float64 there.
    """
    ratio = schedule.sigma(s) / schedule.sigma(t).clamp_min(TINY)
    return (end - spread(ratio, z) * z) / spread(schedule.alpha(s) - ratio * schedule.alpha(t), z)


def raw_target(student: Denoiser, z: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """What the student's network has to say at z, t (B,), t > 0, to mean `x0`."""
    alpha, sigma = student.schedule.alpha(t), student.schedule.sigma(t).clamp_min(TINY)
    eps = (z - spread(alpha, z) * x0) / spread(sigma, z)
    return student.prediction.target(x0, eps, alpha, sigma)


def loss(student: Denoiser, z: Tensor, t: Tensor, x0: Tensor, weight: str = "auto", **cond: Any) -> Tensor:
    """The weighted squared distance of the student's prediction at z, t (B,) from `x0`, a scalar.

    weight, on |x0_student - x0|^2, k = alpha / sigma: "snr+1" 1 + k^2, which for a v network is the plain error of
    what it says; "truncated" max(1, k^2); "snr" k^2; "x0" 1; "raw" whatever makes it the plain error of what the
    network says; "auto" "raw" for a network that predicts eps and "snr+1" for every other. (On the error of eps,
    "snr+1" is 1 / alpha^2: on DDPM's table 25,000 at t = 1, beside which no other time counts.) Applied to the error of
    what the network says, so that no time divides by a small number.
    """
    raw = student.raw(z, t, **cond)
    error = (raw - raw_target(student, z, t, x0).to(raw.dtype)).float().square().flatten(1).mean(1)
    return (factor(student, t, weight).to(error.device, torch.float32) * error).mean()


def factor(student: Denoiser, t: Tensor, weight: str) -> Tensor:
    """What multiplies the squared error of the network's output at t (B,), float64 (B,), to have this `weight`."""
    weight = weight_for(student, weight)
    alpha, sigma = student.schedule.alpha(t), student.schedule.sigma(t).clamp_min(TINY)
    _, _, c_out = student.prediction.coefficients(alpha, sigma)
    snr = (alpha / sigma) ** 2
    if weight == "raw":
        return torch.ones_like(snr)
    known = {"snr+1": 1 + snr, "truncated": snr.clamp_min(1), "snr": snr, "x0": torch.ones_like(snr)}
    if weight not in known:
        raise BadInput(f"unknown weight {weight!r}: {nearest(weight, WEIGHTS)}")
    return known[weight] * c_out**2


def weight_for(student: Denoiser, weight: str, otherwise: str = "snr+1") -> str:
    """The weight that "auto" stands for: "raw" for an eps network, `otherwise` for every other; others as they are."""
    if weight != "auto":
        return weight
    return "raw" if student.prediction.name == "eps" else otherwise
