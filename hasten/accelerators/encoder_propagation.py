"""Encoder propagation: the network's encoder runs at key steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput
from . import FIRST_SEED, WRAP, Accelerator, SamplingContext
from ._caching.fit import resolve_reuse
from ._caching.forecast import Extrapolation, resolve_extrapolate
from ._caching.injection import inject_noise
from ._caching.keys import MIN_QUERIES, resolve_key_steps
from ._caching.split import BlocksSplit, SplitPoint, split_point_of
from ._caching.wrapper import FeatureReuse, require_denoiser

if TYPE_CHECKING:
    from ..plan.table import Plan

__all__ = ["EncoderPropagation", "Propagated"]

CHOICES = ("paper", "uniform", "found")


@dataclass(frozen=True)
class EncoderPropagation(Accelerator):
    """Faster Diffusion: encoder features change little from one model evaluation to the next, decoder features a lot.

        key step:  (skips, middle) = encode(x_t, embed(t, cond)), cached;  raw = decode(skips, middle, embed(t, cond))
        other:     raw = decode(cached skips, cached middle, embed(t, cond))

    with t and cond those of the evaluation itself, and x0 = c_skip x_t + c_out raw with its own x_t. Without x_t in the
    decoder, the evaluations of a group (a key step and those that reuse its features) can be decoded in one batch.
    Where conditions or the batch change within a trajectory, that evaluation is a key step too.

    Args:
        keys: the key steps. "paper": {0, 1, 2, 3, 5, 10, 15, 25, 35} of 50, in proportion for other numbers; "uniform":
            one in `every`; "found": those that change the final samples of this model least, by a search on `samples`
            images (see `reuse_costs`); or their numbers, from 0.
        every: of "uniform".
        budget: of "found": how many key steps, or below 1 which fraction of the evaluations. The paper's is 9 of 50.
        extrapolate: how features are continued. 0: reused; 1: linearly extrapolated from the last two key steps;
            "chebyshev": by a ridge-fitted Chebyshev series through the last five (see `chebyshev_weights`); "fitted":
            as sums of the last four, with weights fitted on `samples` images (see `fit_weights`). Costs nothing but the
            memory of as many key steps' features, and of "fitted" a calibration.
        parallel: the maximum number of evaluations that are decoded in one batch; 1: each by itself. More is faster
            where a batch does not fill the device, and takes that much more memory.
        first: how many blocks of a transformer are its encoder; None: 18 of 28, in proportion.
        inject: `plan` adds `inject` times the starting state before the update of every evaluation with t < until (the
            paper's prior noise injection, .003, which restores fine texture); 0: none.
        until: see `inject`; .5 in the paper.
        samples: of the search: how many images.
        seed: of the first of them.
        forecast: the old name of `extrapolate`.

    References:
        Li, Hu, van de Weijer, Khan, Liu, Li, Yang, Wang, Cheng, Yang 2023, arXiv:2312.09608. The search, and the
        extrapolation of skips and middle, are hasten's.
    """

    keys: str | tuple[int, ...] = "paper"
    every: int = 4
    budget: float = 0.18
    extrapolate: int | str = 0
    parallel: int = 1
    first: int | None = None
    inject: float = 0.0
    until: float = 0.5
    samples: int = 8
    seed: int = FIRST_SEED
    forecast: int | None = None
    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset({"features"})
    min_queries: ClassVar[int] = MIN_QUERIES

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "extrapolate", resolve_extrapolate("encoder_propagation", self.extrapolate, self.forecast)
        )
        object.__setattr__(self, "forecast", None)
        if self.parallel < 1 or self.samples < 1:
            raise BadInput(
                f"encoder_propagation: parallel and samples are 1 or more, found {self.parallel} and {self.samples}"
            )

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        """The denoiser that reuses encoder features, for one sampling.

        Raises:
            BadInput: for a network without a split point, for 8 model evaluations or fewer, where more than half of
                them would depend on one key step, and for a sampler whose times are not known in advance.
        """
        who = "encoder_propagation"
        plain, times = require_denoiser(denoiser, who), context.required(who)
        split = split_point_of(plain.net, who, self.first)
        keys = resolve_key_steps(self.keys, len(times), CHOICES, self.every)
        keys, extrapolation = self._calibrate(plain, split, context, keys)
        return Propagated(plain, times, keys, split, extrapolation, self.parallel)

    def plan(self, plan: Plan, denoiser: Denoiser) -> Plan:
        """The plan with prior noise injection, which changes the sampler's state and not the network's output."""
        if self.inject == 0:
            return plan
        return inject_noise(plan, denoiser.schedule, denoiser.prediction, self.inject, self.until)

    def _calibrate(
        self,
        denoiser: Denoiser,
        split: SplitPoint,
        context: SamplingContext,
        keys: tuple[int, ...] | None,
    ) -> tuple[tuple[int, ...], Extrapolation]:
        """The key steps, those of "found" too, and how features are continued."""

        def run(x: Tensor, time: Tensor, cond: dict[str, Any], features: Any) -> tuple[Any, Tensor]:
            entry, emb = split.enter(x, time, cond)
            return split.evaluate(entry, emb) if features is None else (features, split.decode(features, emb))

        options: dict[str, Any] = {"budget": self.budget, "samples": self.samples, "seed": self.seed}
        return resolve_reuse("encoder_propagation", denoiser, context, keys, self.extrapolate, run, **options)


class Propagated(FeatureReuse):
    """A denoiser under `EncoderPropagation`, of the same signature, for one sequence of times."""

    def __init__(
        self,
        denoiser: Denoiser,
        times: Sequence[float],
        keys: tuple[int, ...],
        split: SplitPoint,
        extrapolation: Extrapolation | None = None,
        parallel: int = 1,
    ) -> None:
        super().__init__(denoiser, "encoder_propagation", times, keys, extrapolation)
        self._split, self.parallel = split, parallel

    def reset(self) -> None:
        """Drop the cached features and outputs: a new trajectory begins."""
        super().reset()
        self._ready: dict[int, Tensor] = {}  # raw outputs of later evaluations, decoded in one batch

    def full(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """The raw output at key step k."""
        entry, emb = self._split.enter(net_input, time, cond)
        self.encoder_calls += 1
        self._ready.clear()
        if self.parallel == 1 or isinstance(self._split, BlocksSplit):
            features, raw = self._split.evaluate(entry, emb)
            self.store(k, features)
            self.decoder_calls += 1
            return raw
        self.store(k, self._split.encode(entry, emb))
        return self._decode(k, net_input, cond, emb)

    def partial(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """The raw output at evaluation k, from cached features."""
        if k in self._ready:
            return self._ready.pop(k)
        return self._decode(k, net_input, cond, None)

    def _decode(self, k: int, net_input: Tensor, cond: dict[str, Any], emb: Any) -> Tensor:
        """The raw output at k; those of the evaluations decoded in the same batch are cached."""
        end = next((key for key in self.keys if key > k), len(self.times))
        steps, rows = range(k, min(k + self.parallel, end)), len(net_input)
        if len(steps) > 1 or emb is None:
            emb = self._split.emb(net_input, self.net_times(steps, net_input), cond)
        raw = self._split.decode(self.features_at(steps), emb)
        self.decoder_calls += 1
        if len(steps) > 1:
            first, *later = raw.split(rows)
            self._ready = dict(zip(steps[1:], later))
            return first
        return raw
