"""Fit the weights of cached features to a network, and search key steps with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...denoiser import Denoiser
from .forecast import Extrapolation, Weights, angles, combine_features
from .keys import cheapest_key_steps, check_key_steps, key_step_count
from .search import ErrorGains, Run, longest_group, recorded_evaluations, search_key_steps

if TYPE_CHECKING:
    from .. import SamplingContext

__all__ = ["FeatureRecord", "fit_weights", "improve_key_steps", "record_features", "resolve_reuse"]

ENTRIES = 1024  # of a sample's features that are recorded, of every tensor
PENALTY = 1e-6  # of the fitted weights, relative to the mean square of the features
MOVES = (-1, 1, -2, 2, -4, 4)  # of a key step in the search
ROUNDS = 20
MEASURED = 2  # how often the search is repeated with gains measured at its own key steps


def resolve_reuse(
    who: str,
    denoiser: Denoiser,
    context: SamplingContext,
    keys: Sequence[int] | None,
    extrapolate: int | str,
    run: Run,
    *,
    budget: float,
    samples: int,
    seed: int,
) -> tuple[tuple[int, ...], Extrapolation]:
    """The key steps, and how features are continued between them.

    Args:
        who: the accelerator, for messages.
        denoiser: without acceleration.
        context: of the sampling.
        keys: the key steps; None: they are searched.
        extrapolate: one of `EXTRAPOLATE`.
        run: see `search_key_steps`.
        budget: of the search: how many key steps, see `key_step_count`.
        samples: how many images are sampled for the search and the fit.
        seed: of the first of them.

    Raises:
        BadInput: for invalid key steps, and where samples are needed and nothing can be sampled.
    """
    times = context.required(who)
    N, at = len(times), angles(times, denoiser.schedule)
    if keys is not None:
        keys = check_key_steps(keys, N, who)
    if keys is not None and extrapolate != "fitted":
        return keys, Extrapolation(extrapolate, at)
    if keys is None and extrapolate == 0:
        keys = search_key_steps(who, denoiser, context, budget, samples, seed, run)
        return check_key_steps(keys, N, who), Extrapolation(0, at)
    check_key_steps(range(N), N, who)
    count = 0 if keys is not None else key_step_count(budget, N)
    record = record_features(who, denoiser, context, samples, seed, run)
    forecast = _Forecast(record, Extrapolation(extrapolate, at))
    if keys is None:
        start = cheapest_key_steps(_reuse_costs(forecast, count), count)
        keys = improve_key_steps(start, N, forecast.cost)
        for _ in range(MEASURED):
            forecast = forecast.measured(keys)
            keys = improve_key_steps(keys, N, forecast.cost)
        keys = check_key_steps(keys, N, who)
    return keys, fit_weights(record, keys, at) if extrapolate == "fitted" else forecast.extrapolation


class FeatureRecord:
    """What a search or a fit needs of the features of plain trajectories.

    Args:
        grams: (L, N, N) float64, for each of L tensors of the features the products <F_i, F_j> of its values at the N
            model evaluations, relative to their mean square.
        gains: (N,), for each evaluation how much an error of its features changes the final samples: mean squared
            error per relative squared error of the features, summed over the tensors.
        measure: `measure(keys, extrapolation)`, the mean squared errors (N,) of the final samples by the features of
            each evaluation; 0 at the key steps.
    """

    def __init__(
        self, grams: Tensor, gains: Tensor, measure: Callable[[Sequence[int], Extrapolation], Tensor] | None = None
    ) -> None:
        self.grams, self.gains, self.measure = grams, gains, measure

    def errors(self, weights: Tensor, k: int, nodes: Sequence[int]) -> Tensor:
        """The relative squared errors (L,) of `sum_j w_j F_j` at evaluation k.

        Args:
            weights: (L, n) or (1, n).
            k: number of the evaluation.
            nodes: the n key steps j.
        """
        G, at = self._products(k, nodes)
        norm = self.grams[:, k, k]
        square = torch.einsum("li,lij,lj->l", weights.expand(len(G), -1), G, weights.expand(len(G), -1))
        return ((square - 2 * (weights * at).sum(1) + norm) / norm.clamp_min(1e-30)).clamp_min(0)

    def _products(self, k: int, nodes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The products (L, n, n) of the features of key steps `nodes`, and (L, n) with those of evaluation k."""
        at = list(nodes)
        return self.grams[:, at][:, :, at], self.grams[:, at, k]

    def fit(self, k: int, nodes: Sequence[int]) -> Tensor:
        """Weights (L, n) of the features of key steps `nodes` at evaluation k, by least squares for each tensor."""
        G, at = self._products(k, nodes)
        last = torch.zeros(len(nodes), dtype=torch.float64)
        last[-1] = 1.0  # what the ridge keeps near to: reuse
        ridge = PENALTY * G.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None] * torch.eye(len(nodes))
        return last + torch.linalg.solve(G + ridge, (at - G[:, :, -1])[..., None])[..., 0]


