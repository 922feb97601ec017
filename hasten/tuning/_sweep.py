"""Fit a plan without gradients of the network: least squares row by row, and a pattern search of the times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..plan.branches import branch_evaluator
from ..utils.devices import as_float64
from ._reference import FineTrajectories
from ._rows import PlanCoefficients, PlanParametrization, coordinate, time_at

__all__ = ["pattern_search", "fit_rows"]


def fit_rows(
    rows: PlanParametrization,
    n: PlanCoefficients,
    fine: FineTrajectories,
    samples: slice,
    denoiser: Any,
    batch: int,
    ridge: float,
) -> tuple[PlanCoefficients, Tensor]:
    """Fit D by least squares, one row after the other, so that each next state is closest to the fine trajectories.

    Row k: with the model outputs x0_j (j <= k) of the plan with the rows before it, least squares of

        a_k x_k + b_k x0_k + sum_{j<k} D[k, j] (x0_j - x0_k)   against   x(s_{k+1}),

    the fine state of the same noise; a row so corrects errors of earlier rows.

    Args:
        rows: the parametrisation.
        n: the coefficients.
        fine: the fine trajectories.
        samples: of the fine trajectories.
        denoiser: the model.
        batch: samples per model evaluation.
        ridge: weight of the distance from the base's D, relative to the mean square of its factors.

    Returns:
        n with this D, and the plan's results (B, *S) for the samples.
    """
    plan, (_, b) = rows.compose(n), rows.steps(n.level)
    start, end, cond = fine.select(samples)
    evaluate, basis, D = branch_evaluator(denoiser, plan), rows.basis, rows.base.clone()
    into: Callable[[Tensor], Tensor] = _unchanged if basis is None else basis.coordinates
    back: Callable[[Tensor], Tensor] = _unchanged if basis is None else basis.pixels
    groups: list[Any] = [...] if basis is None else [basis.index == g for g in range(basis.groups)]
    x = into(start * float(plan.start.flatten()[0]))
    outputs: list[Tensor] = []
    for k in range(rows.K):
        state = back(x)
        batches = [
            evaluate(k, state[i : i + batch], n.query[k], {c: v[i : i + batch] for c, v in cond.items()})
            for i in range(0, len(x), batch)
        ]
        outputs.append(into(torch.cat(batches).to(x.dtype)))
        free = rows.free[k].nonzero().flatten().tolist()
        a = float(plan.a[k].flatten()[0])
        if free:
            target = into(end if k + 1 == rows.K else fine.at(n.level[k + 1], samples))
            residual = target - a * x - b[k] * outputs[k]
            off = torch.stack([outputs[j] - outputs[k] for j in free])
            for g, where in enumerate(groups):
                of_group, left = (off, residual) if where is ... else (off[..., where], residual[..., where])
                at = D[k] if where is ... else D[k, :, g]
                at[free] = _ridge(as_float64(of_group.flatten(1)), as_float64(left.flatten()), at[free], ridge)
        combined = a * x + b[k] * outputs[k]
        for j in free:
            number = D[k, j] if basis is None else basis.spread(D[k, j], x)
            combined = combined + number * (outputs[j] - outputs[k])
        x = combined
    return n._replace(D=D), back(x)


def _ridge(off: Tensor, residual: Tensor, before: Tensor, ridge: float) -> Tensor:
    """The weights (m,) of m rows (m, N) closest to the residual (N,), with a penalty of the distance from `before`."""
    gram, right = (off @ off.T).cpu(), (off @ residual).cpu()
    penalty = (ridge * gram.diagonal().mean() + 1e-30) * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + penalty, right + penalty @ before)


def _unchanged(x: Tensor) -> Tensor:
    """The samples themselves, as coordinates where there is no basis."""
    return x


def pattern_search(
    rows: PlanParametrization,
    n: PlanCoefficients,
    value: Callable[[PlanCoefficients], tuple[PlanCoefficients, float]],
    rounds: int,
    callback: Callable[[int, PlanCoefficients], bool],
    step: float = 0.3,
) -> None:
    """Pattern search of the times: each in turn is moved up and down; if nothing helps, the moves are halved.

    Moves are in `coordinate`; the time passed to the network moves together with the level of its state.

    Args:
        rows: the parametrisation.
        n: the coefficients to start from.
        value: `value(coefficients) -> (coefficients with D fitted, loss)`.
        rounds: at most.
        callback: called as `callback(rounds done, best coefficients)`; True ends the search.
        step: size of the first moves.
    """
    n, best = value(n)
    for done in range(rounds):
        improved = False
        for k in range(0 if rows.teleport else 1, rows.K):
            for move in (step, -step):
                candidate, loss = value(_moved(rows, n, k, move))
                if loss < best:
                    n, best, improved = candidate, loss, True
                    break
        if callback(done + 1, n):
            return
        if not improved:
            step /= 2


def _moved(rows: PlanParametrization, n: PlanCoefficients, k: int, move: float) -> PlanCoefficients:
    """The coefficients with time k, and from the second on its level, moved by `move`."""
    query, level = n.query.clone(), n.level.clone()
    for times in (query, level)[: 1 if k == 0 else 2]:
        u = coordinate(rows.schedule, times[k]) + move
        times[k] = time_at(rows.schedule, u.clamp(rows.lowest, rows.highest))
    return n._replace(query=query, level=level)
