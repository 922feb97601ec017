"""Which queries are keys: those that run the whole network, and whose features the queries after them reuse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import BadInput, nearest

PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)  # of 50, Li et al. 2023, arXiv:2312.09608
FEWEST = 9  # queries: with fewer there is nothing to keep


def paper(queries: int) -> tuple[int, ...]:
    """The keys of Faster Diffusion for 50 steps, {0, 1, 2, 3, 5, 10, 15, 25, 35}, in proportion: round(i queries / 50),
    each once."""
    return tuple(sorted({math.floor(key * queries / 50 + 0.5) for key in PAPER}))


def uniform(queries: int, every: int) -> tuple[int, ...]:
    """0, every, 2 every, ..."""
    if every < 1:
        raise BadInput(f"every must be 1 or more, found {every}")
    return tuple(range(0, queries, every))


def around(queries: int, count: int, center: int, power: float) -> tuple[int, ...]:
    """`count` keys, dense around query `center`: the whole parts of

        center + sign(l) |l|^power,    l evenly spaced from -center^(1/power) to (queries - center)^(1/power)

    (Ma et al. 2023, arXiv:2312.00858; theirs is 1.2 to 1.4), and 0. Keys that fall together leave fewer than `count`;
    the power is then brought towards 1 until they do not.
    """
    if not (0 <= center < queries and power >= 1 and 1 <= count <= queries):
        raise BadInput(
            f"keys around a center need a center from 0 to {queries - 1}, power >= 1 and 1 to {queries} keys, "
            f"found {center}, {power:g} and {count}"
        )
    while True:
        low, high = -(center ** (1 / power)), (queries - center) ** (1 / power)
        line = torch.linspace(low, high, count + 1, dtype=torch.float64)
        places = center + line.sign() * line.abs() ** power
        found = sorted({0, *(min(max(math.floor(p + 1e-9), 0), queries - 1) for p in places[:-1].tolist())})
        if len(found) >= count or power == 1:
            return tuple(found)
        power = max(1.0, power - 0.02)


def amount(budget: float, queries: int) -> int:
    """How many keys a budget allows: a number from 1, or a share of the queries below it."""
    count = round(budget * queries) if 0 < budget < 1 else int(budget)
    if not 1 <= count <= queries or (budget >= 1 and count != budget):
        raise BadInput(f"budget must be a share below 1 or a whole number of keys up to {queries}, found {budget:g}")
    return count


def checked(keys: Sequence[int], queries: int, who: str) -> tuple[int, ...]:
    """The keys, sorted, if they can be.

    Raises:
        BadInput: for 8 queries or fewer, where a group (a key and the queries that follow it) would hold more than half
            of them, and for keys that are no queries or leave out the first.
    """
    if queries < FEWEST:
        raise BadInput(f"{who} reuses features of many small steps: it needs {FEWEST} queries or more, found {queries}")
    if not keys or min(keys) != 0 or max(keys) >= queries:
        raise BadInput(f"{who}: keys are queries from 0, which must be one, to {queries - 1}, found {tuple(keys)}")
    found = tuple(sorted(set(keys)))
    lengths = [end - start for start, end in zip(found, (*found[1:], queries))]
    if 2 * max(lengths) > queries:
        start = found[lengths.index(max(lengths))]
        raise BadInput(
            f"{who}: {max(lengths)} of {queries} queries would hang on key {start}: more than half; name more keys"
        )
    return found


def named(
    keys: str | tuple[int, ...], queries: int, choices: Sequence[str], every: int = 1, **more: float
) -> tuple[int, ...] | None:
    """Keys that need no search: explicit ones, or a pattern's; None for "found". more: of "around"."""
    if not isinstance(keys, str):
        return keys
    if keys not in choices:
        raise BadInput(f"unknown keys {keys!r}: {nearest(keys, choices)}")
    if keys == "paper":
        return paper(queries)
    if keys == "uniform":
        return uniform(queries, every)
    if keys == "around":
        return around(queries, len(uniform(queries, every)), int(more["center"]), more["power"])
    return None


def shortest(cost: Tensor, count: int) -> tuple[int, ...]:
    """The `count` keys of least cost, 0 among them: dynamic programming over the groups, O(count N^2).

    Args:
        cost: (N, N + 1): cost[i, e] of the group of key i and the queries i + 1 .. e - 1; inf where it may not be.

    Raises:
        BadInput: where no `count` groups cover the N queries.
    """
    N = len(cost)
    best = torch.full((count + 1, N + 1), math.inf, dtype=torch.float64)
    last = torch.zeros(count + 1, N + 1, dtype=torch.long)
    best[0, 0] = 0.0
    for m in range(1, count + 1):
        best[m], last[m] = (best[m - 1, :N, None] + cost.to(torch.float64)).min(0)
    if not math.isfinite(float(best[count, N])):
        raise BadInput(f"{count} keys cannot cover {N} queries in groups of the allowed length: allow more keys")
    keys, end = [], N
    for m in range(count, 0, -1):
        end = int(last[m, end])
        keys.append(end)
    return tuple(keys[::-1])
