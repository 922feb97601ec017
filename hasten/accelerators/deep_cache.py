"""DeepCache: between key queries only the finest level of the U-Net is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput
from . import FIRST_SEED, WRAP, SamplingContext
from ._caching.keys import FEWEST, checked, named
from ._caching.seams import has
from ._caching.search import search
from ._caching.wrapper import Keyed, inner

__all__ = ["Cached", "DeepCache"]

CHOICES = ("uniform", "around", "found")
SHALLOW = ("embed", "shallow_encode", "deep", "shallow_decode")


@dataclass(frozen=True)
class DeepCache:
    """What the deep part of a U-Net gives changes little from query to query, so it is kept.

        every query:    first = shallow_encode(x_t, emb);  raw = shallow_decode(first, up_input, emb)
        a key query:    up_input = deep(first, emb), kept

    with the embedding of the query's own time and conditions, and x0 = c_skip x_t + c_out raw. Unlike encoder
    propagation, every query sees its own x_t, through the first skips.

    Args:
        every: one query in `every` is a key ("uniform"; of the others, this many keys).
        keys: "uniform"; "around": dense around query `center` (the paper's non-uniform form, see `around`); "found": by
            a search on this model, see `EncoderPropagation`; or the numbers of the key queries, from 0.
        center, power: of "around".
        budget: of "found": how many keys, or below 1 which share of the queries; None: as many as "uniform".
        branch: how many blocks of the finest level are run at every query, 0 (cheapest; the paper's) to all of them;
            None: all, or what a foreign network has.
        forecast: 0: what is kept is held; 1: it is drawn on along the line through the last two keys.
        samples, seed: of the search: how many images, and the first one's seed.

    Reference: Ma, Fang, Wang 2023, arXiv:2312.00858.
    """

    every: int = 5
    keys: str | tuple[int, ...] = "uniform"
    center: int = 0
    power: float = 1.4
    budget: float | None = None
    branch: int | None = None
    forecast: int = 0
    samples: int = 8
    seed: int = FIRST_SEED
    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset({"features"})
    least_queries: ClassVar[int] = FEWEST

    def __post_init__(self) -> None:
        if self.forecast not in (0, 1):
            raise BadInput(f"deep_cache: forecast is 0 (hold) or 1 (a line), found {self.forecast}")
        if self.every < 1 or self.samples < 1:
            raise BadInput(f"deep_cache: every and samples are 1 or more, found {self.every} and {self.samples}")

    def apply(self, denoiser: nn.Module, ahead: SamplingContext) -> nn.Module:
        """The denoiser that keeps the deep part, for the sampling ahead.

        Raises:
            BadInput: for a network without a shallow part, for 8 queries or fewer, where more than half of them would
                hang on one key, and for a sampler whose times are not known in advance.
        """
        who = "deep_cache"
        plain, times = inner(denoiser, who), ahead.required(who)
        cut = Cut(plain.net, self.branch)
        N = len(times)
        keys = named(self.keys, N, CHOICES, self.every, center=self.center, power=self.power)
        if keys is None:
            keys = self._found(plain, cut, ahead)
        return Cached(plain, times, checked(keys, N, who), cut, self.forecast)

    def _found(self, denoiser: Denoiser, cut: Cut, ahead: SamplingContext) -> tuple[int, ...]:
        def run(x: Tensor, time: Tensor, cond: dict[str, Any], kept: Any) -> tuple[Any, Tensor]:
            first, emb = cut.enter(x, time, cond)
            kept = cut.net.deep(first, emb) if kept is None else kept
            return kept, cut.net.shallow_decode(first, kept, emb)

        budget = 1 / self.every if self.budget is None else self.budget
        return search("deep_cache", denoiser, ahead, budget, self.samples, self.seed, run)


class Cut:
    """The shallow part of a network and the branch at which it is cut.

    Raises:
        BadInput: for a network that has none.
    """

    def __init__(self, net: nn.Module, branch: int | None) -> None:
        if not has(net, *SHALLOW):
            raise BadInput(
                f"deep_cache: {type(net).__name__} has no shallow part: what works is a U-Net with "
                f"{', '.join(SHALLOW[:-1])} and {SHALLOW[-1]}, or encoder_propagation"
            )
        most = getattr(net, "branches", None)
        if branch is not None and not (isinstance(most, int) and 0 <= branch <= most):
            fits = "none for this network" if most is None else f"0 to {most}"
            raise BadInput(f"deep_cache: branch must be {fits}, found {branch}")
        self.net: Any = net
        self.told = {} if branch is None else {"branch": branch}

    def enter(self, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> tuple[Any, Any]:
        """The first skips and the embedding."""
        emb = self.net.embed(time, **cond)
        return self.net.shallow_encode(net_input, emb, **self.told), emb


class Cached(Keyed):
    """A denoiser under `DeepCache`, of the same signature, for one sequence of times."""

    def __init__(
        self, denoiser: Denoiser, times: Sequence[float], keys: tuple[int, ...], cut: Cut, forecast: int = 0
    ) -> None:
        super().__init__(denoiser, "deep_cache", times, keys, forecast)
        self._cut = cut

    def full(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        first, emb = self._cut.enter(net_input, time, cond)
        up_input = self._cut.net.deep(first, emb)
        self.encoder_calls += 1
        self.keep(k, up_input)
        return self._left(first, up_input, emb)

    def partial(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        first, emb = self._cut.enter(net_input, time, cond)
        return self._left(first, self.recalled((k,)), emb)

    def _left(self, first: Any, up_input: Any, emb: Any) -> Tensor:
        self.decoder_calls += 1
        return self._cut.net.shallow_decode(first, up_input, emb)
