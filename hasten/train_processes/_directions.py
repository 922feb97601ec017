"""Two denoisers, one for each direction between two sets, that are trained on each other's processes."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, evaluating
from ..samplers.dsbm import DSBMSampler
from ..sampling import Sampler, walk
from ..train.coupling import couple

__all__ = ["Directions", "bridge_loss"]


class Directions(nn.Module):
    """The denoisers of a Schroedinger bridge, `to_data` from the sources and `to_source` from the images, each on its
    own time, 1 where it begins.

    The first `first` steps train both on coupled pairs of a batch; after that, each in turn for `inner` steps on what
    the other one simulates. A simulated batch is used for `reuse` steps, with fresh times and noise. (A run that is
    resumed begins with a new one.)

    Args:
        denoiser: of the direction to the images; the other one begins as its copy.
        first, inner, reuse: in training steps, at least 0, 1 and 1.
        steps: of the simulation.
        coupling: of the first pairs, "none" or "ot".
    """

    step: Tensor
    first_turn: ClassVar[bool] = True  # of the direction to the images

    def __init__(
        self, denoiser: Denoiser, first: int, inner: int, reuse: int, steps: int, coupling: str = "none"
    ) -> None:
        super().__init__()
        self.to_data, self.to_source = denoiser, copy.deepcopy(denoiser)
        self.first, self.inner, self.reuse, self.coupling = first, inner, reuse, coupling
        self.times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.again = False  # see `OncePerStep`
        self._number = -1
        self._cached: dict[int, tuple[tuple[int, int], Any]] = {}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch with `x` and `source`, (B, *S) each."""
        if self.again:
            self._number += 1
        else:
            self._number = 0
            self.step += 1
        step, x, y = int(self.step) - 1, batch["x"], batch["source"]
        if step < self.first:
            return self.first_loss(x, couple(x, y, self.coupling))
        phase, within = divmod(step - self.first, self.inner)
        key, towards_data = (phase, within // self.reuse), (phase % 2 == 0) == self.first_turn
        if self._cached.get(self._number, (None, None))[0] != key:
            self._cached[self._number] = key, self.simulate(towards_data, x if towards_data else y)
        return self.fitted_loss(towards_data, self._cached[self._number][1])

    def direction(self, towards_data: bool) -> Denoiser:
        """The denoiser of a direction."""
        return self.to_data if towards_data else self.to_source

    def first_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of both directions on pairs."""
        return bridge_loss(self.to_data, x, y) + bridge_loss(self.to_source, y, x)

    @torch.no_grad()
    def simulate(self, towards_data: bool, start: Tensor) -> Any:
        """What the direction `towards_data` is trained on: pairs (its end, its beginning), from the other direction."""
        other, sampler = self.direction(not towards_data), DSBMSampler()
        with evaluating(other):
            end = walk(cast("Sampler", sampler), other, start, self.times, lambda: torch.randn_like(start))
        return start, end

    def fitted_loss(self, towards_data: bool, simulated: Any) -> Tensor:
        """The loss of a direction on what was simulated."""
        end, begin = simulated
        return bridge_loss(self.direction(towards_data), end, begin)


def bridge_loss(denoiser: Denoiser, end: Tensor, begin: Tensor) -> Tensor:
    """The loss of a direction on Brownian bridges from `begin` (B, *S) at its t = 1 to `end`, a scalar."""
    process: Any = denoiser.schedule
    low, high = process.t_min, 1 - process.t_min
    # one time in each of B strata, as ProcessLoss
    u = (torch.arange(len(end), dtype=torch.float64) + torch.rand((), dtype=torch.float64)) / len(end)
    t = low + (high - low) * u[torch.randperm(len(end))]
    loss: Tensor = process.loss(denoiser, end, t, torch.randn_like(end), {}, begin).mean()
    return loss
