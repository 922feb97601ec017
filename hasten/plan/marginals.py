"""Mean and variance of the states of a plan for Gaussian data, in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .program import used

__all__ = ["marginals"]


def marginals(
    plan: Any, mean: Tensor, variance: Tensor, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of every state for data N(mean, diag(variance)) and its exact denoiser, see `Plan.marginals`.

    Args:
        plan: a `Plan`.
        mean, variance: (D,), of the data.
        start: mean and variance (D,) of `x_init`.

    Returns:
        two (K + 1, D) float64 tensors.
    """
    schedule = plan._schedule
    mean, variance = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (mean, variance))
    alpha, sigma = (f(plan.times)[:, None] for f in (schedule.alpha, schedule.sigma))
    if start is None:
        t = plan.times[:1] if plan.begin is None else torch.tensor([plan.begin], dtype=torch.float64)
        start = (
            schedule.alpha(t) * mean,
            schedule.alpha(t) ** 2 * variance + schedule.sigma(t) ** 2,
        )
    begin, a, A, B, C = (_each(plan, table) for table in (plan.start, plan.a, plan.A, plan.B, plan.C))
    scale = torch.cat([start[1].sqrt()[None], mean.new_ones(len(begin) - 1, len(mean))])
    # each state as (mean, factors of the independent standard normals: the initial state and the draws)
    means, factors = [begin[0] * start[0]], [begin * scale]
    outputs_mean, outputs_factor = [], []
    for k in range(plan.nfe):
        gain = alpha[k] * variance / (alpha[k] ** 2 * variance + sigma[k] ** 2)
        outputs_mean.append(mean + gain * (means[k] - alpha[k] * mean))
        outputs_factor.append(gain * factors[k])
        old, new = used(A.detach()[k]), used(B.detach()[k])
        noise = torch.cat([mean.new_zeros(1, len(mean)), C[k].expand(-1, len(mean))])
        means.append(
            sum(A[k, j] * means[j] for j in old) + a[k] * means[k] + sum(B[k, j] * outputs_mean[j] for j in new)
        )
        factors.append(
            sum(A[k, j] * factors[j] for j in old)
            + a[k] * factors[k]
            + sum(B[k, j] * outputs_factor[j] for j in new)
            + noise
        )
    return torch.stack(means), torch.stack([f.square().sum(0) for f in factors])


def _each(plan: Any, table: Tensor) -> Tensor:
    """A table with a last axis for the coordinates of a sample: (..., D) or (..., 1)."""
    return table[..., None] if plan.basis is None else table[..., plan.basis.index.flatten()]