@torch.no_grad()
def record_features(
    who: str, denoiser: Denoiser, context: SamplingContext, samples: int, seed: int, run: Run
) -> FeatureRecord:
    """Record features of plain trajectories: N evaluations and N reuses of the step before, `samples` images each.

    Of every tensor `ENTRIES` entries of each sample are stored, the same at all evaluations.

    Args:
        who: the accelerator, for messages.
        denoiser: without acceleration.
        context: of the sampling.
        samples: how many images.
        seed: of the first of them.
        run: see `search_key_steps`.

    Raises:
        BadInput: where nothing can be sampled, and for too few model evaluations.
    """
    times = context.required(who)
    N, evaluate = len(times), recorded_evaluations(who, denoiser, context, samples, seed, run)
    generator = torch.Generator().manual_seed(0)
    rows: list[list[Tensor]] = []
    chosen: list[Tensor] = []
    exact: list[Tensor] = []
    changes: list[Tensor] = []
    before = None
    for j in range(N):
        features, x0 = evaluate(j)
        exact.append(x0)
        changes.append(x0 - x0 if before is None else evaluate(j, before)[1] - x0)
        before, leaves = features, _feature_tensors(features)
        if not chosen:
            chosen = [torch.randperm(leaf[0].numel(), generator=generator)[:ENTRIES] for leaf in leaves]
        rows.append([leaf.flatten(1)[:, kept.to(leaf.device)].cpu() for leaf, kept in zip(leaves, chosen, strict=True)])
    weigh = ErrorGains(exact[-1], times, denoiser.schedule)

    def final(error: Tensor, j: int) -> Tensor:
        return weigh(error.flatten(1), j).square().mean().cpu().double()

    def measure(keys: Sequence[int], extrapolation: Extrapolation) -> Tensor:
        cache: list[tuple[int, Any]] = []
        errors = torch.zeros(N, dtype=torch.float64)
        for j in range(N):
            if j in keys:
                cache = [*cache, (j, evaluate(j)[0])][-extrapolation.history :]
                continue
            weights = extrapolation.weights(j, tuple(k for k, _ in cache))
            errors[j] = final(evaluate(j, combine_features([f for _, f in cache], [weights]))[1] - exact[j], j)
        return errors

    grams = torch.stack([_gram(torch.stack([row[number] for row in rows])) for number in range(len(chosen))])
    record = FeatureRecord(grams, torch.ones(N, dtype=torch.float64), measure)
    one = torch.ones(1, 1, dtype=torch.float64)
    relative = torch.stack([record.errors(one, j, [max(j - 1, 0)]).sum() for j in range(N)])
    record.gains = torch.stack([final(change, j) for j, change in enumerate(changes)]) / relative.clamp_min(1e-12)
    return record


def _feature_tensors(features: Any) -> list[Tensor]:
    """The tensors of features, with a batch, in the order of `combine_features`."""
    leaves = [leaf for leaf in pytree.tree_leaves(features) if isinstance(leaf, Tensor)]
    return [leaf.reshape(len(leaf), -1).float() if leaf.ndim > 1 else leaf.float().reshape(-1, 1) for leaf in leaves]


def _gram(values: Tensor) -> Tensor:
    """The products (N, N) of features (N, B, n), relative to their mean square."""
    flat = values.flatten(1).double()
    gram = flat @ flat.T
    return gram / gram.diagonal().mean().clamp_min(1e-30)


