"""Plans: a sampler compiled to a table of numbers, with the fast loop that runs it.

Most samplers only ever add multiples of what they have: the state, the network's answers, fresh noise. On given times
such a sampler *is* the table (see `Plan`) that `plan` reads off it by running its coroutine on symbols.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import BadInput, HastenError
from .sampling import Progress, Sampler, no_noise, reset, spell
from .schedules import Schedule, schedule_from_dict
from .times import check_times
from .tracing import trace

__all__ = ["Plan", "plan"]

SCHEMA = 1
TABLES = ("a", "A", "B", "C")


@dataclass(frozen=True, eq=False)
class Plan:
    """What a linear sampler does on given times, for K queries and M noise draws:

        x_0     = start[0] x_init + sum_j start[1 + j] xi_j
        x_{k+1} = a[k] x_k + sum_{j<k} A[k, j] x_j + sum_{j<=k} B[k, j] x0_j + sum_j C[k, j] xi_j,    k = 0 .. K-1

    `x0_k` is the denoiser's answer at (x_k, times[k]), `xi_j` the j-th noise draw, `x_K` the result, at `times[K]`. All
    float64. `start` is (1, 0, ...) but for samplers that add noise before their first query. `A` is zero but for
    methods that keep a history of noise predictions (x_j and x0_j together), for which the x0 alone take more terms.

    Args:
        times: (K + 1,). Not always decreasing: Heun with churn goes back up before it asks.
        start: (1 + M,).  a: (K,).  A, B: (K, K), A strictly lower and B lower triangular.  C: (K, M).
        sampler: how the sampler is spelled; schedule: its `to_dict()`. For people and files: running needs neither.
    """

    times: Tensor
    start: Tensor
    a: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    sampler: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        K, M = len(self.a), self.C.shape[-1]
        for name, shape in {"times": (K + 1,), "start": (1 + M,), "A": (K, K), "B": (K, K), "C": (K, M)}.items():
            found = getattr(self, name)
            if found.shape != shape or found.dtype != torch.float64:
                raise BadInput(f"plan: {name} must be float64 {shape}, found {found.dtype} {tuple(found.shape)}")
            if not bool(torch.isfinite(found.detach()).all()):
                raise BadInput(f"plan: {name} holds a number that is not finite")
        if K < 1 or self.a.dtype != torch.float64 or not bool(torch.isfinite(self.a.detach()).all()):
            raise BadInput(
                f"plan: a must be 1 or more finite float64 numbers, found {self.a.dtype} {tuple(self.a.shape)}"
            )
        if not bool(((self.times.detach() >= 0) & (self.times.detach() <= 1)).all()):
            raise BadInput("plan: times must lie in [0, 1]")
        if bool(torch.triu(self.A.detach()).any()) or bool(torch.triu(self.B.detach(), 1).any()):
            raise BadInput("plan: a row may use earlier states and answers only (A strictly, B lower triangular)")

    @property
    def nfe(self) -> int:
        """Queries per sample, K."""
        return len(self.a)

    steps = nfe

    @property
    def stochastic(self) -> bool:
        """Whether it uses noise beyond the start."""
        return bool(self.C.detach().any()) or bool(self.start.detach()[1:].any())

    def __call__(
        self,
        denoiser: Callable[..., Tensor],
        x: Tensor,
        noise: Callable[[], Tensor] | None = None,
        progress: Progress | None = None,
        grad: bool | None = None,
        **cond: Any,
    ) -> Tensor:
        """Run the plan from `x` (B, *S) at `times[0]`; the result is at `times[-1]`, in the dtype of `x`.

        Args:
            denoiser: `denoiser(x_t, t, **cond) -> x0`; what has a `reset()` is reset once, before the first query.
            noise: gives a fresh (B, *S) draw at each call; needed where `stochastic`.
            progress: called as `progress(queries done, queries in all)`.
            grad: record gradients; by default only where `x` or the coefficients require them.
        """
        fitted = any(getattr(self, name).requires_grad for name in ("times", "start", *TABLES))
        if grad is None:
            grad = torch.is_grad_enabled() and (x.requires_grad or fitted)
        program = self._program(tensors=True) if fitted and grad else self._numbers
        reset(denoiser)
        draws = _Draws(no_noise if noise is None else noise)
        with torch.set_grad_enabled(grad):
            state = _combine(program.start, {0: x}, {}, draws)
            states, answers = {}, {}
            for k, (t, row) in enumerate(zip(program.times, program.rows)):
                states[k] = state
                answers[k] = denoiser(state, t, **cond)
                state = _combine(row, states, answers, draws)
                for j in row.last_states:
                    del states[j]
                for j in row.last_answers:
                    del answers[j]
                if progress is not None:
                    progress(k + 1, len(program.rows))
        return state

    @cached_property
    def _numbers(self) -> _Program:
        return self._program(tensors=False)

    def _program(self, tensors: bool) -> _Program:
        """The rows as lists of what to multiply by what, and when a piece of history is used for the last time."""
        K = self.nfe
        X = (self.A + torch.diag(self.a)).detach()
        last_x = [max([k, *_used(X[:, k])]) for k in range(K)]
        last_x0 = [max([k, *_used(self.B.detach()[:, k])]) for k in range(K)]

        def terms(row: Tensor) -> list[tuple[int, Any]]:
            return [(j, row[j] if tensors else float(row[j])) for j in _used(row.detach())]

        rows = []
        for k in range(K):
            states = terms(self.A[k]) + [(k, self.a[k] if tensors else float(self.a[k]))] * bool(self.a[k] != 0)
            rows.append(
                _Row(
                    states=states[::-1],
                    answers=terms(self.B[k])[::-1],
                    draws=terms(self.C[k]),
                    last_states=[j for j in range(K) if last_x[j] == k],
                    last_answers=[j for j in range(K) if last_x0[j] == k],
                )
            )
        start = _Row(terms(self.start[:1]), [], terms(self.start[1:]), [], [])
        times = self.times if tensors else self.times.detach()
        return _Program(list(times[:-1].unbind()), start, rows)

    def marginals(
        self, mean: Tensor, variance: Tensor, start: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of every state for data N(mean, diag(variance)) and its exact denoiser, without sampling.

        Args:
            mean, variance: (D,), of the data; variance 0 is a point mass.
            start: mean and variance (D,) of `x_init`; by default those of the forward process at `times[0]`.

        Returns:
            two (K + 1, D) float64 tensors: of the state of every query and of the result.
        """
        schedule = schedule_from_dict(self.schedule)
        mean, variance = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (mean, variance))
        alpha, sigma = (f(self.times)[:, None] for f in (schedule.alpha, schedule.sigma))
        if start is None:
            start = alpha[0] * mean, alpha[0] ** 2 * variance + sigma[0] ** 2
        scale = torch.cat([start[1].sqrt()[None], mean.new_ones(len(self.start) - 1, len(mean))])
        # each state as (mean, factors of the independent standard normals: the start and the draws)
        means, factors = [self.start[0] * start[0]], [self.start[:, None] * scale]
        answers_mean, answers_factor = [], []
        noise = torch.cat([mean.new_zeros(self.nfe, 1), self.C], 1)
        X = self.A + torch.diag(self.a)
        for k in range(self.nfe):
            gain = alpha[k] * variance / (alpha[k] ** 2 * variance + sigma[k] ** 2)
            answers_mean.append(mean + gain * (means[k] - alpha[k] * mean))
            answers_factor.append(gain * factors[k])
            old, new = _used(X.detach()[k]), _used(self.B.detach()[k])
            means.append(sum(X[k, j] * means[j] for j in old) + sum(self.B[k, j] * answers_mean[j] for j in new))
            factors.append(
                sum(X[k, j] * factors[j] for j in old)
                + sum(self.B[k, j] * answers_factor[j] for j in new)
                + noise[k][:, None]
            )
        return torch.stack(means), torch.stack([f.square().sum(0) for f in factors])

    def to_json(self) -> str:
        """The plan as JSON, every number to its last bit, zeros of the tables left out; `from_json` is the inverse."""
        told: dict[str, Any] = {"schema": SCHEMA, "sampler": self.sampler, "schedule": self.schedule}
        told["times"] = self.times.tolist()
        told["start"] = self.start.tolist()
        told["a"] = self.a.tolist()
        for name in ("A", "B", "C"):
            told[name] = [[[j, float(row[j])] for j in _used(row)] for row in getattr(self, name).detach()]
        return json.dumps(told)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote. Raises `BadInput` that says what is wrong with it."""
        try:
            told = json.loads(text)
        except ValueError as error:
            raise BadInput(f"plan: not JSON: {error}") from error
        if not isinstance(told, dict) or told.get("schema") != SCHEMA:
            found = told.get("schema") if isinstance(told, dict) else type(told).__name__
            raise BadInput(f"plan: schema {found!r} cannot be read; this version of hasten reads {SCHEMA}")
        try:
            vectors = {name: torch.tensor(told[name], dtype=torch.float64) for name in ("times", "start", "a")}
            K, M = len(vectors["a"]), len(vectors["start"]) - 1
            tables = {name: _filled(told[name], K, M if name == "C" else K) for name in ("A", "B", "C")}
            sampler, schedule = str(told["sampler"]), dict(told["schedule"])
        except KeyError as error:
            raise BadInput(f"plan: {error} is missing") from error
        except (TypeError, ValueError, IndexError) as error:
            raise BadInput(f"plan: its tables cannot be read: {error}") from error
        schedule_from_dict(schedule)
        return cls(**vectors, **tables, sampler=sampler, schedule=schedule)

    def table(self) -> str:
        """The plan as text for people: a line a query."""
        name = self.schedule.get("name", "?")
        lines = [f"{self.sampler} on {name}: {self.nfe} network evaluations"]
        for k, row in enumerate(self._numbers.rows):
            terms = [(c, f"x_{j}") for j, c in row.states] + [(c, f"x0_{j}") for j, c in row.answers]
            terms += [(c, f"xi_{j}") for j, c in row.draws]
            text = " ".join(f"{'-' if c < 0 else '+'} {abs(c):.6g} {what}" for c, what in terms) or "0"
            lines.append(f"t_{k} = {float(self.times[k]):.6f}   x_{k + 1} = {text.removeprefix('+ ')}")
        return "\n".join([*lines, f"t_{self.nfe} = {float(self.times[-1]):.6f}"])


def plan(sampler: Sampler, schedule: Schedule, times: Tensor) -> Plan:
    """The table that `sampler` amounts to on these times.

    Each row is written with the shortest history that there is, then the fewest terms: what older answers and draws
    contribute is carried by `a_k x_k` where it is proportional to what they contributed to x_k. Terms of at most 1e-12
    of the largest coefficient of their state (in the start, the answers and the draws) are dropped: they are zeros that
    float64 rounded. Where `times` require gradients, so do the tables and the plan's times.

    Args:
        sampler: with `linear` True.
        times: (steps + 1,) float64, strictly decreasing in [0, 1].

    Raises:
        HastenError: for a sampler with `linear = False`, or one that turns out not to be linear.
        BadInput: for times that do not decrease, or on which the sampler has no finite coefficients.
    """
    if not sampler.linear:
        raise HastenError(
            f"{spell(sampler)} cannot be compiled to a plan: its steps depend on the values it sees; run it with walk()"
        )
    tables = trace(sampler, schedule, check_times(times.to(torch.float64)))
    return Plan(*tables, sampler=spell(sampler), schedule=schedule.to_dict())


class _Row(NamedTuple):
    """(index, coefficient) of every term of a row, newest first, and the history that nothing later uses."""

    states: list[tuple[int, Any]]
    answers: list[tuple[int, Any]]
    draws: list[tuple[int, Any]]
    last_states: list[int]
    last_answers: list[int]


class _Program(NamedTuple):
    times: list[Tensor]
    start: _Row
    rows: list[_Row]


class _Draws:
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


def _combine(row: _Row, states: Any, answers: Any, draws: Any) -> Tensor:
    """The sum of the terms of a row. Never changes what it reads: history and wrappers may hold it."""
    total: Any = None
    for source, terms in ((states, row.states), (answers, row.answers), (draws, row.draws)):
        for j, c in terms:
            value = source[j]
            if total is None:
                total = value * c
            elif isinstance(c, float) and not total.requires_grad:
                total = total.add_(value, alpha=c)
            else:
                total = total + c * value
    return torch.zeros_like(next(iter(states.values()))) if total is None else total


def _used(row: Tensor) -> list[int]:
    return row.nonzero().flatten().tolist()


def _filled(rows: list[list[list[float]]], height: int, width: int) -> Tensor:
    table = torch.zeros(height, width, dtype=torch.float64)
    if len(rows) != height:
        raise ValueError(f"{len(rows)} rows where there are {height} queries")
    for k, row in enumerate(rows):
        for j, value in row:
            if not 0 <= j < width:
                raise ValueError(f"row {k} has an entry in column {j} of {width}")
            table[k, j] = value
    return table


class _Callable(types.ModuleType):
    """`hasten.plan` is this module and, called, the function of that name in it."""

    __call__: Callable[..., Plan] = staticmethod(plan)


sys.modules[__name__].__class__ = _Callable
