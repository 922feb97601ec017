"""A budget of wall time, what is known of the rows that are sampled within it, and their real-data baseline."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch

from ..errors import BadInput
from ..metrics import Reference, floor_table, make_reference
from ..metrics.frechet import frechet_distance, moments
from .jobs import Job

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


def monotonic_seconds() -> float:
    """Seconds of a monotonic clock."""
    return time.perf_counter()


def preserve_threads(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Restore the number of threads of torch when a function ends."""

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        threads = torch.get_num_threads()
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return run


def set_faster_threads(rounds: int = 3) -> int:
    """Use all threads of torch or one, whichever runs a short probe faster now; returns their number.

    On a busy CPU threads wait for one another at the end of every operation, and one can be several times faster.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return 1
    seconds: dict[int, list[float]] = {threads: [], 1: []}
    x, weight = torch.ones(16, 32, 28, 28), torch.ones(32, 32, 3, 3)
    for _ in range(rounds):
        for count, each in seconds.items():
            torch.set_num_threads(count)
            start = monotonic_seconds()
            for _ in range(4):
                torch.nn.functional.conv2d(x, weight, padding=1).relu_()
            each.append(monotonic_seconds() - start)
        if max(map(sum, seconds.values())) > 3 * min(map(sum, seconds.values())):  # no doubt
            break
    best = min(seconds, key=lambda count: statistics.median(seconds[count]))
    torch.set_num_threads(best)
    return best


@dataclass
class TimeBudget:
    """The wall time of a run, from the creation of this object.

    Args:
        seconds: The budget.

    Raises:
        BadInput: unless `seconds` is positive and finite.
    """

    seconds: float
    start: float = field(default_factory=lambda: monotonic_seconds())

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise BadInput(f"minutes must be a number above 0, got {self.seconds / 60:g}")

    @property
    def minutes(self) -> float:
        """The budget in minutes."""
        return self.seconds / 60

    @property
    def remaining(self) -> float:
        """Seconds left, negative once they are spent."""
        return self.seconds - (monotonic_seconds() - self.start)


@dataclass
class RowState:
    """What is known of a row while it is sampled.

    Args:
        index: Its position in the set.
        job: The row, with the key under which its batches are saved.
        batches: Batches on disk, the first ones of the row.
        nfe: Evaluations per image, counted in the first batch.
        first: Seconds of a batch in the first pass.
        peak: Peak memory in bytes.
        distance: Fréchet distance of the first images.
        seconds: Seconds of a batch in each complete round of this run.
    """

    index: int
    job: Job
    batches: int = 0
    nfe: float = 0.0
    first: float = 0.0
    peak: int = 0
    distance: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def latest(self) -> float:
        """Seconds that the next batch will take, as far as known."""
        return self.seconds[-1] if self.seconds else self.first


def real_data_baseline(reference: Reference | None, n: int) -> dict[str, float]:
    """Figures of n real images of a reference against its others, where it has no baseline of its own at n.

    Args:
        reference: Statistics of real images.
        n: Number of images.

    Returns:
        The value by metric; the Fréchet distance is the mean over up to four disjoint sets. Empty without a reference,
        with a known baseline, and where the reference has fewer than 2 n images.
    """
    if reference is None or reference.floor_at("frechet", n) is not None:
        return {}
    sets = min(4, len(reference.sample) // (2 * n))
    if sets == 0:
        return {}
    features = reference.sample[torch.randperm(len(reference.sample), generator=torch.Generator().manual_seed(0))]
    rest = make_reference(features[sets * n :], reference.name, reference.split, reference.features)
    parts = features[: sets * n].split(n)
    distances = [frechet_distance(*moments(part), rest.mean, rest.covariance) for part in parts]
    others = {name: table[n] for name, table in floor_table(parts[0], rest, [n]).items()}
    return {**others, "frechet": statistics.fmean(distances)}
