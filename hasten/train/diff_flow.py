"""Diffusion normalizing flow: a diffusion whose forward drift is learned together with its score."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput, check_int

__all__ = ["DiffFlow"]

Field = Callable[[Tensor, Tensor], Tensor]  # (z (B, D), t (B,)) -> (B, D)


@dataclass(frozen=True)
class DiffFlow:
    """The chain of N Euler steps of `dz = f dt + g dw` and its reverse, trained end to end.

    With t_i = i horizon / N, dt = horizon / N and standard normal d_i (the forward noise):

        z_i = z_{i-1} + f(z_{i-1}, t_{i-1}) dt + g sqrt(dt) d_i
        b_i = (z_{i-1} - z_i + (f(z_i, t_i) - g^2 s(z_i, t_i)) dt) / (g sqrt(dt))
        loss = -log N(z_N; 0, I) + sum_i (|b_i|^2 - |d_i|^2) / 2

    b_i is the noise with which the reverse chain takes the same step. The mean of the loss over the forward noise is an
    upper bound of -log p(z_0) of the reverse chain, in nats. Gradients pass through the whole chain to f. Meant for
    points: the states of all steps are kept.

    Args:
        steps: N; the bound becomes tighter, and training dearer, as it grows.
        horizon: T, at which the states should be standard normal.
        diffusion: g, the same in both directions of a step (else a term D log(g_b / g_f) would be missing).

    Raises:
        BadInput: for values that are not positive.

    References:
        Zhang, Chen 2021, arXiv:2110.07579.
    """

    steps: int = 10
    horizon: float = 4.0
    diffusion: float = 1.0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        if not (self.horizon > 0 and self.diffusion > 0):
            raise BadInput(f"DiffFlow needs a horizon and a diffusion above 0, got {self.horizon}, {self.diffusion}")

    @property
    def times(self) -> Tensor:
        """t_0 .. t_N, float64 (N + 1,)."""
        return torch.linspace(0, self.horizon, self.steps + 1, dtype=torch.float64)

    def loss(self, z: Tensor, drift: Field, score: Field, generator: torch.Generator | None = None) -> Tensor:
        """The loss (B,) in nats.

        Args:
            z: data (B, D).
            drift: f.
            score: s.
            generator: of the forward noise.
        """
        dt = self.horizon / self.steps
        scale = self.diffusion * math.sqrt(dt)
        total = z.new_zeros(len(z))
        for t, after in zip(self.times[:-1], self.times[1:]):
            d = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            last, z = z, z + drift(z, at(t, z)) * dt + scale * d
            b = (last - z + self._reverse_drift(z, after, drift, score) * dt) / scale
            total = total + 0.5 * (b.square() - d.square()).sum(1)
        return total + 0.5 * (z.square() + math.log(2 * math.pi)).sum(1)

    @torch.no_grad()
    def sample(self, z: Tensor, drift: Field, score: Field, generator: torch.Generator | None = None) -> Tensor:
        """Samples (B, D) of the reverse chain from standard normal z (B, D)."""
        dt = self.horizon / self.steps
        for t in self.times[1:].flip(0):
            d = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
            z = z - self._reverse_drift(z, t, drift, score) * dt + self.diffusion * math.sqrt(dt) * d
        return z

    def _reverse_drift(self, z: Tensor, t: Tensor, drift: Field, score: Field) -> Tensor:
        """f - g^2 s (B, D)."""
        return drift(z, at(t, z)) - self.diffusion**2 * score(z, at(t, z))


def at(t: Tensor, z: Tensor) -> Tensor:
    """One time (B,) for every sample, in their dtype."""
    return t.to(z.device, z.dtype).expand(len(z))
