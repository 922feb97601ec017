"""What the loop of a plan runs: its rows as short lists of what to multiply by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .basis import Basis

__all__ = ["NoiseDraws", "Program", "Row", "combine", "filled", "holds", "program", "sparse", "used"]


class Row(NamedTuple):
    """(index, coefficient) of every term of a row, newest first, and the history that nothing later uses."""

    states: list[tuple[int, Any]]
    answers: list[tuple[int, Any]]
    draws: list[tuple[int, Any]]
    last_states: list[int]
    last_answers: list[int]


class Program(NamedTuple):
    times: list[Tensor]
    start: Row
    rows: list[Row]

    def beside(self, x: Tensor) -> Program:
        """The same with the coefficients that are tensors on the device and in the dtype of `x`, in one copy."""
        found = [
            c for row in (self.start, *self.rows) for part in row[:3] for _, c in part
            if isinstance(c, Tensor) and not c.requires_grad
        ]  # fmt: skip
        if not found or found[0].device == x.device:
            return self
        moved = dict(zip(map(id, found), torch.stack(found).to(x.dtype).to(x.device).unbind()))

        def there(row: Row) -> Row:
            states, answers, draws = ([(j, moved.get(id(c), c)) for j, c in part] for part in row[:3])
            return Row(states, answers, draws, row.last_states, row.last_answers)

        return Program(self.times, there(self.start), [there(row) for row in self.rows])


class NoiseDraws:
    """Noise draws by number: each is made once, in order, and kept until a later one is asked for."""

    def __init__(self, noise: Callable[[], Tensor]) -> None:
        self.noise = noise
        self.made: dict[int, Tensor] = {}
        self.count = 0

    def __getitem__(self, j: int) -> Tensor:
        while self.count <= j:
            self.made[self.count] = self.noise()
            self.count += 1
        return self.made[j]


def program(times: Tensor, start: Tensor, a: Tensor, A: Tensor, B: Tensor, C: Tensor, tensors: bool) -> Program:
    """The rows, and when a piece of history is used for the last time.

    tensors: coefficients stay tensors with their gradients; else they are floats, or, in a basis of several groups,
    tensors (G,) without.
    """
    K = len(a)
    X = (A + torch.diag_embed(a.movedim(0, -1)).movedim((-2, -1), (0, 1))).detach()
    states, answers, draws = (by_row(table) for table in (X, B, C))
    last_x, last_x0 = last_uses(states, K), last_uses(answers, K)

    def number(c: Tensor) -> Any:
        return c if tensors else float(c) if c.numel() == 1 else c.detach()

    def terms(row: Tensor) -> list[tuple[int, Any]]:
        return [(j, number(row[j])) for j in used(row.detach())]

    rows = [
        Row(
            states=[(j, number(a[k] if j == k else A[k, j])) for j in reversed(states[k])],
            answers=[(j, number(B[k, j])) for j in reversed(answers[k])],
            draws=[(j, number(C[k, j])) for j in draws[k]],
            last_states=last_x[k],
            last_answers=last_x0[k],
        )
        for k in range(K)
    ]
    begin = Row(terms(start[:1]), [], terms(start[1:]), [], [])
    return Program(list((times if tensors else times.detach())[:-1].unbind()), begin, rows)


def by_row(table: Tensor) -> list[list[int]]:
    """The places of each row of a table (K, n), or (K, n, G), that hold anything but zeros, ascending."""
    held = table.detach() != 0
    found: list[list[int]] = [[] for _ in range(len(table))]
    for k, j in (held if held.ndim == 2 else held.flatten(2).any(2)).nonzero().tolist():
        found[k].append(j)
    return found


def last_uses(rows: list[list[int]], K: int) -> list[list[int]]:
    """For each row the pieces of history, of K, that no later row uses: a piece j is made in row j, if never used."""
    last = list(range(K))
    for k, places in enumerate(rows):
        for j in places:
            last[j] = max(last[j], k)
    found: list[list[int]] = [[] for _ in range(K)]
    for j, k in enumerate(last):
        found[k].append(j)
    return found


def combine(row: Row, states: Any, answers: Any, draws: Any, basis: Basis | None = None) -> Tensor:
    """The sum of the terms of a row. Never changes what it reads: history and wrappers may hold it."""
    total: Any = None
    for source, terms in ((states, row.states), (answers, row.answers), (draws, row.draws)):
        for j, c in terms:
            value = source[j]
            if basis is not None and isinstance(c, Tensor):
                c = basis.spread(c, value)
            if total is None:
                total = value * c
            elif isinstance(c, float) and not total.requires_grad:
                total = total.add_(value, alpha=c)
            else:
                total = total + c * value
    return torch.zeros_like(next(iter(states.values()))) if total is None else total


def holds(row: Tensor) -> Tensor:
    """Where a row (n,), or (n, G) in a basis, holds anything but zeros: (n,)."""
    return (row != 0).flatten(1).any(1) if row.ndim > 1 else row != 0


def used(row: Tensor) -> list[int]:
    """The same as a list of places."""
    return holds(row).nonzero().flatten().tolist()


def sparse(table: Tensor) -> list[list[Any]]:
    """A table (K, n) or (K, n, G) for JSON: of each row the pairs [column, number or G numbers] that are not zero."""
    return [[[j, row[j].tolist()] for j in used(row)] for row in table.detach()]


def filled(rows: list[list[Any]], height: int, width: int, groups: tuple[int, ...] = ()) -> Tensor:
    """The inverse of `sparse`, with (G,) or () for `groups`. Raises ValueError where the rows are not those of it."""
    table = torch.zeros(height, width, *groups, dtype=torch.float64)
    if len(rows) != height:
        raise ValueError(f"{len(rows)} rows where there are {height} queries")
    for k, row in enumerate(rows):
        for j, value in row:
            if not 0 <= j < width:
                raise ValueError(f"row {k} has an entry in column {j} of {width}")
            value = torch.tensor(value, dtype=torch.float64)
            if value.shape != groups:
                raise ValueError(f"row {k} has an entry of shape {tuple(value.shape)} in column {j}")
            table[k, j] = value
    return table
