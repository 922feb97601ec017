"""Which model evaluations are key steps: those that run the whole network, whose features the ones after them reuse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import BadInput, check_choice

__all__ = [
    "MIN_QUERIES",
    "PAPER",
    "cheapest_key_steps",
    "check_key_steps",
    "key_step_count",
    "key_steps_around",
    "paper_key_steps",
    "resolve_key_steps",
    "uniform_key_steps",
]

PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)  # of 50, Li et al. 2023, arXiv:2312.09608
MIN_QUERIES = 9  # model evaluations: with fewer there is nothing to reuse


def paper_key_steps(queries: int) -> tuple[int, ...]:
    """The key steps of Faster Diffusion, {0, 1, 2, 3, 5, 10, 15, 25, 35} of 50, in proportion: round(i queries / 50).

    Args:
        queries: the number of model evaluations.
    """
    return tuple(sorted({math.floor(key * queries / 50 + 0.5) for key in PAPER}))


def uniform_key_steps(queries: int, every: int) -> tuple[int, ...]:
    """0, every, 2 every, ...

    Args:
        queries: the number of model evaluations.
        every: 1 or more.

    Raises:
        BadInput: for `every` below 1.
    """
    if every < 1:
        raise BadInput(f"every must be 1 or more, found {every}")
    return tuple(range(0, queries, every))


def key_steps_around(queries: int, count: int, center: int, power: float) -> tuple[int, ...]:
    """`count` key steps, dense around evaluation `center`: 0 and the integer parts of

        center + sign(l) |l|^power,    l evenly spaced from -center^(1/power) to (queries - center)^(1/power).

    Where some coincide and fewer than `count` are left, the power is lowered towards 1 until they do not.

    Args:
        queries: the number of model evaluations.
        count: of key steps, 1 to `queries`.
        center: 0 to `queries` - 1.
        power: 1 or more; 1.2 to 1.4 in the paper.

    Raises:
        BadInput: for arguments outside these ranges.

    References:
        Ma et al. 2023, arXiv:2312.00858.
    """
    if not (0 <= center < queries and power >= 1 and 1 <= count <= queries):
        raise BadInput(
            f"key steps around a center need a center from 0 to {queries - 1}, power >= 1 and 1 to {queries} keys, "
            f"found {center}, {power:g} and {count}"
        )
    while True:
        low, high = -(center ** (1 / power)), (queries - center) ** (1 / power)
        line = torch.linspace(low, high, count + 1, dtype=torch.float64)
        positions = center + line.sign() * line.abs() ** power
        steps = sorted({0, *(min(max(math.floor(p + 1e-9), 0), queries - 1) for p in positions[:-1].tolist())})
        if len(steps) >= count or power == 1:
            return tuple(steps)
        power = max(1.0, power - 0.02)


def key_step_count(budget: float, queries: int) -> int:
    """The number of key steps that a budget allows.

    Args:
        budget: a number of key steps from 1, or a fraction of the model evaluations below 1.
        queries: the number of model evaluations.

    Raises:
        BadInput: for a budget that is neither.
    """
    count = round(budget * queries) if 0 < budget < 1 else int(budget)
    if not 1 <= count <= queries or (budget >= 1 and count != budget):
        raise BadInput(f"budget must be a fraction below 1 or a number of key steps up to {queries}, found {budget:g}")
    return count


def check_key_steps(keys: Sequence[int], queries: int, who: str) -> tuple[int, ...]:
    """The key steps, sorted.

    Args:
        keys: numbers of model evaluations, from 0.
        queries: the number of model evaluations.
        who: the accelerator, for messages.

    Raises:
        BadInput: for 8 evaluations or fewer, where more than half of them would depend on one key step, for numbers
            that are no evaluations, and where the first is not a key step.
    """
    if queries < MIN_QUERIES:
        raise BadInput(
            f"{who} reuses features of many small steps: it needs {MIN_QUERIES} model evaluations or more, found "
            f"{queries}"
        )
    if not keys or min(keys) != 0 or max(keys) >= queries:
        raise BadInput(f"{who}: key steps are numbers from 0, which must be one, to {queries - 1}, found {tuple(keys)}")
    steps = tuple(sorted(set(keys)))
    lengths = [end - start for start, end in zip(steps, (*steps[1:], queries))]
    if 2 * max(lengths) > queries:
        start = steps[lengths.index(max(lengths))]
        raise BadInput(
            f"{who}: {max(lengths)} of {queries} model evaluations would depend on key step {start}, more than half: "
            "give more key steps"
        )
    return steps


def resolve_key_steps(
    keys: str | tuple[int, ...],
    queries: int,
    choices: Sequence[str],
    every: int = 1,
    center: int = 0,
    power: float = 1.4,
) -> tuple[int, ...] | None:
    """Key steps that need no search: explicit ones, or those of a pattern.

    Args:
        keys: numbers, or one of `choices`.
        queries: the number of model evaluations.
        choices: the patterns that are allowed.
        every: of "uniform".
        center: of "around".
        power: of "around".

    Returns:
        The key steps; None for "found", which takes a search.

    Raises:
        BadInput: for a pattern that is not among the choices.
    """
    if not isinstance(keys, str):
        return keys
    check_choice("keys", keys, choices)
    if keys == "paper":
        return paper_key_steps(queries)
    if keys == "uniform":
        return uniform_key_steps(queries, every)
    if keys == "around":
        return key_steps_around(queries, len(uniform_key_steps(queries, every)), int(center), power)
    return None


def cheapest_key_steps(cost: Tensor, count: int) -> tuple[int, ...]:
    """The `count` key steps of minimum total cost, 0 among them: dynamic programming over groups, O(count N^2).

    Args:
        cost: (N, N + 1); cost[i, e] of the group of key step i and the evaluations i + 1 .. e - 1 that reuse its
            features; inf where such a group is not allowed.
        count: of key steps.

    Raises:
        BadInput: where no `count` groups cover the N evaluations.
    """
    N = len(cost)
    best = torch.full((count + 1, N + 1), math.inf, dtype=torch.float64)
    last = torch.zeros(count + 1, N + 1, dtype=torch.long)
    best[0, 0] = 0.0
    for m in range(1, count + 1):
        best[m], last[m] = (best[m - 1, :N, None] + cost.to(torch.float64)).min(0)
    if not math.isfinite(float(best[count, N])):
        raise BadInput(
            f"{count} key steps cannot cover {N} model evaluations in groups of the allowed length: allow more of them"
        )
    keys, end = [], N
    for m in range(count, 0, -1):
        end = int(last[m, end])
        keys.append(end)
    return tuple(keys[::-1])
