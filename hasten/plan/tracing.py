"""Running a sampler's coroutine on symbols, to read off the table of numbers that it is; see `plan`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import BadInput, HastenError
from ..pick import format_spec
from ..sampling import Query, Sampler
from ..schedules.base import Schedule

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


class NeedsGradient(Exception):
    """A coefficient requires a gradient, which NumPy arrays do not carry."""


class Traced:
    """A linear combination of symbols, in place of an image.

    `value` (2, symbols), or (2, symbols, G) for a sampler with a basis of G groups, holds it in two ways: row 0 in the
    starting state, the answers and the draws alone; row 1 as the sampler's code wrote it, in which every queried state
    is a symbol too. A NumPy array, or a tensor where the coefficients carry gradients.
    """

    __slots__ = ("value",)
    __array_ufunc__ = None  # so that a NumPy number on the left leaves the product to `__rmul__`

    def __init__(self, value: Any) -> None:
        self.value = value

    def __add__(self, other: Any) -> Traced:
        if not isinstance(other, Traced):
            if isinstance(other, (int, float)) and other == 0:  # sum() starts from it
                return self
            raise NotLinear(f"a linear sampler adds states, answers and noise only, not a {type(other).__name__}")
        short, long = sorted((self.value, other.value), key=lambda value: value.shape[1])
        if isinstance(long, Tensor) or isinstance(short, Tensor):
            return Traced(_pad_symbols(short, long.shape[1]) + long)
        total = long.copy()
        total[:, : short.shape[1]] += short
        return Traced(total)

    __radd__ = __add__

    def __mul__(self, number: Any) -> Traced:
        if isinstance(number, Traced):
            raise NotLinear("a linear sampler multiplies by numbers only, not a state by a state")
        if isinstance(number, Tensor):
            if number.ndim and number.shape != self.value.shape[2:]:
                raise NotLinear(
                    f"a linear sampler multiplies by 0-d tensors, not by one of shape {tuple(number.shape)}"
                )
            if not isinstance(self.value, Tensor):
                number = _to_number(number)
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


def _to_number(number: Tensor) -> Any:
    """A coefficient as a float, or (G,) as a NumPy array. Raises NeedsGradient where it requires one."""
    if number.requires_grad and torch.is_grad_enabled():
        raise NeedsGradient
    return number.detach().double().numpy() if number.ndim else number.item()


def trace(sampler: Sampler, schedule: Schedule, times: Tensor) -> Tables:
    """The tables of a linear sampler on these times; differentiable in the times. `plan` documents the rules.

    Where the sampler has a `basis`, its symbols stand for coordinates in it and every table has a last axis (G,).
    Runs on NumPy arrays, whose operations cost a tenth of a tensor's, and again on tensors where a coefficient
    requires a gradient.
    """
    if not times.requires_grad:
        try:
            with np.errstate(all="ignore"):  # what is not finite is refused by name
                return _Trace(sampler, schedule, times, tensors=False).tables()
        except NeedsGradient:
            pass
    return _Trace(sampler, schedule, times, tensors=True).tables()


class _Trace:
    def __init__(self, sampler: Sampler, schedule: Schedule, times: Tensor, tensors: bool) -> None:
        self.sampler = sampler
        self.tensors = tensors
        basis = getattr(sampler, "basis", None)
        self.groups = () if basis is None else (basis.groups,)
        # the kind of each symbol and its number within the kind: the start, states, answers, draws
        self.symbols: list[tuple[str, int]] = []
        self.counts = {"init": 0, "x": 0, "x0": 0, "xi": 0}
        self.states: list[Any] = []  # (2, symbols by then, *groups): the state of every query, and the result
        self.of_state: list[int] = []  # the symbol of the state of every query
        self.times: list[Tensor] = []
        self._run(schedule, times)
        self.times.append(times[-1])

    def _symbol(self, kind: str) -> Any:
        self.symbols.append((kind, self.counts[kind]))
        self.counts[kind] += 1
        unit = np.zeros((2, len(self.symbols), *self.groups))
        unit[:, -1] = 1.0
        return torch.from_numpy(unit) if self.tensors else unit

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
                raise NotLinear(
                    f"{format_spec(self.sampler)} asks at times of shape {tuple(t.shape)}: a plan needs one each"
                )
            if not self.tensors and t.requires_grad and torch.is_grad_enabled():
                raise NeedsGradient
            state = self._checked(query.x)
            self.times.append(t)
            self.states.append(state)
            unit = self._symbol("x")
            self.of_state.append(len(self.symbols) - 1)
            # the sampler's own variable becomes the symbol: all that it computes from it later is written in it
            if self.tensors:
                query.x.value = torch.stack([_pad_symbols(state, unit.shape[1])[0], unit[1]])
            else:
                unit[0, -1] = 0.0
                unit[0, : state.shape[1]] = state[0]
                query.x.value = unit
            answer = Traced(self._symbol("x0"))

    def _checked(self, value: Any) -> Any:
        if not isinstance(value, Traced):
            raise NotLinear(
                f"{format_spec(self.sampler)} turned its state into a {type(value).__name__}: it is not linear"
            )
        if not np.isfinite(_as_array(value.value)).all():
            raise BadInput(f"{format_spec(self.sampler)} has an infinite or undefined coefficient on these times")
        return value.value

    def tables(self) -> Tables:
        size = len(self.symbols)
        # of each symbol: the query it belongs to (any for a draw), and whether it is a state (the start is state 0)
        self.number = np.array([size if kind == "xi" else number for kind, number in self.symbols])
        self.is_state = np.array([kind in ("init", "x") for kind, _ in self.symbols])
        K, M = len(self.states) - 1, self.counts["xi"]
        begin = self.states[0][0]
        begin = _drop_rounding(begin, np.abs(_as_array(begin)).max(0))
        straight = bool((_as_array(begin)[0] == 1).all()) and _nonzero_columns(begin) == [0]
        shapes = {"init": (1, 1), "begin": (1, M), "x": (K, K), "x0": (K, K), "xi": (K, M)}
        places: dict[str, list[tuple[int, int]]] = {kind: [] for kind in shapes}
        values: dict[str, list[Any]] = {kind: [] for kind in shapes}

        def put(kind: str, place: tuple[int, int], value: Any) -> None:
            places[kind].append(place)
            values[kind].append(value)

        for index in _nonzero_columns(begin):
            kind, number = self.symbols[index]
            put("begin" if kind == "xi" else "init", (0, number), begin[index])
        for k in range(K):
            row = self._row(k, straight)
            for index in _nonzero_columns(row):
                kind, number = self.symbols[index]
                put("x" if kind == "init" else kind, (k, number), row[index])
        full = {kind: self._table(shape, places[kind], values[kind]) for kind, shape in shapes.items()}
        return Tables(
            times=torch.stack(self.times),
            start=torch.cat([full["init"], full["begin"]], 1)[0],
            a=full["x"][range(K), range(K)].clone(),
            A=torch.where(_expand_mask(torch.ones(K, K).tril(-1) == 1, full["x"]), full["x"], 0.0),
            B=full["x0"],
            C=full["xi"],
        )

    def _table(self, shape: tuple[int, int], places: list[tuple[int, int]], values: list[Any]) -> Tensor:
        """Zeros (*shape, *groups) but for the values at these places."""
        zeros = torch.zeros(*shape, *self.groups, dtype=torch.float64)
        if not places:
            return zeros
        stacked = torch.stack(values) if self.tensors else torch.from_numpy(np.stack(values))
        return zeros.index_put(tuple(torch.tensor(places).T), stacked)

    def _row(self, k: int, straight: bool) -> Any:
        """State k + 1: of the ways to write it the one with the shortest history, then the fewest terms.

        straight: the start is state 0, so that a row may name it.
        """
        before, (now, written) = self.states[k][0], self.states[k + 1]
        scale = np.abs(_as_array(now)).max(0)
        written = _drop_rounding(written, scale)
        if min(_nonzero_columns(written), default=0) >= self.of_state[k]:
            return written  # in what is new since state k, and that state itself: there is no shorter way
        before = _pad_symbols(before[None], now.shape[0])[0]
        unit = np.zeros(now.shape)
        unit[self.of_state[k]] = 1.0
        unit = torch.from_numpy(unit) if self.tensors else unit
        rows = []
        for pivot in self._pivots(_as_array(before), _as_array(now)):
            ratio = now[pivot] / before[pivot]
            rest = now - ratio * before
            inside: Any = np.ones(len(rest), dtype=bool)
            inside[pivot] = False  # 0, whatever the rounding
            rows.append(_drop_rounding(_mask_row(rest, inside), scale) + ratio * unit)
        rows += [_drop_rounding(now, scale), written]

        def cost(row: Any) -> tuple[int, int, int]:
            held = _nonzero_columns(row)
            number = self.number[held]
            oldest = min(int(number.min()), k) if held else k
            return k - oldest, int((self.is_state[held] & (number < k)).sum()), len(held)

        if not straight:
            rows = [row for row in rows if not bool((_as_array(row)[0] != 0).any())]
        if not rows:
            raise NotLinear(
                f"{format_spec(self.sampler)} uses its start again after adding noise to it: keep the sum only"
            )
        return min(rows, key=cost)

    def _pivots(self, before: np.ndarray, now: np.ndarray) -> list[int]:
        """Symbols to read a_k from: the oldest that both states hold of the start and the draws, and of the answers."""
        sizes, sizes_now = np.abs(before), np.abs(now)
        both = (sizes > TOLERANCE * sizes.max(0)) & (sizes_now > TOLERANCE * sizes_now.max(0))
        if self.groups:  # one symbol for all directions: far enough from 0 in each, or the ratio magnifies rounding
            both = both.all(1) & (sizes > 1e-4 * sizes.max(0)).all(1)
        size = len(both)
        answers = ~self.is_state[:size] & (self.number[:size] < len(self.symbols))
        found = [both & ~answers, both & answers]
        return [int(mask.argmax()) for mask in found if mask.any()]


def _as_array(value: Any) -> np.ndarray:
    """The numbers of an array or a tensor, without a copy."""
    return value.detach().numpy() if isinstance(value, Tensor) else value


def _pad_symbols(value: Any, size: int) -> Any:
    """`value` (2, symbols, *groups) with zeros for the symbols made since."""
    more = size - value.shape[1]
    if more <= 0:
        return value
    if isinstance(value, Tensor):
        return pad(value, (0, 0) * (value.ndim - 2) + (0, more))
    return np.pad(value, [(0, 0), (0, more), *[(0, 0)] * (value.ndim - 2)])


def _mask_row(row: Any, mask: np.ndarray) -> Any:
    """The row with zeros where `mask`, over its first axes, is False."""
    mask = mask.reshape(*mask.shape, *[1] * (row.ndim - mask.ndim))
    return torch.where(torch.from_numpy(mask), row, 0.0) if isinstance(row, Tensor) else np.where(mask, row, 0.0)


def _drop_rounding(row: Any, scale: Any) -> Any:
    """The row without the zeros that float64 rounded: entries of at most `TOLERANCE` of the scale."""
    return _mask_row(row, np.abs(_as_array(row)) > TOLERANCE * scale)


def _nonzero_columns(row: Any) -> list[int]:
    """Where a row (n,), or (n, G) in a basis, holds anything but zeros."""
    held = _as_array(row) != 0
    return np.flatnonzero(held if held.ndim == 1 else held.any(1)).tolist()


def _expand_mask(mask: Tensor, table: Tensor) -> Tensor:
    """A mask over the first axes of a table, with axes of length 1 for the others."""
    return mask.reshape(*mask.shape, *[1] * (table.ndim - mask.ndim))
