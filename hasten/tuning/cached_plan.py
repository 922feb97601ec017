"""An output-level cache, run once on a few samples, as a plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..accelerators.output_cache import RULES, OutputCache, OutputCached
from ..errors import BadInput, check_int, check_numbers
from ..plan.cached import cached_plan
from ..plan.table import Plan, plan
from ..predictions import Prediction, prediction_from
from ..utils.devices import as_float64
from ._task import Tuned, Tuner, TuningTask

__all__ = ["CachedPlan"]

SAMPLES, TRIALS = 16, 24


@dataclass(frozen=True)
class CachedPlan(Tuner):
    """The plan of a sampler under an output-level cache (`OutputCache`), for a model.

    The cache decides on a few samples at which evaluations the network runs. With these evaluations it is a linear
    multistep method, which this returns: with as many evaluations as were computed, the same for every batch, without
    a decision while sampling, and comparable with a fitted plan of equal evaluations.

    Figures: threshold; computed, the numbers of the evaluations at which the network runs; of, how many the sampler
    has; rms_to_sampler, the root mean squared distance per entry from the sampler's own results.

    Args:
        rule: "easycache" or "teacache", see `OutputCache`.
        threshold: of the accumulated change.
        nfe: how many evaluations the plan may have: the threshold is searched. Default: those of `threshold`.
        warmup: see `OutputCache`.
        rescale: see `OutputCache`.
        prediction: what is reused, in these terms ("eps", "v", "flow", "x0"); by default what the network predicts.

    Raises:
        BadInput: for options out of range; in `tune`, for a sampler that is not linear, and where no threshold leads to
            `nfe` evaluations.

    References:
        Liu et al. 2024, arXiv:2411.19108 (TeaCache); Zhou et al. 2025, arXiv:2507.02860 (EasyCache).
    """

    rule: str = "easycache"
    threshold: float = 0.05
    nfe: int | None = None
    warmup: int = 2
    rescale: tuple[float, ...] = (1.0, 0.0)
    prediction: str | None = None
    needs_data: ClassVar[bool] = False
    reads_sources: ClassVar[bool] = True
    negative: ClassVar[tuple[str, ...]] = ("rescale",)

    def __post_init__(self) -> None:
        self._cache(self.threshold)
        if self.nfe is not None:
            check_int("cached_plan: nfe", self.nfe, 1)
        if self.prediction is not None:
            prediction_from(self.prediction)
        check_numbers(self)

    def _cache(self, threshold: float) -> OutputCache:
        """The cache with this threshold."""
        return OutputCache(threshold, self.rule, self.warmup, self.rescale)

    @torch.no_grad()
    def tune(self, task: TuningTask) -> Tuned:
        """The plan of the cache, and its figures."""
        if not getattr(task.sampler, "linear", False):
            raise BadInput(f"cached_plan needs a linear sampler: {type(task.sampler).__name__} is not linear")
        full = plan(task.sampler, task.schedule, task.times)
        run = _CacheTrials(task, full, self._terms(task))
        threshold = self.threshold if self.nfe is None else self._search(run, self.nfe)
        computed = run.computed(self._cache(threshold))
        result = cached_plan(full, computed, run.prediction, RULES[self.rule], name=f"{self.rule}:{full.sampler}")
        off = run.result(result) - run.result(full)
        figures = {
            "threshold": threshold,
            "computed": ",".join(map(str, computed)),
            "of": full.nfe,
            "rms_to_sampler": float(as_float64(off).square().mean().sqrt()),
        }
        return Tuned(plan=result, figures=figures)

    def _terms(self, task: TuningTask) -> Prediction:
        """The prediction in whose terms outputs are reused."""
        if self.prediction is not None:
            return prediction_from(self.prediction)
        own = getattr(task.denoiser, "prediction", None)
        if not isinstance(own, Prediction):
            raise BadInput(f"{type(task.denoiser).__name__} has no prediction: name what is reused, prediction=eps")
        return own

    def _search(self, run: _CacheTrials, nfe: int) -> float:
        """A threshold with which `nfe` evaluations are computed, by bisection of its logarithm."""
        low, high, counts = 1e-6, 1e3, set()
        for _ in range(TRIALS):
            middle = math.sqrt(low * high)
            count = len(run.computed(self._cache(middle)))
            if count == nfe:
                return middle
            counts.add(count)
            low, high = (middle, high) if count > nfe else (low, middle)
        nearest = sorted(counts, key=lambda count: abs(count - nfe))[:2]
        raise BadInput(
            f"cached_plan: no threshold of {self.rule} leads to {nfe} of {run.plan.nfe} evaluations; nearest are "
            f"{' and '.join(map(str, sorted(nearest)))}"
        )


class _CacheTrials:
    """The calibration samples, and what a cache decides on them."""

    def __init__(self, task: TuningTask, full: Plan, prediction: Prediction) -> None:
        self.task, self.plan, self.prediction = task, full, prediction
        n = task.n or SAMPLES
        dtype = next((p.dtype for p in task.denoiser.parameters()), torch.float64)
        self.noise = task.noise(0, n, dtype)
        first = full.times[0] if full.begin is None else full.begin
        self.x = self.noise.initial() * float(task.schedule.prior_std(first))
        self.cond: dict[str, Any] = task.cond(n)
        self.done = 0

    def result(self, compiled: Plan, denoiser: Any = None) -> Tensor:
        """The samples of a plan."""
        noise = self.noise.rows(slice(None)) if compiled.stochastic else None
        return compiled(self.task.denoiser if denoiser is None else denoiser, self.x, noise, cond=self.cond)

    def computed(self, cache: OutputCache) -> list[int]:
        """The numbers of the evaluations at which the network runs."""
        cached = OutputCached(self.task.denoiser, cache, self.plan.nfe, self.prediction)
        self.result(self.plan, cached)
        self.done += 1
        self.task.tick("trials", self.done, TRIALS, float(len(cached.computed)))
        return cached.computed
