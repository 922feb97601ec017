"""The target of a student that takes large steps, so that it lands where small steps of its teacher land.

A step of DDIM from t to s with the prediction x0 is `z_s = alpha_s x0 + (sigma_s / sigma_t) (z_t - alpha_t x0)`. After
several steps with predictions x_1, x_2, ... the one prediction that reaches the same point in a single step is their
mean, weighted by the increase of k = alpha / sigma in each step:

    x* = sum_i (k_{i+1} - k_i) x_i / (k_end - k_start),   likewise   e* = sum_i (q_{i+1} - q_i) e_i / (q_end - q_start)

with q = sigma / alpha for the noise. No difference of nearly equal images is ever taken, so float32 suffices for any
number of steps, at both ends and in both directions. With z = alpha x* + sigma e* either one gives the other, except
that at sigma = 0 only e* is informative, and at alpha = 0 only x*.

References:
    Salimans, Ho 2022, arXiv:2202.00512, appendix G, for the target; the weighted mean is an identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import check_choice
from ..predictions import spread
from ..schedules.base import Schedule
from ..times import TimeGrid
from ..utils.devices import float64_device

TINY = 1e-6  # the smallest alpha or sigma that is divided by
WEIGHTS = ("auto", "snr+1", "truncated", "snr", "x0", "raw")


def time_nodes(grid: TimeGrid, schedule: Schedule, steps: int) -> Tensor:
    """The times of a grid in increasing order, float64 (steps + 1,): node i of a path that ends clean at 0."""
    return grid(schedule, steps).flip(0)


def time_device(x: Tensor) -> torch.device:
    """The device for the times of a batch x: the device of x, so that no coefficient waits for a copy.

    MPS has no float64: there they stay on the CPU.
    """
    return float64_device(x.device)


class DeviceTimes:
    """Times (N,) that are moved to a device once: `times.at(x)` on the device `time_device(x)`.

    Args:
        times: float64 (N,).
    """

    def __init__(self, times: Tensor) -> None:
        self.times = times
        self._moved: dict[torch.device, Tensor] = {}

    def at(self, x: Tensor) -> Tensor:
        """The times, float64 (N,), on the device `time_device(x)`."""
        device = time_device(x)
        if device not in self._moved:
            self._moved[device] = self.times.to(device)
        return self._moved[device]


def noised(schedule: Schedule, x: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
    """`alpha_t x + sigma_t noise` (B, *S) at the times t (B,); None: standard normal noise."""
    noise = torch.randn_like(x) if noise is None else noise
    return spread(schedule.alpha(t), x) * x + spread(schedule.sigma(t), x) * noise


def ddim_step(schedule: Schedule, z: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM from t to s, both (B,), with the prediction `x0` (B, *S) at z."""
    ratio = schedule.sigma(s) / schedule.sigma(t).clamp_min(TINY)
    return spread(ratio, z) * z + spread(schedule.alpha(s) - ratio * schedule.alpha(t), z) * x0


def ddim_path(
    denoiser: Callable[..., Tensor], schedule: Schedule, z: Tensor, times: Sequence[Tensor], **cond: Any
) -> tuple[Tensor, Tensor]:
    """Steps of DDIM along `times`, and the x* of the single step to their end.

    The mean is taken with the weights above times sigma_end, which are finite at the clean end.

    Args:
        denoiser: `denoiser(z, t, **cond) -> x0`.
        schedule: of the noise.
        z: state (B, *S) at the first time.
        times: decreasing, each (B,).
        cond: conditions of the denoiser.

    Returns:
        `(z_end, x*)`, each (B, *S).
    """
    end, total = times[-1], schedule.alpha(times[-1]) - schedule.sigma(times[-1]) * signal_to_noise(schedule, times[0])
    target = torch.zeros_like(z)
    for t, s in zip(times, times[1:], strict=False):
        x0 = denoiser(z, t, **cond)
        upper = schedule.alpha(end) if s is end else schedule.sigma(end) * signal_to_noise(schedule, s)
        gain = (upper - schedule.sigma(end) * signal_to_noise(schedule, t)) / total
        target = target + spread(gain, z) * x0
        z = ddim_step(schedule, z, x0, t, s)
    return z, target


