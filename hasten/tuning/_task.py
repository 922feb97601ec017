"""What a tuner is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..plan.table import Plan
from ..progress import ProgressFn, no_progress
from ..sampling import Noise
from ..schedules.base import Schedule

Images = Callable[[int], tuple[Tensor, Tensor | None]]


@dataclass
class TuningTask:
    """A model and a way of sampling it that shall be made better.

    denoiser: as it will be sampled: under guidance where there is any; has `.schedule`.
    sampler: bound to the model. times: (steps + 1,) float64, the grid to start from. shape: S, of one sample.
    labels: gives the labels of n samples, classes in turn; None without classes.
    images: gives n real images (n, *S) in [-1, 1], always the same for the same n, and their labels; None without data.
    seed: of calibration sample 0; sample k has `seed + k`. n: samples to calibrate on; None: the tuner's own number.
    identity: of the weights, for what is remembered. tick: `tick(what, done, total, value)`, progress.
    """

    denoiser: nn.Module
    sampler: Any
    times: Tensor
    shape: tuple[int, ...]
    labels: Callable[[int], Tensor | None] = lambda n: None
    images: Images | None = None
    seed: int = 0
    n: int | None = None
    identity: str = ""
    tick: ProgressFn = no_progress

    @property
    def schedule(self) -> Schedule:
        """Of the denoiser."""
        return self.denoiser.schedule  # type: ignore[return-value]

    @property
    def steps(self) -> int:
        """Steps of the grid."""
        return len(self.times) - 1

    @property
    def device(self) -> torch.device:
        """Where the network is; the CPU for a denoiser without weights."""
        return next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))

    def noise(self, first: int, count: int, dtype: torch.dtype = torch.float32) -> Noise:
        """The noise of calibration samples `first` to `first + count - 1`."""
        return Noise(range(self.seed + first, self.seed + first + count), self.shape, dtype, self.device)

    def cond(self, count: int, first: int = 0) -> dict[str, Any]:
        """The conditions of those samples, ready to be passed to the denoiser: sample k has class k modulo C."""
        labels = self.labels(first + count)
        return {} if labels is None else {"label": labels[first:].to(self.device)}


@dataclass
class Tuned:
    """What tuning found.

    plan: to sample with. statistics: float64 tensors by name; parts: small networks of `hasten.nets` by name; both are
    kept with the model. figures: what was reached, JSON scalars.
    """

    plan: Plan | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, nn.Module] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class Tuner(Protocol):
    """What every file of `tuning/` holds: a frozen dataclass of this form. `needs_data`: it needs images."""

    needs_data: ClassVar[bool]

    def tune(self, task: TuningTask) -> Tuned: ...
