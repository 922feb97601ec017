"""Inversion: from an image to its noise, by the probability flow at increasing times."""

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

EpsFn = Callable[..., Tensor]  # (z (B, *S), t (B,), **cond) -> the noise eps in z, (B, *S)


def raw_weights(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`(c_x, c_e)` of `raw = c_x x0 + c_e eps`, of the shape of alpha.

    Args:
        prediction: what `raw` means.
        alpha, sigma: coefficients of the schedule.
    """
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    return prediction.target(one, zero, alpha, sigma), prediction.target(zero, one, alpha, sigma)


def raw_to_eps(denoiser: Denoiser, z: Tensor, t: Tensor, raw: Tensor) -> Tensor:
    """The noise eps (B, *S) in z that a network output corresponds to; at t = 0 too, unless it predicts x0.

    Args:
        denoiser: whose schedule and prediction are used.
        z: states (B, *S).
        t: their times (B,).
        raw: the network's output (B, *S).
    """
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    c_x0, c_eps = raw_weights(denoiser.prediction, alpha, sigma)
    determinant = alpha * c_eps - sigma * c_x0
    return spread(alpha / determinant, z) * raw - spread(c_x0 / determinant, z) * z


def eps_to_raw(denoiser: Denoiser, z: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The network output (B, *S) that corresponds to the noise eps in z: the inverse of `raw_to_eps`.

    Args:
        denoiser: whose schedule and prediction are used.
        z: states (B, *S).
        t: their times (B,), below 1.
        eps: the noise (B, *S).
    """
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    c_x0, c_eps = raw_weights(denoiser.prediction, alpha, sigma)
    return spread(c_x0 / alpha, z) * z + spread(c_eps - c_x0 * sigma / alpha, z) * eps


def make_eps_fn(denoiser: Any, guidance_scale: float | Tensor | None = None) -> EpsFn:
    """The noise prediction of a denoiser as a function, under guidance.

    A network with the input `guidance` gets the scale; a student with one scale built in is evaluated as it is; for any
    other, a scale other than 1 costs two evaluations, in one batch (guiding the network's output is guiding x0, as one
    is linear in the other).

    Args:
        denoiser: with `raw`.
        guidance_scale: one, or one per sample (B,); None: without guidance.

    Returns:
        `eps_fn(z (B, *S), t (B,), label=None, **cond) -> eps (B, *S)`, which raises BadInput where guidance has no
        label, or the model no null label.
    """

    def eps_fn(z: Tensor, t: Tensor, label: Tensor | None = None, **cond: Any) -> Tensor:
        labels = {} if label is None else {"label": label}
        scales = getattr(denoiser, "guidance_range", None)
        if guidance_scale is None or (scales is not None and scales[0] == scales[1]):
            return raw_to_eps(denoiser, z, t, denoiser.raw(z, t, **labels, **cond))
        scale = torch.as_tensor(guidance_scale, device=z.device, dtype=torch.float32).expand(len(z))
        if scales is not None:
            return raw_to_eps(denoiser, z, t, denoiser.raw(z, t, **labels, **cond, guidance=scale))
        if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
            return raw_to_eps(denoiser, z, t, denoiser.raw(z, t, **labels, **cond))
        if label is None or denoiser.null_label is None:
            raise BadInput("guidance needs a label, and a model with a null label")
        both = {"label": torch.cat([label, torch.full_like(label, denoiser.null_label)])}
        raw_cond, raw_uncond = denoiser.raw(torch.cat([z, z]), torch.cat([t, t]), **both, **cond).chunk(2)
        return raw_to_eps(denoiser, z, t, raw_uncond + spread(scale, z) * (raw_cond - raw_uncond))

    return eps_fn


def inversion_step(schedule: Schedule, z: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The DDIM step from t to the later time s.

    Args:
        schedule: of the noise.
        z: states (B, *S) at t.
        eps: the noise (B, *S) in them.
        t, s: times (B,), t < s.
    """
    ratio = schedule.alpha(s) / schedule.alpha(t)
    return spread(ratio, z) * z + spread(schedule.sigma(s) - ratio * schedule.sigma(t), z) * eps


def invert_along(
    eps_fn: EpsFn, schedule: Schedule, z: Tensor, times: Sequence[Tensor], **cond: Any
) -> tuple[Tensor, Tensor]:
    """DDIM steps along increasing times, and the single noise prediction that would make them in one jump.

    Args:
        eps_fn: the noise prediction.
        schedule: of the noise.
        z: states (B, *S) at `times[0]`.
        times: increasing, each (B,).
        cond: conditions for `eps_fn`.

    Returns:
        the states at `times[-1]` and that noise prediction, both (B, *S).
    """
    end = times[-1]
    a, q = schedule.alpha(end), [schedule.sigma(t) / schedule.alpha(t) for t in times[:-1]]
    total = schedule.sigma(end) - a * q[0]
    reached = [*(a * q_i for q_i in q), schedule.sigma(end)]
    target = torch.zeros_like(z)
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        eps = eps_fn(z, t, **cond)
        target = target + spread((reached[i + 1] - reached[i]) / total, z) * eps
        z = inversion_step(schedule, z, eps, t, s)
    return z, target


def increasing_times(denoiser: Any, steps: int) -> Tensor:
    """The times of an inversion, (steps + 1,) float64, from the image to the noise.

    The first is 0, or `schedule.t_min` where the network's clock is infinite at 0 (as EDM's).

    Args:
        denoiser: to invert with.
        steps: at least 1.

    Raises:
        BadInput: for an x0 network, whose output at the image does not determine the noise.
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
    """The noise z_1 (B, *S) of images, by `steps` inversion steps.

    Args:
        denoiser: a distilled encoder, for the steps that it was trained for. (For any other denoiser these are DDIM
            inversion steps, of order 1, less exact than those of `samplers.ddim.invert`.)
        x0: images (B, *S).
        steps: evaluations, or half of them where guidance costs two.
        guidance_scale: see `make_eps_fn`.
        progress: called as `progress(steps done, steps)`.
        cond: conditions of the network.
    """
    eps_fn, z, path = make_eps_fn(denoiser, guidance_scale), x0, increasing_times(denoiser, steps)
    for k, (t, s) in enumerate(zip(path, path[1:], strict=False)):
        t, s = t.expand(len(z)), s.expand(len(z))
        z = inversion_step(denoiser.schedule, z, eps_fn(z, t, **cond), t, s)
        if progress is not None:
            progress(k + 1, steps)
    return z


def teacher_eps_fn(teacher: nn.Module, denoiser: Denoiser, guidance_scale: float) -> EpsFn:
    """The noise prediction of a task's teacher: by its own `raw` where its class has one, else the guided network.

    Args:
        teacher: the teacher with its guides.
        denoiser: the plain network in it.
        guidance_scale: of the plain network, and of a teacher with the input `guidance`.
    """
    if not hasattr(type(teacher), "raw"):  # a guide, whose `raw` would be the inner denoiser's, without guidance
        return make_eps_fn(denoiser, guidance_scale)
    needs_scale = getattr(getattr(teacher, "net", None), "guidance_range", None) is not None
    return make_eps_fn(teacher, guidance_scale if needs_scale else None)
