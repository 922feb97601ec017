"""Running a sampler's coroutine on symbols, which yields its table of coefficients; see `plan`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import BadInput, HastenError
from ..pick import format_spec
from ..sampling import Query, Sampler, basis_of
from ..schedules.base import Schedule

__all__ = ["TOLERANCE", "Tables", "trace"]

Array = Any  # a NumPy array of float64

TOLERANCE = 1e-12


class Tables(NamedTuple):
    """The coefficients of K evaluations with M noise draws, float64; see `Plan` for what they multiply."""

    times: Tensor
    start: Tensor
    a: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


class NotLinear(HastenError, AttributeError):
    """A sampler declared linear applied a nonlinear operation to its state."""


class NeedsGradient(Exception):
    """A coefficient requires a gradient, which NumPy arrays do not carry."""


class Traced:
    """A linear combination of symbols, in place of an image.

    Args:
        value: (2, symbols), or (2, symbols, G) for a sampler with a basis of G groups. Row 0 has the coefficients of
            the initial state, the outputs and the draws alone; row 1 those of the sampler's own code, in which every
            evaluated state is a symbol too. A NumPy array, or a tensor where the coefficients have gradients.
    """

    __slots__ = ("value",)
    __array_ufunc__ = None  # a product with a NumPy number on the left is then `__rmul__`

    def __init__(self, value: Any) -> None:
        self.value = value

    def __add__(self, other: Any) -> Traced:
        if not isinstance(other, Traced):
            if isinstance(other, (int, float)) and other == 0:  # sum() starts from it
                return self
            raise NotLinear(f"a linear sampler adds states, outputs and noise only, not a {type(other).__name__}")
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
        return self.__mul__(1 / number)

    def __neg__(self) -> Traced:
        return Traced(-self.value)

    def __sub__(self, other: Any) -> Traced:
        return self.__add__(-other)

    def __rsub__(self, other: Any) -> Traced:
        return self.__neg__().__add__(other)

    def __getattr__(self, name: str) -> Any:
        raise NotLinear(f"a linear sampler may not ask its state for {name!r}: it must declare linear = False")


def _to_number(number: Tensor) -> Any:
    """A coefficient as a float, or (G,) as a NumPy array. Raises NeedsGradient where it requires a gradient."""
    if number.requires_grad and torch.is_grad_enabled():
        raise NeedsGradient
    return number.detach().double().numpy() if number.ndim else number.item()


def trace(sampler: Sampler, schedule: Schedule, times: Tensor) -> Tables:
    """The tables of a linear sampler; differentiable in the times. `plan` documents the rules.

    Where the sampler has a `basis`, its symbols stand for coordinates in it and every table has a last axis (G,). Runs
    on NumPy arrays, whose operations cost a tenth of a tensor's, and again on tensors where a coefficient requires a
    gradient.

    Args:
        sampler: with `linear` True.
        schedule: of the denoiser.
        times: (steps + 1,) float64.

    Raises:
        NotLinear: for a sampler that is not linear.
        BadInput: for times on which it has no finite coefficients.
    """
    if not times.requires_grad:
        try:
            with np.errstate(all="ignore"):  # values that are not finite raise an error later
                return _Trace(sampler, schedule, times, tensors=False).tables()
        except NeedsGradient:
            pass
    return _Trace(sampler, schedule, times, tensors=True).tables()


class _Trace:
    """One run of a sampler on symbols."""

    def __init__(self, sampler: Sampler, schedule: Schedule, times: Tensor, tensors: bool) -> None:
        self.sampler = sampler
        self.tensors = tensors
        basis = basis_of(sampler, schedule)
        self.groups = () if basis is None else (basis.groups,)
        # the kind of each symbol and its number within the kind: initial state, states, outputs, draws
        self.symbols: list[tuple[str, int]] = []
        self.counts = {"init": 0, "x": 0, "x0": 0, "xi": 0}
        self.states: list[Any] = []  # (2, symbols so far, *groups): the state of every evaluation, and the result
        self.of_state: list[int] = []  # the symbol of the state of every evaluation
        self.times: list[Tensor] = []
        self._run(schedule, times)
        self.times.append(times[-1])

    def _symbol(self, kind: str) -> Any:
        """The value of a new symbol."""
        self.symbols.append((kind, self.counts[kind]))
        self.counts[kind] += 1
        unit = np.zeros((2, len(self.symbols), *self.groups))
        unit[:, -1] = 1.0
        return torch.from_numpy(unit) if self.tensors else unit

    def _run(self, schedule: Schedule, times: Tensor) -> None:
        """Run the coroutine, and record the states and times of its evaluations."""
        x = Traced(self._symbol("init"))
        coroutine = self.sampler.steps(schedule, x, times, lambda: Traced(self._symbol("xi")))
        output = None
        while True:
            try:
                query: Query = coroutine.send(output)
            except StopIteration as stop:
                self.states.append(self._check(stop.value))
                return
            t = torch.as_tensor(query.t, dtype=torch.float64)
            if t.ndim:
                raise NotLinear(
                    f"{format_spec(self.sampler)} evaluates at times of shape {tuple(t.shape)}: a plan needs one each"
                )
            if not self.tensors and t.requires_grad and torch.is_grad_enabled():
                raise NeedsGradient
            state = self._check(query.x)
            self.times.append(t)
            self.states.append(state)
            unit = self._symbol("x")
            self.of_state.append(len(self.symbols) - 1)
            # the sampler's own variable becomes the symbol: what it computes from it later is in terms of it
            if self.tensors:
                query.x.value = torch.stack([_pad_symbols(state, unit.shape[1])[0], unit[1]])
            else:
                unit[0, -1] = 0.0
                unit[0, : state.shape[1]] = state[0]
                query.x.value = unit
            output = Traced(self._symbol("x0"))

    def _check(self, value: Any) -> Any:
        """The coefficients of a state, which must be linear and finite."""
        if not isinstance(value, Traced):
            raise NotLinear(
                f"{format_spec(self.sampler)} turned its state into a {type(value).__name__}: it is not linear"
            )
        if not np.isfinite(_as_array(value.value)).all():
            raise BadInput(f"{format_spec(self.sampler)} has an infinite or undefined coefficient on these times")
        return value.value

    def tables(self) -> Tables:
        """The tables of the recorded states."""
        size = len(self.symbols)
        # for each symbol: its evaluation (any for a draw), and whether it is a state (the initial state is state 0)
        self.number = np.array([size if kind == "xi" else number for kind, number in self.symbols])
        self.is_state = np.array([kind in ("init", "x") for kind, _ in self.symbols])
        K, M = len(self.states) - 1, self.counts["xi"]
        begin = self.states[0][0]
        begin = _drop_rounding(begin, np.abs(_as_array(begin)).max(0))
        straight = bool((_as_array(begin)[0] == 1).all()) and _nonzero_columns(begin) == [0]
        shapes = {"init": (1, 1), "begin": (1, M), "x": (K, K), "x0": (K, K), "xi": (K, M)}
        columns: dict[str, list[tuple[int, int]]] = {kind: [] for kind in shapes}
        values: dict[str, list[Any]] = {kind: [] for kind in shapes}

        def put(kind: str, place: tuple[int, int], value: Any) -> None:
            columns[kind].append(place)
            values[kind].append(value)

        for index in _nonzero_columns(begin):
            kind, number = self.symbols[index]
            put("begin" if kind == "xi" else "init", (0, number), begin[index])
        for k in range(K):
            row = self._row(k, straight)
            for index in _nonzero_columns(row):
                kind, number = self.symbols[index]
                put("x" if kind == "init" else kind, (k, number), row[index])
        full = {kind: self._table(shape, columns[kind], values[kind]) for kind, shape in shapes.items()}
        return Tables(
            times=torch.stack(self.times),
            start=torch.cat([full["init"], full["begin"]], 1)[0],
            a=full["x"][range(K), range(K)].clone(),
            A=torch.where(_expand_mask(torch.ones(K, K).tril(-1) == 1, full["x"]), full["x"], 0.0),
            B=full["x0"],
            C=full["xi"],
        )

    def _table(self, shape: tuple[int, int], indices: list[tuple[int, int]], values: list[Any]) -> Tensor:
        """Zeros (*shape, *groups) with these values at these indices."""
        zeros = torch.zeros(*shape, *self.groups, dtype=torch.float64)
        if not indices:
            return zeros
        stacked = torch.stack(values) if self.tensors else torch.from_numpy(np.stack(values))
        return zeros.index_put(tuple(torch.tensor(indices).T), stacked)

    def _row(self, k: int, straight: bool) -> Any:
        """State k + 1 as a row: of the equivalent ones that with the shortest history, then the fewest terms.

        Args:
            straight: state 0 is the initial state, so that a row may use it.
        """
        before, (now, written) = self.states[k][0], self.states[k + 1]
        scale = np.abs(_as_array(now)).max(0)
        written = _drop_rounding(written, scale)
        if min(_nonzero_columns(written), default=0) >= self.of_state[k]:
            return written  # only state k and symbols after it: there is no shorter history
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
            used = _nonzero_columns(row)
            number = self.number[used]
            oldest = min(int(number.min()), k) if used else k
            return k - oldest, int((self.is_state[used] & (number < k)).sum()), len(used)

        if not straight:
            rows = [row for row in rows if not bool((_as_array(row)[0] != 0).any())]
        if not rows:
            raise NotLinear(
                f"{format_spec(self.sampler)} uses its initial state again after adding noise to it: use the sum only"
            )
        return min(rows, key=cost)

    def _pivots(self, before: Array, now: Array) -> list[int]:
        """Symbols to read a_k from: the oldest in both states of the initial state and draws, and of the outputs."""
        sizes, sizes_now = np.abs(before), np.abs(now)
        both = (sizes > TOLERANCE * sizes.max(0)) & (sizes_now > TOLERANCE * sizes_now.max(0))
        if self.groups:  # one symbol for all directions: far enough from 0 in each, or the ratio magnifies rounding
            both = both.all(1) & (sizes > 1e-4 * sizes.max(0)).all(1)
        size = len(both)
        outputs = ~self.is_state[:size] & (self.number[:size] < len(self.symbols))
        return [int(mask.argmax()) for mask in (both & ~outputs, both & outputs) if mask.any()]


def _as_array(value: Any) -> Array:
    """The numbers of an array or a tensor, without a copy."""
    array: Array = value.detach().numpy() if isinstance(value, Tensor) else value
    return array


def _pad_symbols(value: Any, size: int) -> Any:
    """`value` (2, symbols, *groups) with zeros for the symbols added since."""
    more = size - value.shape[1]
    if more <= 0:
        return value
    if isinstance(value, Tensor):
        return pad(value, (0, 0) * (value.ndim - 2) + (0, more))
    return np.pad(value, [(0, 0), (0, more), *[(0, 0)] * (value.ndim - 2)])


def _mask_row(row: Any, mask: Array) -> Any:
    """The row with zeros where `mask`, over its first axes, is False."""
    mask = mask.reshape(*mask.shape, *[1] * (row.ndim - mask.ndim))
    return torch.where(torch.from_numpy(mask), row, 0.0) if isinstance(row, Tensor) else np.where(mask, row, 0.0)


def _drop_rounding(row: Any, scale: Any) -> Any:
    """The row without rounding errors: entries of at most `TOLERANCE` of the scale are set to 0."""
    return _mask_row(row, np.abs(_as_array(row)) > TOLERANCE * scale)


def _nonzero_columns(row: Any) -> list[int]:
    """The columns of a row (n,), or (n, G) in a basis, that are not zero."""
    nonzero = _as_array(row) != 0
    columns: list[int] = np.flatnonzero(nonzero if nonzero.ndim == 1 else nonzero.any(1)).tolist()
    return columns


def _expand_mask(mask: Tensor, table: Tensor) -> Tensor:
    """A mask over the first axes of a table, with axes of length 1 for the others."""
    return mask.reshape(*mask.shape, *[1] * (table.ndim - mask.ndim))
