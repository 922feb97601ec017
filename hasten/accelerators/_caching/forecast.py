"""How cached features are continued to later model evaluations: every way is a sum of earlier ones, with weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import BadInput
from ...schedules.base import Schedule

__all__ = ["EXTRAPOLATE", "Extrapolation", "angles", "chebyshev_weights", "combine_features", "resolve_extrapolate"]

EXTRAPOLATE = (0, 1, "chebyshev", "fitted")
HISTORY = {0: 1, 1: 2, "chebyshev": 5, "fitted": 4}  # how many key steps' features are cached
DEGREE, RIDGE = 4, 0.01  # of the Chebyshev series
Weights = list[list[float]]  # for every tensor of the features, or one list for all, one weight per cached key step


def resolve_extrapolate(who: str, extrapolate: int | str, forecast: int | None = None) -> int | str:
    """One of `EXTRAPOLATE`.

    Args:
        who: the accelerator, for messages.
        extrapolate: what was asked for; `"0"` and `"1"` are the numbers.
        forecast: the old name of the option; None: not given.

    Raises:
        BadInput: for another value.
    """
    if forecast is not None:
        warnings.warn(f"{who}: forecast= is now extrapolate=", DeprecationWarning, stacklevel=4)
        extrapolate = forecast
    for choice in EXTRAPOLATE:
        if str(extrapolate) == str(choice) and not isinstance(extrapolate, bool):
            return choice
    raise BadInput(
        f"{who}: extrapolate is 0 (features are reused), 1 (linearly extrapolated from the last two key steps), "
        f"chebyshev (by a polynomial through the last {HISTORY['chebyshev']}) or fitted (with weights fitted on a few "
        f"samples), found {extrapolate!r}"
    )


def angles(times: Sequence[float], schedule: Schedule) -> Tensor:
    """atan2(sigma, alpha) at these times, by which the input turns from data to noise: (N,) float64."""
    at = torch.tensor(tuple(times), dtype=torch.float64)
    return torch.atan2(schedule.sigma(at), schedule.alpha(at))


def linear_weights(nodes: Tensor, x: Tensor) -> Tensor:
    """Weights of the line through the values at the last two of `nodes`; of the last alone where these coincide."""
    weights = torch.zeros(len(nodes), dtype=torch.float64)
    weights[-1] = 1.0
    if len(nodes) > 1 and float(nodes[-1]) != float(nodes[-2]):
        r = (x - nodes[-1]) / (nodes[-1] - nodes[-2])
        weights[-1], weights[-2] = 1 + r, -r
    return weights


def chebyshev_weights(nodes: Tensor, x: Tensor, degree: int = DEGREE, ridge: float = RIDGE) -> Tensor:
    """Weights w with F(x) = sum_j w_j F(x_j) for the Chebyshev series that is fitted to the values at the nodes,

        F(x) = F(x_n) + sum_{m=1}^M c_m (T_m(x) - T_m(x_n)),    c = argmin sum_j |F(x_j) - fit_j|^2 + ridge |c - c'|^2

    which passes through the last value. c' are the coefficients of the line through the last two, so that straight
    lines are exact with any ridge, and all polynomials of degree M are with more than M nodes and none.

    Args:
        nodes: (n,) in [-1, 1], the newest last.
        x: (), where to continue to, in [-1, 1].
        degree: M; at most n - 1 terms are used.
        ridge: 0 or more.

    Returns:
        (n,) float64, with sum 1.

    References:
        Han, Shi, Li, Ye, Guo, Ermon 2026, arXiv:2603.01623, who shrink the coefficients to 0 and take the mean with
        the Taylor series.
    """
    line, n = linear_weights(nodes, x), len(nodes)
    terms = min(degree, n - 1)
    if terms < 2:
        return line if terms else torch.eye(n, dtype=torch.float64)[-1]
    T = _chebyshev(torch.cat([nodes, x.reshape(1)]), terms)
    design, ahead = T[:-2] - T[-2], T[-1] - T[-2]
    # of the residuals after the line through the last two nodes, in terms of the values minus the last value
    slope = (nodes[:-1] - nodes[-1]) / (nodes[-2] - nodes[-1]) if float(nodes[-2] - nodes[-1]) else nodes[:-1] * 0
    residual = torch.eye(n - 1, dtype=torch.float64)
    residual[:, -1] -= slope
    penalty = math.sqrt(ridge) * torch.eye(terms, dtype=torch.float64)
    right = torch.cat([residual, residual.new_zeros(terms, n - 1)])
    curved = ahead @ torch.linalg.lstsq(torch.cat([design, penalty]), right, driver="gelsd").solution
    weights = line.clone()
    weights[:-1] += curved
    weights[-1] -= curved.sum()
    return weights


def _chebyshev(x: Tensor, degree: int) -> Tensor:
    """T_1 .. T_M at x (n,): (n, M)."""
    columns = [torch.ones_like(x), x]
    while len(columns) <= degree:
        columns.append(2 * x * columns[-1] - columns[-2])
    return torch.stack(columns[1:], -1)


class Extrapolation:
    """Weights of the cached key steps' features at every model evaluation.

    Args:
        kind: one of `EXTRAPOLATE`.
        angles: (N,) of the model evaluations, see `angles`.
        fitted: of "fitted": the weights at evaluation k from key steps `nodes`, by (k, nodes). Where they are missing,
            as after a change of the conditions within a trajectory, features are linearly extrapolated.

    Attributes:
        history: how many key steps' features are cached.
    """

    def __init__(
        self, kind: int | str, angles: Tensor, fitted: Mapping[tuple[int, tuple[int, ...]], Weights] | None = None
    ) -> None:
        self.kind, self.angles, self.history = kind, angles, HISTORY[kind]
        span = float(angles.max() - angles.min()) or 1.0
        self._x = 2 * (angles - angles.min()) / span - 1
        self._weights: dict[tuple[int, tuple[int, ...]], Weights] = dict(fitted or {})

    def weights(self, k: int, nodes: tuple[int, ...]) -> Weights:
        """The weights at evaluation k.

        From the starting noise features do not change smoothly, so that evaluation 0 is used only while there is no
        other key step; fitted weights know by themselves.

        Args:
            k: number of the evaluation.
            nodes: numbers of the cached key steps, the newest last.
        """
        if (k, nodes) not in self._weights:
            later = tuple(i for i in nodes if i > 0) or nodes
            x, at = self._x[list(later)], self._x[k]
            if self.kind == 0 or len(later) == 1:
                row = torch.zeros(len(later), dtype=torch.float64)
                row[-1] = 1.0
            else:
                row = chebyshev_weights(x, at) if self.kind == "chebyshev" else linear_weights(x, at)
            self._weights[k, nodes] = [[0.0] * (len(nodes) - len(later)) + row.tolist()]
        return self._weights[k, nodes]


def combine_features(features: Sequence[Any], steps: Sequence[Weights]) -> Any:
    """Sums of features with these weights, concatenated along the batch.

    Args:
        features: of the cached key steps, the newest last: trees of tensors (B, ...) of one structure. What is not
            floating point is taken from the newest.
        steps: the weights at each of several model evaluations.
    """
    trees = [pytree.tree_flatten(one) for one in features]
    number, leaves = 0, []
    for values in zip(*(leaf for leaf, _ in trees)):
        newest = values[-1]
        if not isinstance(newest, Tensor):
            leaves.append(newest)
            continue
        rows = [weights[number] if len(weights) > 1 else weights[0] for weights in steps]
        number += 1
        parts = [_sum(values, row) if newest.is_floating_point() else newest for row in rows]
        leaves.append(parts[0] if len(parts) == 1 else torch.cat(parts) if newest.ndim else newest)
    return pytree.tree_unflatten(leaves, trees[-1][1])


def _sum(values: Sequence[Tensor], row: Sequence[float]) -> Tensor:
    """`sum_j row_j values_j`, in the differences from the newest value: in half precision these lose the least."""
    newest, total = values[-1], sum(row)
    result = newest if abs(total - 1) < 1e-12 else newest * total
    for value, weight in zip(values[:-1], row):
        if weight:
            result = torch.add(result, value - newest, alpha=weight)
    return result
