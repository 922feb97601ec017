"""Exact runs of a sampler from one source, on symbols, for a target that is normal given the source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.processes._pinned import bridge_coefficients

F64 = torch.float64
SIZE = 600


class NormalTarget(nn.Module):
    """E[x_0 | z_t, y] for x_0 | y ~ N(mean, variance) on a pinned diffusion; a state is affine: entry 0 is its constant.

    With `source=None` states are ordinary tensors of samples and y is given at each call.
    """

    def __init__(self, schedule: Any, mean: float = 0.6, variance: float = 0.09, source: float = -0.4) -> None:
        super().__init__()
        self.schedule, self.mean, self.variance, self.source = schedule, mean, variance, source

    def forward(self, z: Tensor, t: Tensor, constant: Any = None) -> Tensor:
        a, b, c = bridge_coefficients(self.schedule, t)
        one = torch.zeros_like(z) + (1.0 if constant is None else constant)
        gain = b * self.variance / (b**2 * self.variance + c**2) if float(b) > 0 else 0.0
        return self.mean * one + gain * (z - (a * self.source + b * self.mean) * one)


def moments(sampler: Any, target: NormalTarget, times: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the result, exactly: the run is affine in its noises, of which each has a slot."""
    count = 0

    def noise() -> Tensor:
        nonlocal count
        count += 1
        return unit(count)

    constant = unit(0)
    coroutine = sampler.steps(target.schedule, target.source * constant, times, noise)
    result = None
    while True:
        try:
            query = coroutine.send(result)
        except StopIteration as stop:
            return float(stop.value[0]), float(stop.value[1:].norm())
        result = target(query.x, query.t, constant)


def even(steps: int, end: float = 0.0) -> Tensor:
    return torch.linspace(1, end, steps + 1, dtype=F64)


def unit(index: int) -> Tensor:
    e = torch.zeros(SIZE, dtype=F64)
    e[index] = 1.0
    return e
