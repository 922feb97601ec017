"""The loop of a plan: its rows as short lists of terms, each an index and a coefficient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.devices import has_float64
from .basis import Basis

__all__ = ["NoiseDraws", "Program", "Row", "combine", "filled", "holds", "multiplier", "program", "sparse", "used"]


class Row(NamedTuple):
    """(index, coefficient) of every term of a row, newest first, and the history that no later row uses."""

    states: list[tuple[int, Any]]
    outputs: list[tuple[int, Any]]
    draws: list[tuple[int, Any]]
    last_states: list[int]
    last_outputs: list[int]


class Program(NamedTuple):
    """The times (), the row of the initial state, and the rows of all later ones."""

    times: list[Tensor]
    start: Row
    rows: list[Row]

    def to(self, x: Tensor) -> Program:
        """The program with the coefficients that are tensors on the device and in the dtype of `x`, in one copy."""
        terms = [c for row in (self.start, *self.rows) for terms in row[:3] for _, c in terms]
        tensors = [c for c in terms if isinstance(c, Tensor) and not c.requires_grad]
        if not tensors or tensors[0].device == x.device:
            return self
        moved = dict(zip(map(id, tensors), torch.stack(tensors).to(x.dtype).to(x.device).unbind()))

        def move(row: Row) -> Row:
            states, outputs, draws = ([(j, moved.get(id(c), c)) for j, c in terms] for terms in row[:3])
            return Row(states, outputs, draws, row.last_states, row.last_outputs)

        return Program(self.times, move(self.start), [move(row) for row in self.rows])


class NoiseDraws:
    """Noise draws by number: each is drawn once, in order, and cached."""

    def __init__(self, noise: Callable[[], Tensor]) -> None:
        self.noise = noise
        self.cached: dict[int, Tensor] = {}
        self.count = 0

    def __getitem__(self, j: int) -> Tensor:
        """Draw j."""
        while self.count <= j:
            self.cached[self.count] = self.noise()
            self.count += 1
        return self.cached[j]


def program(times: Tensor, start: Tensor, a: Tensor, A: Tensor, B: Tensor, C: Tensor, tensors: bool) -> Program:
    """The rows of a plan, with the last use of every state and output.

    Args:
        times, start, a, A, B, C: the tables, see `Plan`.
        tensors: coefficients are tensors with their gradients; else floats, or, in a basis of several groups, tensors
            (G,) without gradients.
    """
    K = len(a)
    X = (A + torch.diag_embed(a.movedim(0, -1)).movedim((-2, -1), (0, 1))).detach()
    states, outputs, draws = (by_row(table) for table in (X, B, C))
    last_x, last_x0 = last_uses(states, K), last_uses(outputs, K)

    def number(c: Tensor) -> Any:
        return c if tensors else float(c) if c.numel() == 1 else c.detach()

    def terms(row: Tensor) -> list[tuple[int, Any]]:
        return [(j, number(row[j])) for j in used(row.detach())]

    rows = [
        Row(
            states=[(j, number(a[k] if j == k else A[k, j])) for j in reversed(states[k])],
            outputs=[(j, number(B[k, j])) for j in reversed(outputs[k])],
            draws=[(j, number(C[k, j])) for j in draws[k]],
            last_states=last_x[k],
            last_outputs=last_x0[k],
        )
        for k in range(K)
    ]
    begin = Row(terms(start[:1]), [], terms(start[1:]), [], [])
    return Program(list((times if tensors else times.detach())[:-1].unbind()), begin, rows)


def by_row(table: Tensor) -> list[list[int]]:
    """The columns of each row of a table (K, n), or (K, n, G), that are not zero, ascending."""
    nonzero = table.detach() != 0
    columns: list[list[int]] = [[] for _ in range(len(table))]
    for k, j in (nonzero if nonzero.ndim == 2 else nonzero.flatten(2).any(2)).nonzero().tolist():
        columns[k].append(j)
    return columns


def last_uses(rows: list[list[int]], K: int) -> list[list[int]]:
    """For each row the entries of the history, of K, that no later row uses: entry j at row j, if it is never used."""
    last = list(range(K))
    for k, columns in enumerate(rows):
        for j in columns:
            last[j] = max(last[j], k)
    unused: list[list[int]] = [[] for _ in range(K)]
    for j, k in enumerate(last):
        unused[k].append(j)
    return unused


def combine(row: Row, states: Any, outputs: Any, draws: Any, basis: Basis | None = None) -> Tensor:
    """The sum of the terms of a row. Its inputs are not changed in place: the history and wrappers may share them.

    Args:
        row: the terms.
        states, outputs, draws: tensors (B, *S) by number.
        basis: that groups the coefficients.
    """
    total: Any = None
    for source, terms in ((states, row.states), (outputs, row.outputs), (draws, row.draws)):
        for j, c in terms:
            value = source[j]
            if basis is not None and isinstance(c, Tensor):
                c = basis.spread(c, value)
            else:
                c = multiplier(c, value)
            if total is None:
                total = value * c
            elif isinstance(c, float) and not total.requires_grad:
                total = total.add_(value, alpha=c)
            else:
                total = total + c * value
    return torch.zeros_like(next(iter(states.values()))) if total is None else total


def multiplier(c: Any, value: Tensor) -> Any:
    """A coefficient as a factor of a tensor; where its device has no float64 in its dtype, and so the gradient."""
    if isinstance(c, Tensor) and c.requires_grad and not has_float64(value.device):
        return c.to(value.dtype).to(value.device)
    return c


def holds(row: Tensor) -> Tensor:
    """Where a row (n,), or (n, G) in a basis, is not zero: (n,) bools."""
    return (row != 0).flatten(1).any(1) if row.ndim > 1 else row != 0


def used(row: Tensor) -> list[int]:
    """The columns of a row (n,), or (n, G) in a basis, that are not zero."""
    columns: list[int] = holds(row).nonzero().flatten().tolist()
    return columns


def sparse(table: Tensor) -> list[list[Any]]:
    """A table (K, n) or (K, n, G) for JSON: for each row the pairs [column, number or G numbers] that are not zero."""
    return [[[j, row[j].tolist()] for j in used(row)] for row in table.detach()]


def filled(rows: list[list[Any]], height: int, width: int, groups: tuple[int, ...] = ()) -> Tensor:
    """The inverse of `sparse`.

    Args:
        rows: its result.
        height, width: K and n.
        groups: (G,) or ().

    Raises:
        ValueError: where the rows do not fit the shape.
    """
    table = torch.zeros(height, width, *groups, dtype=torch.float64)
    if len(rows) != height:
        raise ValueError(f"{len(rows)} rows for {height} evaluations")
    for k, row in enumerate(rows):
        for j, value in row:
            if not 0 <= j < width:
                raise ValueError(f"row {k} has an entry in column {j} of {width}")
            value = torch.tensor(value, dtype=torch.float64)
            if value.shape != groups:
                raise ValueError(f"row {k} has an entry of shape {tuple(value.shape)} in column {j}")
            table[k, j] = value
    return table
