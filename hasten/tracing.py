"""Running a sampler's coroutine on symbols, to read off the table of numbers that it is; see `plan`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import BadInput, HastenError
from .program import holds, used
from .sampling import Query, Sampler, spell
from .schedules import Schedule

__all__ = ["TOLERANCE", "Tables", "trace"]

TOLERANCE = 1e-12


class Tables(NamedTuple):
    """The coefficients of K queries with M noise draws, float64; see `Plan` for what they multiply."""

    times: Tensor
    start: Tensor
    a: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


class NotLinear(HastenError, AttributeError):
    """A sampler that says it is linear did something else with its state."""


class Traced:
    """A linear combination of symbols, in place of an image.

    `value` (2, symbols), or (2, symbols, G) for a sampler with a basis of G groups, holds it in two ways: row 0 in the
    starting state, the answers and the draws alone; row 1 as the sampler's code wrote it, in which every queried state
    is a symbol too.
    """

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __add__(self, other: Any) -> Traced:
        if not isinstance(other, Traced):
            if isinstance(other, (int, float)) and other == 0:  # sum() starts from it
                return self
            raise NotLinear(f"a linear sampler adds states, answers and noise only, not a {type(other).__name__}")
        size = max(self.value.shape[1], other.value.shape[1])
        return Traced(wide(self.value, size) + wide(other.value, size))

    __radd__ = __add__

    def __mul__(self, number: Any) -> Traced:
        if isinstance(number, Traced):
            raise NotLinear("a linear sampler multiplies by numbers only, not a state by a state")
        if isinstance(number, Tensor) and number.ndim and number.shape != self.value.shape[2:]:
            raise NotLinear(f"a linear sampler multiplies by 0-d tensors, not by one of shape {tuple(number.shape)}")
        return Traced(self.value * number)

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> Traced:
        if isinstance(number, Traced):
            raise NotLinear("a linear sampler divides by numbers only, not by a state")
        return self * (1 / number)

    def __neg__(self) -> Traced:
        return Traced(-self.value)

    def __sub__(self, other: Any) -> Traced:
        return self + (-other)

    def __rsub__(self, other: Any) -> Traced:
        return -self + other

    def __getattr__(self, name: str) -> Any:
        raise NotLinear(f"a linear sampler may not ask its state for {name!r}: it must declare linear = False")


def trace(sampler: Sampler, schedule: Schedule, times: Tensor) -> Tables:
    """The tables of a linear sampler on these times; differentiable in the times. `plan` documents the rules.

    Where the sampler has a `basis`, its symbols stand for coordinates in it and every table has a last axis (G,).
    """
    return _Trace(sampler, schedule, times).tables()


class _Trace:
    def __init__(self, sampler: Sampler, schedule: Schedule, times: Tensor) -> None:
        self.sampler = sampler
        basis = getattr(sampler, "basis", None)
        self.groups = () if basis is None else (basis.groups,)
        # the kind of each symbol and its number within the kind: the start, states, answers, draws
        self.symbols: list[tuple[str, int]] = []
        self.counts = {"init": 0, "x": 0, "x0": 0, "xi": 0}
        self.states: list[Tensor] = []  # (2, symbols by then, *groups): the state of every query, and the result
        self.of_state: list[int] = []  # the symbol of the state of every query
        self.times: list[Tensor] = []
        self._run(schedule, times)
        self.times.append(times[-1])

    def _symbol(self, kind: str) -> Tensor:
        self.symbols.append((kind, self.counts[kind]))
        self.counts[kind] += 1
        unit = torch.zeros(2, len(self.symbols), *self.groups, dtype=torch.float64)
        unit[:, -1] = 1.0
        return unit

    def _run(self, schedule: Schedule, times: Tensor) -> None:
        x = Traced(self._symbol("init"))
        coroutine = self.sampler.steps(schedule, x, times, lambda: Traced(self._symbol("xi")))
        answer = None
        while True:
            try:
                query: Query = coroutine.send(answer)
            except StopIteration as stop:
                self.states.append(self._checked(stop.value))
                return
            t = torch.as_tensor(query.t, dtype=torch.float64)
            if t.ndim:
                raise NotLinear(f"{spell(self.sampler)} asks at times of shape {tuple(t.shape)}: a plan needs one each")
            state = self._checked(query.x)
            self.times.append(t)
            self.states.append(state)
            unit = self._symbol("x")
            self.of_state.append(len(self.symbols) - 1)
            # the sampler's own variable becomes the symbol: all that it computes from it later is written in it
            query.x.value = torch.stack([wide(state, unit.shape[1])[0], unit[1]])
            answer = Traced(self._symbol("x0"))

    def _checked(self, value: Any) -> Tensor:
        if not isinstance(value, Traced):
            raise NotLinear(f"{spell(self.sampler)} turned its state into a {type(value).__name__}: it is not linear")
        if not bool(torch.isfinite(value.value).all()):
            raise BadInput(f"{spell(self.sampler)} has an infinite or undefined coefficient on these times")
        return value.value

    def tables(self) -> Tables:
        size = len(self.symbols)
        self.states = [wide(state, size) for state in self.states]
        # of each symbol: the query it belongs to (any for a draw), and whether it is a state (the start is state 0)
        self.number = torch.tensor([size if kind == "xi" else number for kind, number in self.symbols])
        self.is_state = torch.tensor([kind in ("init", "x") for kind, _ in self.symbols])
        K, M = len(self.states) - 1, self.counts["xi"]
        begin = drop(self.states[0][0], self.states[0][0].detach().abs().amax(0))
        plain = bool((begin[0] == 1).all()) and used(begin) == [0]
        shapes = {"init": (1, 1), "begin": (1, M), "x": (K, K), "x0": (K, K), "xi": (K, M)}
        places: dict[str, list[tuple[int, int]]] = {kind: [] for kind in shapes}
        values: dict[str, list[Tensor]] = {kind: [] for kind in shapes}

        def put(kind: str, place: tuple[int, int], value: Tensor) -> None:
            places[kind].append(place)
            values[kind].append(value)

        for index in used(begin):
            kind, number = self.symbols[index]
            put("begin" if kind == "xi" else "init", (0, number), begin[index])
        for k in range(K):
            row = self._row(k, plain)
            for index in used(row):
                kind, number = self.symbols[index]
                put("x" if kind == "init" else kind, (k, number), row[index])
        full = {
            kind: torch.zeros(*shape, *self.groups, dtype=torch.float64).index_put(
                tuple(torch.tensor(places[kind]).T), torch.stack(values[kind])
            )
            if places[kind]
            else torch.zeros(*shape, *self.groups, dtype=torch.float64)
            for kind, shape in shapes.items()
        }
        return Tables(
            times=torch.stack(self.times),
            start=torch.cat([full["init"], full["begin"]], 1)[0],
            a=full["x"][range(K), range(K)].clone(),
            A=torch.where(beside(torch.ones(K, K).tril(-1) == 1, full["x"]), full["x"], 0.0),
            B=full["x0"],
            C=full["xi"],
        )

    def _row(self, k: int, plain: bool) -> Tensor:
        """State k + 1: of the ways to write it the one with the shortest history, then the fewest terms.

        `plain`: the start is state 0, so that a row may name it.
        """
        before, (now, written) = self.states[k][0], self.states[k + 1]
        scale = now.detach().abs().amax(0)
        unit = torch.zeros_like(now)
        unit[self.of_state[k]] = 1.0
        rows = []
        for pivot in self._pivots(before, now):
            ratio = now[pivot] / before[pivot]
            rest = now - ratio * before
            at_pivot = beside(torch.arange(len(rest)) == pivot, rest)
            rest = rest - torch.where(at_pivot, rest, 0.0)  # 0, whatever the rounding
            rows.append(drop(rest, scale) + ratio * unit)
        rows += [drop(now, scale), drop(written, scale)]

        def cost(row: Tensor) -> tuple[int, int, int]:
            held = holds(row)
            oldest = int(self.number[held].min()) if held.any() else k
            return k - min(oldest, k), int((held & self.is_state & (self.number < k)).sum()), int(held.sum())

        if not plain:
            rows = [row for row in rows if not bool(row[0].any())]
        if not rows:
            raise NotLinear(f"{spell(self.sampler)} uses its start again after adding noise to it: keep the sum only")
        return min(rows, key=cost)

    def _pivots(self, before: Tensor, now: Tensor) -> list[int]:
        """Symbols to read a_k from: the oldest that both states hold of the start and the draws, and of the answers."""
        both = (drop(before, before.abs().amax(0)) != 0) & (drop(now, now.abs().amax(0)) != 0)
        if self.groups:  # one symbol for all directions: far enough from 0 in each, or the ratio magnifies rounding
            both = both.all(1) & (before.detach().abs() > 1e-4 * before.detach().abs().amax(0)).all(1)
        answers = ~self.is_state & (self.number < len(self.symbols))
        found = [both & ~answers, both & answers]
        return [int(mask.nonzero()[0]) for mask in found if mask.any()]


def wide(value: Tensor, size: int) -> Tensor:
    """`value` (2, symbols, *groups) with zeros for the symbols made since."""
    more = size - value.shape[1]
    return pad(value, (0, 0) * (value.ndim - 2) + (0, more)) if more > 0 else value


def drop(row: Tensor, scale: Tensor) -> Tensor:
    """The row without the zeros that float64 rounded: entries of at most `TOLERANCE` of the scale."""
    return torch.where(row.detach().abs() > TOLERANCE * scale, row, 0.0)


def beside(mask: Tensor, table: Tensor) -> Tensor:
    """A mask over the first axes of a table, with axes of length 1 for the others."""
    return mask.reshape(*mask.shape, *[1] * (table.ndim - mask.ndim))
