"""The variance that a network of twice the channels predicts for a reverse step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, Wrapper, to_x0
from ..errors import BadInput
from ..schedules.base import Schedule

__all__ = ["interpolated_log_variance", "x0_and_variance"]


def inner_denoiser(denoiser: nn.Module) -> Denoiser:
    """The denoiser inside all wrappers.

    Raises:
        BadInput: where its network predicts no variance.
    """
    inner: Any = denoiser
    while isinstance(inner, Wrapper):
        inner = inner.denoiser
    net = getattr(inner, "net", None)
    if not isinstance(inner, Denoiser) or not callable(getattr(net, "with_learned_variance", None)):
        raise BadInput(
            f"variance=learned needs a network that predicts the variance, as hasten train --process improved_ddpm "
            f"makes them, found {type(net if net is not None else inner).__name__}: take variance=small or large"
        )
    return inner


def x0_and_variance(denoiser: nn.Module, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Tensor]:
    """x0 (B, *S), and v (B, *S) of the interpolation between the bounds of log V.

    Of a wrapped denoiser, such as a guided one, x0 is its own and v that of the network with the conditions: one
    evaluation more.

    Raises:
        BadInput: where the network predicts no variance.
    """
    inner = inner_denoiser(denoiser)
    c_in, c_skip, c_out, clock = inner._coefficients(t, x_t)
    plain = {key: value for key, value in cond.items() if not key.startswith("null_")}
    net: Any = inner.net
    raw, o = net.with_learned_variance(*inner._inputs(x_t, c_in, clock), **plain)
    if raw.shape != x_t.shape or o.shape != x_t.shape:
        raise BadInput(f"{type(inner.net).__name__} gives a variance of shape {tuple(o.shape)}, not {tuple(x_t.shape)}")
    x0 = to_x0(x_t, raw.to(x_t.dtype), c_skip, c_out) if inner is denoiser else denoiser(x_t, t, **cond)
    return x0, 0.5 * (o.float() + 1)


def interpolated_log_variance(v: Tensor, large: Tensor | float, small: Tensor | float) -> Tensor:
    """`v log large + (1 - v) log small`; the bounds broadcast to `v`."""
    high, low = (torch.as_tensor(bound, dtype=torch.float64).log().to(v) for bound in (large, small))
    return v * high + (1 - v) * low


def transition(schedule: Schedule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `q(x_s | x_t, x)`, s < t: the coefficient of x in its mean, its variance b~ = b sigma_s^2 / sigma_t^2, and
    b = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2; float64 of the shape of the times."""
    removed = -torch.expm1(2 * (schedule.lam(t) - schedule.lam(s)))  # b / sigma_t^2, without cancellation
    return schedule.alpha(s) * removed, removed * schedule.sigma(s) ** 2, removed * schedule.sigma(t) ** 2
