"""Encoder propagation: the network's encoder is run at key queries only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput
from . import FIRST_SEED, WRAP, SamplingContext
from ._caching.injection import injected
from ._caching.keys import FEWEST, checked, named
from ._caching.seams import TransformerSeam, UNetSeam, seam, tiled
from ._caching.search import search
from ._caching.wrapper import Keyed, inner

if TYPE_CHECKING:
    from ..plan.table import Plan

__all__ = ["EncoderPropagation", "Propagated"]

CHOICES = ("paper", "uniform", "found")


@dataclass(frozen=True)
class EncoderPropagation:
    """Faster Diffusion: encoder features change little from query to query, decoder features a lot.

        key query:    (skips, middle) = encode(x_t, embed(t, cond)), kept;  raw = decode(skips, middle, embed(t, cond))
        other query:  raw = decode(kept skips, kept middle, embed(t, cond))

    with t and cond those of the query itself, and x0 = c_skip x_t + c_out raw with its own x_t. Without x_t in the
    decoder, the queries of a group (a key and those that hang on it) can be decoded in one batch at the key.

    Args:
        keys: "paper": {0, 1, 2, 3, 5, 10, 15, 25, 35} of 50, in proportion for other numbers; "uniform": one in
            `every`; "found": those that change the final samples of this model least, by a search on `samples` images
            (see `costs`); or the numbers of the key queries, from 0.
        every: of "uniform".
        budget: of "found": how many keys, or below 1 which share of the queries. The paper's is 9 of 50.
        forecast: 0: features are held; 1: they are drawn on along the line through the last two keys, for nothing.
        parallel: the most queries that are decoded in one batch; 1: each when it is asked. More is faster where a batch
            does not fill the device, and takes that much more memory.
        first: how many blocks of a transformer are its encoder; None: 18 of 28, in proportion.
        inject, until: `plan` adds `inject` times the starting state before the update of every query with t < until
            (the paper's prior noise injection: .003 and .5; it brings back fine texture). 0: nothing.
        samples, seed: of the search: how many images, and the first one's seed.

    Where conditions or the batch change within a trajectory, that query is a key too.

    Reference: Li, Hu, van de Weijer, Khan, Liu, Li, Yang, Wang, Cheng, Yang 2023, arXiv:2312.09608. The search, and the
    forecast of skips and middle, are hasten's.
    """

    keys: str | tuple[int, ...] = "paper"
    every: int = 4
    budget: float = 0.18
    forecast: int = 0
    parallel: int = 1
    first: int | None = None
    inject: float = 0.0
    until: float = 0.5
    samples: int = 8
    seed: int = FIRST_SEED
    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset({"features"})
    least_queries: ClassVar[int] = FEWEST

    def __post_init__(self) -> None:
        if self.forecast not in (0, 1):
            raise BadInput(f"encoder_propagation: forecast is 0 (hold) or 1 (a line), found {self.forecast}")
        if self.parallel < 1 or self.samples < 1:
            raise BadInput(
                f"encoder_propagation: parallel and samples are 1 or more, found {self.parallel} and {self.samples}"
            )

    def apply(self, denoiser: nn.Module, ahead: SamplingContext) -> nn.Module:
        """The denoiser that reuses features, for the sampling ahead.

        Raises:
            BadInput: for a network without a seam, for 8 queries or fewer, where more than half of them would hang on
                one key, and for a sampler whose times are not known in advance.
        """
        who = "encoder_propagation"
        plain, times = inner(denoiser, who), ahead.required(who)
        cut = seam(plain.net, who, self.first)
        keys = named(self.keys, len(times), CHOICES, self.every)
        if keys is None:
            keys = self._found(plain, cut, ahead)
        return Propagated(plain, times, checked(keys, len(times), who), cut, self.forecast, self.parallel)

    def plan(self, plan: Plan, denoiser: Denoiser) -> Plan:
        """The plan with prior noise injection, which changes the sampler's state and not what the network says."""
        if self.inject == 0:
            return plan
        return injected(plan, denoiser.schedule, denoiser.prediction, self.inject, self.until)

    def _found(self, denoiser: Denoiser, cut: UNetSeam | TransformerSeam, ahead: SamplingContext) -> tuple[int, ...]:
        def run(x: Tensor, time: Tensor, cond: dict[str, Any], kept: Any) -> tuple[Any, Tensor]:
            entry, emb = cut.enter(x, time, cond)
            kept = cut.encode(entry, emb) if kept is None else kept
            return kept, cut.decode(kept, emb)

        return search("encoder_propagation", denoiser, ahead, self.budget, self.samples, self.seed, run)


class Propagated(Keyed):
    """A denoiser under `EncoderPropagation`, of the same signature, for one sequence of times."""

    def __init__(
        self,
        denoiser: Denoiser,
        times: Sequence[float],
        keys: tuple[int, ...],
        cut: UNetSeam | TransformerSeam,
        forecast: int = 0,
        parallel: int = 1,
    ) -> None:
        super().__init__(denoiser, "encoder_propagation", times, keys, forecast)
        self._cut, self.parallel = cut, parallel

    def reset(self) -> None:
        super().reset()
        self._ready: dict[int, Tensor] = {}  # raw outputs of queries to come

    def full(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        entry, emb = self._cut.enter(net_input, time, cond)
        self.keep(k, self._cut.encode(entry, emb))
        self.encoder_calls += 1
        self._ready.clear()
        return self._decoded(k, net_input, cond, emb)

    def partial(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        if k in self._ready:
            return self._ready.pop(k)
        return self._decoded(k, net_input, cond, None)

    def _decoded(self, k: int, net_input: Tensor, cond: dict[str, Any], emb: Any) -> Tensor:
        """The raw output at k; those of the queries after it that are decoded with it are put by."""
        end = next((key for key in self.keys if key > k), len(self.times))
        steps, rows = range(k, min(k + self.parallel, end)), len(net_input)
        if len(steps) > 1 or emb is None:
            told = tiled(cond, len(steps), rows)
            emb = self._cut.emb(net_input, self.clocks(steps, net_input), told)
        raw = self._cut.decode(self.recalled(steps), emb)
        self.decoder_calls += 1
        if len(steps) > 1:
            first, *later = raw.split(rows)
            self._ready = dict(zip(steps[1:], later))
            return first
        return raw
