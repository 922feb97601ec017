"""Train a diffusion Schroedinger bridge by iterative proportional fitting (DSB)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import Denoiser, evaluating
from ..predictions import spread
from ..processes.dsbm import mean_matching_target
from ._directions import Directions
from .dsbm import TrainDSBM


class ProportionalDirections(Directions):
    """Each direction is the time reversal of the other one, by the mean matching of successive states.

    The first reference, from the images, is the Brownian motion, whose time reversal is the first `to_data`.
    """

    first_turn: ClassVar[bool] = False

    def first_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of `to_data` on Brownian paths from the images; the other direction begins with its own turn."""
        return self.fitted_loss(True, self.brownian(x))

    def brownian(self, x: Tensor) -> Any:
        """Successive states of Brownian motion from the images, with the targets of its time reversal."""
        return self.chain(x, lambda z, k: z)

    @torch.no_grad()
    def simulate(self, towards_data: bool, start: Tensor) -> Any:
        """Successive states of the other direction from its beginning, with the targets of its time reversal."""
        other = self.direction(not towards_data)

        def mean(z: Tensor, k: int) -> Tensor:
            ratio = float(self.times[k + 1] / self.times[k])
            return ratio * z + (1 - ratio) * other(z, self.times[k])

        with evaluating(other):
            return self.chain(start, mean)

    def chain(self, start: Tensor, mean: Any) -> tuple[Tensor, Tensor]:
        """The states z_1 .. z_N and their targets, (N, B, *S) each, of `z_{k+1} = mean(z_k, k) + noise`."""
        process: Any = self.to_data.schedule
        z, states, targets = start, [], []
        for k in range(len(self.times) - 1):
            std = process.noise * float(self.times[k] - self.times[k + 1]) ** 0.5
            later = mean(z, k) + std * torch.randn_like(z)
            targets.append(mean_matching_target(functools.partial(mean, k=k), z, later))
            states.append(later)
            z = later
        return torch.stack(states), torch.stack(targets)

    def fitted_loss(self, towards_data: bool, simulated: Any) -> Tensor:
        """The loss of a direction: one state of every path, in units of the noise of a step."""
        states, targets = simulated
        denoiser, (N, B) = self.direction(towards_data), states.shape[:2]
        k, rows = torch.randint(N, (B,)), torch.arange(B)
        at = k.to(states.device), rows.to(states.device)
        z, target = states[at], targets[at]
        # after k + 1 steps of the other direction, N - k - 1 of which the time is counted down from 1
        t, s = self.times[N - 1 - k], self.times[N - k]
        return step_loss(denoiser, z, t, s, target)


def step_loss(denoiser: Denoiser, z: Tensor, t: Tensor, s: Tensor, target: Tensor) -> Tensor:
    """The squared error of the mean of `dsbm`'s step from t to s, (B,) each, in units of the variance of its noise."""
    alpha, sigma = (
        value.to(z.dtype).to(z.device) for value in (denoiser.schedule.alpha(t), denoiser.schedule.sigma(t))
    )
    x0 = z + spread(t / (t - s), z) * (target - z)
    eps = (z - spread(alpha, z) * x0) / spread(sigma, z)
    error = (denoiser.raw(z, t).float() - denoiser.prediction.target(x0, eps, alpha, sigma).float()).square()
    weight = ((t - s) / t).to(error.dtype).to(error.device)
    return (weight * error.flatten(1).mean(1)).mean()


@dataclass(frozen=True)
class TrainDSB(TrainDSBM):
    """The Schroedinger bridge as its authors first fitted it: each direction learns the time reversal of the other's
    paths, state by state.

    Errors add up over the iterations in both ends; `dsbm` keeps them, and is the better choice. Options as for dsbm;
    `first` trains the direction to the images only, and `coupling` is not used.

    References:
        De Bortoli, Thornton, Heng, Doucet 2021, arXiv:2106.01357.
    """

    directions: ClassVar[type[Directions]] = ProportionalDirections
