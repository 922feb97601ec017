"""Fitting a plan without gradients of the network: least squares row by row, and a pattern search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._reference import FineTrajectories
from ._rows import PlanCoefficients, PlanParametrization, coordinate, time_at

__all__ = ["pattern_search", "fit_rows"]


def fit_rows(
    rows: PlanParametrization,
    n: PlanCoefficients,
    fine: FineTrajectories,
    part: slice,
    denoiser: Any,
    batch: int,
    ridge: float,
) -> tuple[PlanCoefficients, Tensor]:
    """The D that brings each next state closest to the fine trajectories, one row after the other; the results.

    Row k: with the answers x0_j (j <= k) that the plan with the rows before it gets, least squares of

        a_k x_k + b_k x0_k + sum_{j<k} D[k, j] (x0_j - x0_k)   against   x(s_{k+1}),

    the fine state of the same noise: what earlier rows did wrong is made good where it can be.

    Args:
        part: of the fine trajectories. batch: samples in the network at once.
        ridge: weight of the distance from the base's D, relative to the mean square of what they multiply.

    Returns:
        n with this D, and the plan's results for the samples of `part` (B, *S).
    """
    plan, (_, b) = rows.compose(n), rows.steps(n.level)
    start, end, cond = fine.rows(part)
    x, D = start * plan.start[0], rows.base.clone()
    answers: list[Tensor] = []
    for k in range(rows.K):
        pieces = [
            denoiser(x[i : i + batch], n.query[k], **{c: v[i : i + batch] for c, v in cond.items()})
            for i in range(0, len(x), batch)
        ]
        answers.append(torch.cat(pieces).to(x.dtype))
        free = rows.free[k].nonzero().flatten().tolist()
        if free:
            aim = end if k + 1 == rows.K else fine.at(n.level[k + 1], part)
            left = (aim - plan.a[k] * x - b[k] * answers[k]).flatten().double()
            off = torch.stack([(answers[j] - answers[k]).flatten().double() for j in free])
            gram, right = (off @ off.T).cpu(), (off @ left).cpu()
            penalty = (ridge * gram.diagonal().mean() + 1e-30) * torch.eye(len(free), dtype=torch.float64)
            D[k, free] = torch.linalg.solve(gram + penalty, right + penalty @ D[k, free])
        x = plan.a[k] * x + (b[k] - D[k].sum()) * answers[k]
        for j in free:
            x = x + D[k, j] * answers[j]
    return n._replace(D=D), x


def pattern_search(
    rows: PlanParametrization,
    n: PlanCoefficients,
    value: Callable[[PlanCoefficients], tuple[PlanCoefficients, float]],
    rounds: int,
    watch: Callable[[int, PlanCoefficients], bool],
    step: float = 0.3,
) -> None:
    """Times by a pattern search: each in turn is moved up and down; where nothing helps, the moves are halved.

    Moves are in the coordinate of `Rows`; a query moves together with the level that it belongs to.

    value: `value(numbers) -> (numbers with D fitted, loss)`. watch: told the best after each round; True
    ends the search.
    """
    n, best = value(n)
    for done in range(rounds):
        improved = False
        for k in range(0 if rows.teleport else 1, rows.K):
            for move in (step, -step):
                there, loss = value(_moved(rows, n, k, move))
                if loss < best:
                    n, best, improved = there, loss, True
                    break
        if watch(done + 1, n):
            return
        if not improved:
            step /= 2


def _moved(rows: PlanParametrization, n: PlanCoefficients, k: int, move: float) -> PlanCoefficients:
    """Query k, and from the second on its level, elsewhere."""
    query, level = n.query.clone(), n.level.clone()
    for times in (query, level)[: 1 if k == 0 else 2]:
        u = coordinate(rows.schedule, times[k]) + move
        times[k] = time_at(rows.schedule, u.clamp(rows.lowest, rows.highest))
    return n._replace(query=query, level=level)