def fit_weights(record: FeatureRecord, keys: Sequence[int], at: Tensor) -> Extrapolation:
    """Weights of the last four key steps' features at every other evaluation k, by least squares,

        w_k = argmin sum over samples and entries of |F_k - sum_j w_kj F_j|^2,

    for every tensor of the features by itself.

    Args:
        record: of plain trajectories.
        keys: the key steps.
        at: the angles of the model evaluations.

    References:
        Shen, Huang, Liu, Zou, Cai, Zheng, Lin, Zhang 2026, arXiv:2604.26365, who train the weights on the trajectories
        by gradient descent; the closed form for each tensor is hasten's.
    """
    table: dict[tuple[int, tuple[int, ...]], Weights] = {}
    history = Extrapolation("fitted", at).history
    for k in range(len(at)):
        nodes = tuple(key for key in keys if key <= k)[-history:]
        if nodes[-1] != k:
            table[k, nodes] = record.fit(k, nodes).tolist()
    return Extrapolation("fitted", at, table)


class _Forecast:
    """The cost of key steps: errors of the features, as `record` weighs them, continued by `extrapolation`."""

    def __init__(self, record: FeatureRecord, extrapolation: Extrapolation) -> None:
        self.record, self.extrapolation = record, extrapolation
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}

    def error(self, k: int, nodes: tuple[int, ...]) -> float:
        """The root mean squared error that evaluation k adds to the final samples."""
        if (k, nodes) not in self._known:
            if self.extrapolation.kind == "fitted":
                weights = self.record.fit(k, nodes)
            else:
                weights = torch.tensor(self.extrapolation.weights(k, nodes), dtype=torch.float64)
            square = self.record.gains[k] * self.record.errors(weights, k, nodes).sum()
            self._known[k, nodes] = math.sqrt(float(square))
        return self._known[k, nodes]

    def measured(self, keys: Sequence[int]) -> _Forecast:
        """The same with gains measured at the errors that these key steps leave, where the record can do that.

        Errors of a forecast are not those of the reuse from which the gains were measured at first.
        """
        record, N = self.record, len(self.record.gains)
        if record.measure is None:
            return self
        fitted = self.extrapolation.kind == "fitted"
        used = fit_weights(record, keys, self.extrapolation.angles) if fitted else self.extrapolation
        errors, ratios = record.measure(keys, used), torch.full((N,), math.nan, dtype=torch.float64)
        for k in range(N):
            nodes = tuple(key for key in keys if key <= k)[-used.history :]
            if k not in keys:
                ratios[k] = errors[k] / max(self.error(k, nodes) ** 2, 1e-30)
        for k in sorted(keys, reverse=True):  # where nothing was measured: as at the evaluation after, or before
            near = [ratios[j] for j in (*range(k + 1, N), *range(k - 1, -1, -1)) if not math.isnan(float(ratios[j]))]
            ratios[k] = near[0] if near else 1.0
        return _Forecast(FeatureRecord(record.grams, record.gains * ratios, record.measure), self.extrapolation)

    def cost(self, keys: Sequence[int]) -> float:
        """The sum over groups of the square of the sum of their errors: within a group these point the same way."""
        total, N = 0.0, len(self.record.gains)
        for number, (first, end) in enumerate(zip(keys, (*keys[1:], N))):
            if 2 * (end - first) > N:
                return math.inf
            nodes = tuple(keys[: number + 1])[-self.extrapolation.history :]
            total += sum(self.error(k, nodes) for k in range(first + 1, end)) ** 2
        return total


def _reuse_costs(forecast: _Forecast, count: int) -> Tensor:
    """The cost of each group with its own key step's features alone, as `cheapest_key_steps` takes it."""
    N = len(forecast.record.gains)
    cost = torch.full((N, N + 1), math.inf, dtype=torch.float64)
    longest = longest_group(count, N)
    for i in range(N):
        total = 0.0
        for end in range(i + 1, min(i + longest, N) + 1):
            total += forecast.error(end - 1, (i,)) if end > i + 1 else 0.0
            cost[i, end] = total**2
    return cost


def improve_key_steps(start: Sequence[int], queries: int, cost: Callable[[Sequence[int]], float]) -> tuple[int, ...]:
    """Key steps of lower cost: one after the other is moved as long as that helps.

    Args:
        start: the key steps to begin with; the first, 0, stays.
        queries: the number of model evaluations.
        cost: of sorted key steps.
    """
    keys = tuple(start)
    best = cost(keys)
    for _ in range(ROUNDS):
        before = best
        for number in range(1, len(keys)):
            others = {*keys[:number], *keys[number + 1 :]}
            moved = [keys[number] + move for move in MOVES if 0 < keys[number] + move < queries]
            for candidate in [tuple(sorted({*others, key})) for key in moved if key not in others]:
                if (found := cost(candidate)) < best:
                    keys, best = candidate, found
        if best >= before:
            break
    return keys