def midpoint_path(
    denoiser: Callable[..., Tensor], schedule: Schedule, z: Tensor, times: Sequence[Tensor], **cond: Any
) -> tuple[Tensor, Tensor]:
    """As `ddim_path`, by steps of second order: two model evaluations each, the second at the midpoint.

    From t to s over their mean m, with x_m and e_m = (z_m - alpha_m x_m) / sigma_m at the state that DDIM reaches at m:
    `z_s = alpha_s x_m + (sigma_s / sigma_t) (z_t - alpha_t x_m)` where q_t q_s > 1, and
    `z_s = (alpha_s / alpha_t) z_t + (sigma_s - alpha_s sigma_t / alpha_t) e_m` nearer to the clean end, so that neither
    end divides by a small number. The x* is that of `jump_target`: for steps that are not tiny.
    """
    start = z
    for t, s in zip(times, times[1:], strict=False):
        m = 0.5 * (t + s)
        z_m = ddim_step(schedule, z, denoiser(z, t, **cond), t, m)
        x_m = denoiser(z_m, m, **cond)
        by_x = ddim_step(schedule, z, x_m, t, s)
        alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        e_m = (z_m - spread(schedule.alpha(m), z) * x_m) / spread(schedule.sigma(m).clamp_min(TINY), z)
        scale = alpha_s / alpha_t.clamp_min(TINY)
        by_e = spread(scale, z) * z + spread(sigma_s - scale * sigma_t, z) * e_m
        z = torch.where(spread(sigma_t * sigma_s > alpha_t * alpha_s, z).bool(), by_x, by_e)
    return z, jump_target(schedule, start, z, times[0], times[-1])


def signal_to_noise(schedule: Schedule, t: Tensor) -> Tensor:
    """`alpha / sigma`, with sigma clamped above zero."""
    return schedule.alpha(t) / schedule.sigma(t).clamp_min(TINY)


def jump_target(schedule: Schedule, z: Tensor, end: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x* whose one DDIM step takes z at t to `end` at s: by subtraction, for ends that no weighted mean gives.

    Two nearly equal images are subtracted where t and s are close: compute in float64 there.
    """
    ratio = schedule.sigma(s) / schedule.sigma(t).clamp_min(TINY)
    return (end - spread(ratio, z) * z) / spread(schedule.alpha(s) - ratio * schedule.alpha(t), z)


def raw_target(student: Denoiser, z: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """The network output at z, t (B,), t > 0, that corresponds to `x0` (B, *S)."""
    alpha, sigma = student.schedule.alpha(t), student.schedule.sigma(t).clamp_min(TINY)
    eps = (z - spread(alpha, z) * x0) / spread(sigma, z)
    return student.prediction.target(x0, eps, alpha, sigma)


def prediction_loss(
    student: Denoiser,
    z: Tensor,
    t: Tensor,
    x0: Tensor,
    weight: str = "auto",
    record: Callable[[Tensor], None] | None = None,
    **cond: Any,
) -> Tensor:
    """The weighted squared error between the student's prediction and `x0`.

    It is applied to the error of the network's output, so that no time divides by a small number.

    Args:
        student: in training.
        z: noised samples (B, *S).
        t: times (B,), above 0.
        x0: target (B, *S).
        weight: of |x0_student - x0|^2, with k = alpha / sigma: `"snr+1"` 1 + k^2, which for a v network is the plain
            error of its output; `"truncated"` max(1, k^2); `"snr"` k^2; `"x0"` 1; `"raw"` the plain error of the
            network's output; `"auto"` is `"raw"` for a network that predicts eps and `"snr+1"` for every other. (On the
            error of eps, `"snr+1"` is 1 / alpha^2, which on DDPM's table is 25,000 at t = 1 and outweighs all other
            times.)
        record: called with the network's output, such as `_relations.relation_recorder`.
        cond: conditions of the network.

    Returns:
        A scalar.

    Raises:
        BadInput: for an unknown weight.
    """
    raw = student.raw(z, t, **cond)
    if record is not None:
        record(raw)
    error = (raw - raw_target(student, z, t, x0).to(raw.dtype)).float().square().flatten(1).mean(1)
    return (output_weight(student, t, weight).to(error.device, torch.float32) * error).mean()


def output_weight(student: Denoiser, t: Tensor, weight: str) -> Tensor:
    """The factor of the squared error of the network's output at t (B,), float64 (B,), that realises a `weight`."""
    weight = resolve_weight(student, weight)
    alpha, sigma = student.schedule.alpha(t), student.schedule.sigma(t).clamp_min(TINY)
    _, _, c_out = student.prediction.coefficients(alpha, sigma)
    snr = (alpha / sigma) ** 2
    if weight == "raw":
        return torch.ones_like(snr)
    weights = {"snr+1": 1 + snr, "truncated": snr.clamp_min(1), "snr": snr, "x0": torch.ones_like(snr)}
    check_choice("weight", weight, WEIGHTS)
    return weights[weight] * c_out**2


def resolve_weight(student: Denoiser, weight: str, otherwise: str = "snr+1") -> str:
    """The weight that `"auto"` stands for: `"raw"` for an eps network, else `otherwise`; others unchanged."""
    if weight != "auto":
        return weight
    return "raw" if student.prediction.name == "eps" else otherwise
