"""Inversion: from an image up to its noise, by the probability flow at increasing times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Denoiser
from .errors import BadInput
from .predictions import Prediction, spread
from .schedules.base import Schedule
from .times import Trailing

EpsFn = Callable[..., Tensor]  # (z (B, *S), t (B,), **cond) -> the noise e in z, (B, *S)


def mixed(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`(c_x, c_e)` of `raw = c_x x0 + c_e e`, of the shape of alpha."""
    one, none = torch.ones_like(alpha), torch.zeros_like(alpha)
    return prediction.target(one, none, alpha, sigma), prediction.target(none, one, alpha, sigma)


def noise_in(denoiser: Denoiser, z: Tensor, t: Tensor, raw: Tensor) -> Tensor:
    """The noise e (B, *S) in z that the network means by `raw` at t (B,); t = 0 too, but for an x0 network."""
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    of_x0, of_noise = mixed(denoiser.prediction, alpha, sigma)
    whole = alpha * of_noise - sigma * of_x0
    return spread(alpha / whole, z) * raw - spread(of_x0 / whole, z) * z


def raw_noise(denoiser: Denoiser, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the network has to say at z, t (B,), t < 1, to mean the noise e: the inverse of `noise_in`."""
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    of_x0, of_noise = mixed(denoiser.prediction, alpha, sigma)
    return spread(of_x0 / alpha, z) * z + spread(of_noise - of_x0 * sigma / alpha, z) * noise


def eps_fn(denoiser: Any, guidance_scale: float | Tensor | None = None) -> EpsFn:
    """The noise that a denoiser sees, under guidance.

    denoiser: has `raw`. guidance_scale: one, or one a sample (B,), or None: as it is. A network that takes it as an
    input is told it; a student that has it inside is asked as it is; for any other it costs two evaluations, in one
    batch, as soon as it is not 1 (guiding what the network says is guiding x0, as one is linear in the other).
    """

    def asked(z: Tensor, t: Tensor, label: Tensor | None = None, **cond: Any) -> Tensor:
        told = {} if label is None else {"label": label}
        ranged = getattr(denoiser, "guidance_range", None)
        if guidance_scale is None or (ranged is not None and ranged[0] == ranged[1]):
            return noise_in(denoiser, z, t, denoiser.raw(z, t, **told, **cond))
        scale = torch.as_tensor(guidance_scale, device=z.device, dtype=torch.float32).expand(len(z))
        if ranged is not None:
            return noise_in(denoiser, z, t, denoiser.raw(z, t, **told, **cond, guidance=scale))
        if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
            return noise_in(denoiser, z, t, denoiser.raw(z, t, **told, **cond))
        if label is None or denoiser.null_label is None:
            raise BadInput("guidance needs a label, and a model with a null label")
        both = {"label": torch.cat([label, torch.full_like(label, denoiser.null_label)])}
        with_class, without = denoiser.raw(torch.cat([z, z]), torch.cat([t, t]), **both, **cond).chunk(2)
        return noise_in(denoiser, z, t, without + spread(scale, z) * (with_class - without))

    return asked


def inversion_step(schedule: Schedule, z: Tensor, noise: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM from t up to s, both (B,), with the noise (B, *S) in z."""
    ratio = schedule.alpha(s) / schedule.alpha(t)
    return spread(ratio, z) * z + spread(schedule.sigma(s) - ratio * schedule.sigma(t), z) * noise


def inverted(
    noise_of: EpsFn, schedule: Schedule, z: Tensor, times: Sequence[Tensor], **cond: Any
) -> tuple[Tensor, Tensor]:
    """Where DDIM steps along the rising `times`, each (B,), take z (B, *S), and the e* of the jump: `(z_end, e*)`."""
    end = times[-1]
    a, q = schedule.alpha(end), [schedule.sigma(t) / schedule.alpha(t) for t in times[:-1]]
    total = schedule.sigma(end) - a * q[0]
    reached = [*(a * q_i for q_i in q), schedule.sigma(end)]
    target = torch.zeros_like(z)
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        noise = noise_of(z, t, **cond)
        target = target + spread((reached[i + 1] - reached[i]) / total, z) * noise
        z = inversion_step(schedule, z, noise, t, s)
    return z, target


def increasing_times(denoiser: Any, steps: int) -> Tensor:
    """The increasing times of `steps` steps, (steps + 1,) float64, from the image to the noise.

    The first is 0, or `schedule.t_min` where the network's clock is infinite at 0 (as EDM's).
    BadInput for an x0 network, which says nothing of the noise at the image.
    """
    if denoiser.prediction.name == "x0":
        raise BadInput(
            "a network that predicts x0 says nothing of the noise at the image: encoding needs v, flow, edm or eps"
        )
    times = Trailing()(denoiser.schedule, steps).flip(0)
    clock = getattr(denoiser, "time_input", None)  # which exact denoisers lack
    if clock is not None and not math.isfinite(float(clock(times[0]))):
        times[0] = denoiser.schedule.t_min
    return times


@torch.no_grad()
def encode(
    denoiser: Any,
    x0: Tensor,
    steps: int,
    guidance_scale: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    **cond: Any,
) -> Tensor:
    """The noise z_1 (B, *S) of the images x0 (B, *S), by `steps` jumps upwards.

    denoiser: a distilled encoder, for the steps that it was trained for. (For any other denoiser these are steps of
    DDIM upwards, of order 1, less exact than those of `samplers.ddim.invert`.) guidance_scale: see `voice`.
    Evaluations: `steps`, or twice as many where guidance costs two.
    """
    noise_of, z, path = eps_fn(denoiser, guidance_scale), x0, increasing_times(denoiser, steps)
    for k, (t, s) in enumerate(zip(path, path[1:], strict=False)):
        t, s = t.expand(len(z)), s.expand(len(z))
        z = inversion_step(denoiser.schedule, z, noise_of(z, t, **cond), t, s)
        if progress is not None:
            progress(k + 1, steps)
    return z


def own_eps_fn(teacher: nn.Module, denoiser: Denoiser, guidance_scale: float) -> EpsFn:
    """What a task's teacher sees: by its own `raw` where its class has one, else the plain network under guidance."""
    if not hasattr(type(teacher), "raw"):  # a guide, whose `raw` would be that of what it wraps, without guidance
        return eps_fn(denoiser, guidance_scale)
    needs_scale = getattr(getattr(teacher, "net", None), "guidance_range", None) is not None
    return eps_fn(teacher, guidance_scale if needs_scale else None)
