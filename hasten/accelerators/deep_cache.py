"""DeepCache: between key steps only the finest level of the U-Net runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import BadInput
from . import FIRST_SEED, WRAP, Accelerator, SamplingContext
from ._caching.fit import resolve_reuse
from ._caching.forecast import Extrapolation, resolve_extrapolate
from ._caching.keys import MIN_QUERIES, resolve_key_steps
from ._caching.split import has_attributes
from ._caching.wrapper import FeatureReuse, require_denoiser

__all__ = ["Cached", "DeepCache"]

CHOICES = ("uniform", "around", "found")
SHALLOW = ("embed", "shallow_encode", "deep", "shallow_decode")


@dataclass(frozen=True)
class DeepCache(Accelerator):
    """The output of the deep part of a U-Net changes little from one model evaluation to the next, so it is reused.

        every evaluation:    first = shallow_encode(x_t, emb);  raw = shallow_decode(first, up_input, emb)
        a key step:          up_input = deep(first, emb), cached

    with the embedding of the evaluation's own time and conditions, and x0 = c_skip x_t + c_out raw. Unlike encoder
    propagation, every evaluation reads its own x_t, through the first skips.

    Args:
        every: one evaluation in `every` is a key step ("uniform"; the other patterns have as many key steps).
        keys: the key steps. "uniform"; "around": dense around evaluation `center` (the paper's non-uniform form, see
            `key_steps_around`); "found": by a search on this model, see `EncoderPropagation`; or their numbers, from 0.
        center: of "around".
        power: of "around".
        budget: of "found": how many key steps, or below 1 which fraction of the evaluations; None: as many as
            "uniform".
        branch: how many blocks of the finest level's encoder run at every evaluation, 0 (cheapest; the paper's) to all
            of them, and one more of its decoder; None: all. On a U-Net of Stable Diffusion 1's size an evaluation
            between key steps costs 8 % of a full one with 0, and 38 % with all.
        extrapolate: how features are continued. 0: reused; 1: linearly extrapolated from the last two key steps;
            "chebyshev": by a ridge-fitted Chebyshev series through the last five (see `chebyshev_weights`); "fitted":
            as sums of the last four, with weights fitted on `samples` images (see `fit_weights`). Costs nothing but the
            memory of as many key steps' features, and of "fitted" a calibration.
        samples: of the search: how many images.
        seed: of the first of them.
        forecast: the old name of `extrapolate`.

    References:
        Ma, Fang, Wang 2023, arXiv:2312.00858.
    """

    every: int = 5
    keys: str | tuple[int, ...] = "uniform"
    center: int = 0
    power: float = 1.4
    budget: float | None = None
    branch: int | None = None
    extrapolate: int | str = 0
    samples: int = 8
    seed: int = FIRST_SEED
    forecast: int | None = None
    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset({"features"})
    min_queries: ClassVar[int] = MIN_QUERIES

    def __post_init__(self) -> None:
        object.__setattr__(self, "extrapolate", resolve_extrapolate("deep_cache", self.extrapolate, self.forecast))
        object.__setattr__(self, "forecast", None)
        if self.every < 1 or self.samples < 1:
            raise BadInput(f"deep_cache: every and samples are 1 or more, found {self.every} and {self.samples}")

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        """The denoiser that reuses deep features, for one sampling.

        Raises:
            BadInput: for a network without a shallow part, for 8 model evaluations or fewer, where more than half of
                them would depend on one key step, and for a sampler whose times are not known in advance.
        """
        who = "deep_cache"
        plain, times = require_denoiser(denoiser, who), context.required(who)
        split = ShallowSplit(plain.net, self.branch)
        N = len(times)
        keys = resolve_key_steps(self.keys, N, CHOICES, self.every, self.center, self.power)
        return Cached(plain, times, *self._calibrate(plain, split, context, keys))

    def _calibrate(
        self, denoiser: Denoiser, split: ShallowSplit, context: SamplingContext, keys: tuple[int, ...] | None
    ) -> tuple[tuple[int, ...], ShallowSplit, Extrapolation]:
        """The key steps, those of "found" too, the split and how features are continued."""

        def run(x: Tensor, time: Tensor, cond: dict[str, Any], features: Any) -> tuple[Any, Tensor]:
            first, emb = split.enter(x, time, cond)
            features = split.net.deep(first, emb) if features is None else features
            return features, split.net.shallow_decode(first, features, emb)

        budget = 1 / self.every if self.budget is None else self.budget
        options: dict[str, Any] = {"budget": budget, "samples": self.samples, "seed": self.seed}
        found, forecast = resolve_reuse("deep_cache", denoiser, context, keys, self.extrapolate, run, **options)
        return found, split, forecast


class ShallowSplit:
    """A U-Net split into its shallow and its deep part.

    Args:
        net: with `embed`, `shallow_encode`, `deep` and `shallow_decode`.
        branch: see `DeepCache`.

    Raises:
        BadInput: for a network without a shallow part, and for a branch that it does not have.
    """

    def __init__(self, net: nn.Module, branch: int | None) -> None:
        if not has_attributes(net, *SHALLOW):
            raise BadInput(
                f"deep_cache: {type(net).__name__} has no shallow part: supported is a U-Net with "
                f"{', '.join(SHALLOW[:-1])} and {SHALLOW[-1]}; or use encoder_propagation"
            )
        maximum = getattr(net, "branches", None)
        if branch is not None and not (isinstance(maximum, int) and 0 <= branch <= maximum):
            fits = "none for this network" if maximum is None else f"0 to {maximum}"
            raise BadInput(f"deep_cache: branch must be {fits}, found {branch}")
        self.net: Any = net
        self.options = {} if branch is None else {"branch": branch}

    def enter(self, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> tuple[Any, Any]:
        """The first skips and the embedding."""
        emb = self.net.embed(time, **cond)
        return self.net.shallow_encode(net_input, emb, **self.options), emb


class Cached(FeatureReuse):
    """A denoiser under `DeepCache`, of the same signature, for one sequence of times."""

    def __init__(
        self,
        denoiser: Denoiser,
        times: Sequence[float],
        keys: tuple[int, ...],
        split: ShallowSplit,
        extrapolation: Extrapolation | None = None,
    ) -> None:
        super().__init__(denoiser, "deep_cache", times, keys, extrapolation)
        self._split = split

    def full(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """The raw output at key step k."""
        first, emb = self._split.enter(net_input, time, cond)
        up_input = self._split.net.deep(first, emb)
        self.encoder_calls += 1
        self.store(k, up_input)
        return self._decode(first, up_input, emb)

    def partial(self, k: int, net_input: Tensor, time: Tensor, cond: dict[str, Any]) -> Tensor:
        """The raw output at evaluation k, from cached features."""
        first, emb = self._split.enter(net_input, time, cond)
        return self._decode(first, self.features_at((k,)), emb)

    def _decode(self, first: Any, up_input: Any, emb: Any) -> Tensor:
        """The raw output, from the first skips and the deep part."""
        self.decoder_calls += 1
        return self._split.net.shallow_decode(first, up_input, emb)
