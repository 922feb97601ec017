"""The input and output of tuning methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..nets.critic import label_count
from ..plan.table import Plan
from ..progress import ProgressFn, no_progress
from ..sampling import Noise
from ..schedules.base import Schedule

Images = Callable[[int], tuple[Tensor, Tensor | None]]


@dataclass
class TuningTask:
    """A model and a sampling configuration to improve.

    Args:
        denoiser: as it is sampled, with guidance if any; has `.schedule`.
        sampler: bound to the model.
        times: (steps + 1,) float64, the grid to start from.
        shape: S, of one sample.
        labels: returns the labels of n samples, classes in turn; None without classes.
        images: returns n real images (n, *S) in [-1, 1], always the same for the same n, and their labels; None without
            data.
        sources: source images (m, C, h, w) of a network that reads them; sample k has number k mod m.
        temperature: factor of the initial noise.
        seed: of calibration sample 0; sample k has `seed + k`.
        n: number of calibration samples. Default: the method's own.
        identity: of the weights, for the cache.
        tick: progress, `tick(what, done, total, value)`.
    """

    denoiser: nn.Module
    sampler: Any
    times: Tensor
    shape: tuple[int, ...]
    labels: Callable[[int], Tensor | None] = lambda n: None
    images: Images | None = None
    sources: Tensor | None = None
    temperature: float = 1.0
    seed: int = 0
    n: int | None = None
    identity: str = ""
    tick: ProgressFn = no_progress

    @property
    def schedule(self) -> Schedule:
        """The schedule of the denoiser."""
        schedule = self.denoiser.schedule
        assert isinstance(schedule, Schedule)
        return schedule

    @property
    def null_label(self) -> int | None:
        """The denoiser's label of "no class", 0 included; None if it has none."""
        return getattr(self.denoiser, "null_label", None)

    @property
    def classes(self) -> int:
        """The number of classes of a table with a row for each label and one more, the last, for "no class".

        A null label above all others is that last row; any other null label has a row of its own.
        """
        count, null = label_count(self.denoiser), self.null_label
        return count - 1 if null is not None and null == count - 1 else count

    @property
    def steps(self) -> int:
        """The number of steps of the grid."""
        return len(self.times) - 1

    @property
    def device(self) -> torch.device:
        """The device of the network; the CPU for a denoiser without weights."""
        return next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))

    def noise(self, first: int, count: int, dtype: torch.dtype = torch.float32) -> Noise:
        """The noise of calibration samples `first` to `first + count - 1`."""
        seeds = range(self.seed + first, self.seed + first + count)
        return TemperedNoise(self.temperature, seeds, self.shape, dtype, self.device)

    def cond(self, count: int, first: int = 0) -> dict[str, Any]:
        """Keyword arguments of the denoiser for samples `first` to `first + count - 1`; sample k has class k mod C."""
        labels = self.labels(first + count)
        cond = {} if labels is None else {"label": labels[first:].to(self.device)}
        if self.sources is not None:
            cond["source"] = self.sources[torch.arange(first, first + count) % len(self.sources)].to(self.device)
        return cond


class TemperedNoise(Noise):
    """Noise whose initial values are multiplied by a temperature."""

    def __init__(self, temperature: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.temperature = temperature

    def initial(self) -> Tensor:
        """The initial noise (B, *S) times the temperature."""
        x = super().initial()
        return x if self.temperature == 1 else self.temperature * x


@dataclass
class Tuned:
    """The result of tuning.

    Args:
        plan: to sample with.
        statistics: float64 tensors by name, saved with the model.
        parts: small networks of `hasten.nets` by name, saved with the model.
        figures: measurements, JSON scalars.
    """

    plan: Plan | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, nn.Module] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class Tuner(Protocol):
    """A tuning method: a frozen dataclass of this form in each file of `tuning/`. `needs_data`: it needs images.
    `reads_sources`: it takes all conditions from `task.cond`, the source images of a network that reads them too."""

    needs_data: ClassVar[bool] = False
    reads_sources: ClassVar[bool] = False

    def bind(self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Tuner:
        """The method with the statistics and parts of a model that it uses."""
        return self

    def tune(self, task: TuningTask) -> Tuned:
        """Tune a model."""
        ...
