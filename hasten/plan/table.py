"""Plans: a sampler compiled to a table of numbers, with the fast loop that runs it.

Most samplers only ever add multiples of what they have: the state, the network's answers, fresh noise. On given times
such a sampler *is* the table (see `Plan`) that `plan` reads off it by running its coroutine on symbols.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..denoiser import reset
from ..errors import BadInput, HastenError
from ..pick import format_spec, resolve_sampler
from ..sampling import Callback, Progress, Sampler, check_state, no_noise
from ..schedules.base import Schedule
from ..schedules.serialize import schedule_from_dict
from ..times import as_times, check_times
from ..utils.conditions import conditions_of
from .basis import Basis
from .diagnose import check_result
from .program import NoiseDraws, Program, combine, filled, program, sparse, used
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

    With a `basis` of G groups of directions all of this is in its coordinates: x_j stands for U^T (x_j - alpha_j m),
    x0_j for U^T (x0_j - m), xi_j for U^T xi_j, and every table has a last axis G: one number for each group.

    Args:
        times: (K + 1,). Not always decreasing: Heun with churn goes back up before it asks.
        start: (1 + M,).  a: (K,).  A, B: (K, K), A strictly lower and B lower triangular.  C: (K, M).
        sampler: how the sampler is spelled; schedule: its `to_dict()`. For people and files: running needs neither,
            but the schedule where there is a basis.
        basis: the coordinates, if not those of the samples themselves.
        begin: the time of `x_init`, where a sampler moves it before its first query; None: `times[0]`.
    """

    times: Tensor
    start: Tensor
    a: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    sampler: str = ""
    schedule: dict[str, Any] = field(default_factory=dict)
    basis: Basis | None = None
    begin: float | None = None

    def __post_init__(self) -> None:
        G = self._groups
        K, M = len(self.a), self.C.shape[1] if self.C.ndim > 1 else 0
        shapes = {"times": (K + 1,), "start": (1 + M, *G), "A": (K, K, *G), "B": (K, K, *G), "C": (K, M, *G)}
        for name, shape in {**shapes, **({"a": (K, *G)} if G else {})}.items():
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
        if any(bool(torch.triu(X.detach().movedim((0, 1), (-2, -1)), d).any()) for X, d in ((self.A, 0), (self.B, 1))):
            raise BadInput("plan: a row may use earlier states and answers only (A strictly, B lower triangular)")

    @property
    def _groups(self) -> tuple[int, ...]:
        """The last axis of every table: (G,), or () without a basis."""
        return () if self.basis is None else (self.basis.groups,)

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
        *,
        callback: Callback | None = None,
        cond: Mapping[str, Any] | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Run the plan from `x` (B, *S) at `times[0]`, or `begin`; the result is at `times[-1]`, in the dtype of `x`.

        Args:
            denoiser: `denoiser(x_t, t, **cond) -> x0`; what has a `reset()` is reset once, before the first query.
            noise: gives a fresh (B, *S) draw at each call; needed where `stochastic`.
            progress: called as `progress(queries done, queries in all)`.
            grad: record gradients; by default only where `x` or the coefficients require them.
            callback: called after each query as `callback(step, t, x, x0)`: its number from 0, the time, the state that
                was asked about and the answer. It must not change the tensors.
            cond: the conditions, passed on to the denoiser as keywords. Keywords that the network knows may stand here
                too.

        Raises BadInput for a denoiser of another schedule than the plan's, and for a keyword that is no condition;
        NonFinite for a result that holds NaN or infinity, unless gradients are recorded.
        """
        result = self.run(denoiser, x, noise, progress, grad, callback=callback, cond=cond, **keywords)
        return check_result(result, denoiser, noise, lambda d, xi: self.run(d, x, xi, cond=cond, **keywords))

    def run(
        self, denoiser: Callable[..., Tensor], x: Tensor, noise: Callable[[], Tensor] | None = None,
        progress: Progress | None = None, grad: bool | None = None, *, callback: Callback | None = None,
        cond: Mapping[str, Any] | None = None, **keywords: Any,
    ) -> Tensor:  # fmt: skip
        """As a call of the plan, with a result that may hold NaN or infinity."""
        check_state(x, progress=progress, callback=callback)
        given = conditions_of("plan", OPTIONS, cond, keywords, denoiser)
        if isinstance(schedule := getattr(denoiser, "schedule", None), Schedule):
            self.check_schedule(schedule)
        if grad is None:
            grad = torch.is_grad_enabled() and (x.requires_grad or self.fitted)
        rows = self._program(tensors=True) if self.fitted and grad else self._numbers.beside(x)
        reset(denoiser)
        basis, fresh = self.basis, no_noise if noise is None else noise
        into, back = (_same, _same) if basis is None else (basis.coordinates, basis.pixels)
        draws = NoiseDraws(lambda: into(fresh().to(x.dtype), 0.0))
        with torch.set_grad_enabled(grad):
            alpha = [0.0] * (self.nfe + 1) if basis is None else self._schedule.alpha(self.times).unbind()
            first = alpha[0] if basis is None or self.begin is None else self._schedule.alpha(self.begin)
            state = combine(rows.start, {0: into(x, first)}, {}, draws, basis)
            states, answers = {}, {}
            for k, (t, row) in enumerate(zip(rows.times, rows.rows)):
                states[k] = state
                z = back(state, alpha[k])
                x0 = denoiser(z, t, **given).to(x.dtype)
                answers[k] = into(x0, 1.0)
                if callback is not None:
                    callback(k, t, z, x0)
                state = combine(row, states, answers, draws, basis)
                for j in row.last_states:
                    del states[j]
                for j in row.last_answers:
                    del answers[j]
                if progress is not None:
                    progress(k + 1, self.nfe)
            return back(state, alpha[-1])

    @property
    def fitted(self) -> bool:
        """Whether a coefficient or a time requires a gradient."""
        return any(getattr(self, name).requires_grad for name in ("times", "start", *TABLES))

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuse a schedule whose alpha and sigma at the plan's times are not those that the plan was made for.

        Raises BadInput. A plan that does not say its schedule passes.
        """
        if self.schedule and self.__dict__.get("_checked") is not schedule:
            try:
                own, at = self._schedule, self.times.detach()
            except BadInput:  # one that is not defined in this process
                if json.loads(json.dumps(schedule.to_dict())) != json.loads(json.dumps(self.schedule)):
                    raise
                own, at = schedule, self.times.detach()
            for name in ("alpha", "sigma"):
                here, there = getattr(own, name)(at), getattr(schedule, name)(at)
                if not torch.allclose(here, there, rtol=1e-3, atol=1e-4):
                    k = int((here - there).abs().argmax())
                    raise BadInput(
                        f"the plan was made for {_describe_schedule(own)}, "
                        f"the model has {_describe_schedule(schedule)}: "
                        f"at t = {float(at[k]):.4g} {name} is {float(here[k]):.4g} in one and {float(there[k]):.4g} in "
                        "the other; compile the sampler for this model's schedule"
                    )
            self.__dict__["_checked"] = schedule

    @cached_property
    def _numbers(self) -> Program:
        with torch.inference_mode(False):  # what is kept may be used under autograd later
            return self._program(tensors=False)

    def _program(self, tensors: bool) -> Program:
        return program(self.times, self.start, self.a, self.A, self.B, self.C, tensors)

    @cached_property
    def _schedule(self) -> Schedule:
        return schedule_from_dict(self.schedule)

    def marginals(
        self, mean: Tensor, variance: Tensor, start: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of every state for data N(mean, diag(variance)) and its exact denoiser, without sampling.

        With a `basis` all of it is about the coordinates u of the data, D of them, and of the states.

        Args:
            mean, variance: (D,), of the data; variance 0 is a point mass.
            start: mean and variance (D,) of `x_init`; by default those of the forward process at its time.

        Returns:
            two (K + 1, D) float64 tensors: of the state of every query and of the result.
        """
        mean, variance = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in (mean, variance))
        alpha, sigma = (f(self.times)[:, None] for f in (self._schedule.alpha, self._schedule.sigma))
        if start is None:
            t = self.times[:1] if self.begin is None else torch.tensor([self.begin], dtype=torch.float64)
            start = (
                self._schedule.alpha(t) * mean,
                self._schedule.alpha(t) ** 2 * variance + self._schedule.sigma(t) ** 2,
            )
        begin, a, A, B, C = (self._each(table) for table in (self.start, self.a, self.A, self.B, self.C))
        scale = torch.cat([start[1].sqrt()[None], mean.new_ones(len(begin) - 1, len(mean))])
        # each state as (mean, factors of the independent standard normals: the start and the draws)
        means, factors = [begin[0] * start[0]], [begin * scale]
        answers_mean, answers_factor = [], []
        for k in range(self.nfe):
            gain = alpha[k] * variance / (alpha[k] ** 2 * variance + sigma[k] ** 2)
            answers_mean.append(mean + gain * (means[k] - alpha[k] * mean))
            answers_factor.append(gain * factors[k])
            old, new = used(A.detach()[k]), used(B.detach()[k])
            fresh = torch.cat([mean.new_zeros(1, len(mean)), C[k].expand(-1, len(mean))])
            means.append(
                sum(A[k, j] * means[j] for j in old) + a[k] * means[k] + sum(B[k, j] * answers_mean[j] for j in new)
            )
            factors.append(
                sum(A[k, j] * factors[j] for j in old)
                + a[k] * factors[k]
                + sum(B[k, j] * answers_factor[j] for j in new)
                + fresh
            )
        return torch.stack(means), torch.stack([f.square().sum(0) for f in factors])

    @cached_property
    def gain(self) -> float:
        """The largest standard deviation that the result has for data of mean 0 and variance 1, .1 or .0025, exactly
        denoised: about 1 for a method that does its work, far more where its order is too high for so few steps."""
        _, variances = self.marginals(torch.zeros(3), torch.tensor([1.0, 0.1, 0.0025]))
        return float(variances[-1].max().sqrt())

    def _each(self, table: Tensor) -> Tensor:
        """A table with a last axis that goes over the coordinates of a sample: (..., D) or (..., 1)."""
        return table[..., None] if self.basis is None else table[..., self.basis.index.flatten()]

    def to_json(self) -> str:
        """The plan as JSON, every number to its last bit, zeros of the tables left out; `from_json` is the inverse."""
        told: dict[str, Any] = {"schema": SCHEMA, "sampler": self.sampler, "schedule": self.schedule}
        told["times"] = self.times.tolist()
        told["start"] = self.start.tolist()
        told["a"] = self.a.tolist()
        told.update({name: sparse(getattr(self, name)) for name in ("A", "B", "C")})
        if self.basis is not None:
            told["basis"] = self.basis.to_dict()
        if self.begin is not None:
            told["begin"] = self.begin
        try:
            return json.dumps(told)
        except TypeError as error:
            what = f"the schedule {self.schedule.get('name')} cannot be written: its fields must be numbers or tuples"
            raise BadInput(f"plan: {what} ({error})") from error

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
            basis = Basis.from_dict(told["basis"]) if "basis" in told else None
            groups = () if basis is None else (basis.groups,)
            tables = {name: filled(told[name], K, M if name == "C" else K, groups) for name in ("A", "B", "C")}
            sampler, schedule = str(told["sampler"]), dict(told["schedule"])
            begin = float(told["begin"]) if "begin" in told else None
        except KeyError as error:
            raise BadInput(f"plan: {error} is missing") from error
        except BadInput as error:  # a ValueError too
            raise BadInput(f"plan: {error}") from error
        except (TypeError, ValueError, IndexError) as error:
            raise BadInput(f"plan: its tables cannot be read: {error}") from error
        if basis is not None or "." not in str(schedule.get("name")):  # one's own may be unknown here
            schedule_from_dict(schedule)
        return cls(**vectors, **tables, sampler=sampler, schedule=schedule, basis=basis, begin=begin)

    def table(self) -> str:
        """The plan as text for people: a line a query. In a basis u stands for U^T (x - alpha m), with the range that
        each number has over the directions."""
        name, x = self.schedule.get("name", "?"), "x" if self.basis is None else "u"
        lines = [f"{self.sampler} on {name}: {self.nfe} network evaluations"]
        if self.basis is not None:
            low, high = (float(v) for v in self.basis.values[[0, -1]])
            lines.append(f"{self.basis.kind} basis, {self.basis.groups} variances from {low:.6g} to {high:.6g}")
        if self.begin is not None:
            start = " ".join(_format_term(c, f"{x}(t = {self.begin:.6f})") for _, c in self._numbers.start.states)
            lines.append(f"                 {x}_0 = {start.removeprefix('+ ')}")
        for k, row in enumerate(self._numbers.rows):
            terms = [(c, f"{x}_{j}") for j, c in row.states] + [(c, f"{x}0_{j}") for j, c in row.answers]
            terms += [(c, f"xi_{j}") for j, c in row.draws]
            text = " ".join(_format_term(c, what) for c, what in terms) or "0"
            lines.append(f"t_{k} = {float(self.times[k]):.6f}   {x}_{k + 1} = {text.removeprefix('+ ')}")
        return "\n".join([*lines, f"t_{self.nfe} = {float(self.times[-1]):.6f}"])


def plan(sampler: Sampler, schedule: Schedule, times: Tensor) -> Plan:
    """The table that `sampler` amounts to on these times.

    Each row is written with the shortest history that there is, then the fewest terms: what older answers and draws
    contribute is carried by `a_k x_k` where it is proportional to what they contributed to x_k. Terms of at most 1e-12
    of the largest coefficient of their state (in the start, the answers and the draws) are dropped: they are zeros that
    float64 rounded. Where `times` require gradients, so do the tables and the plan's times.

    Args:
        sampler: with `linear` True. One with a `basis` gives tables in its coordinates.
        times: (steps + 1,) float64, strictly decreasing in [0, 1].

    Raises:
        HastenError: for a sampler with `linear = False`, or one that turns out not to be linear.
        BadInput: for times that do not decrease, or on which the sampler has no finite coefficients.
    """
    sampler = resolve_sampler(sampler)
    if not isinstance(schedule, Schedule):
        raise BadInput(f"plan needs a schedule, such as VPLinear(), found {type(schedule).__name__}")
    times = as_times(times)
    if not sampler.linear:
        why = getattr(sampler, "why", "its steps depend on the values it sees")
        raise HastenError(f"{format_spec(sampler)} cannot be compiled to a plan: {why}; run it with walk()")
    with torch.inference_mode(False):  # a plan may be used under autograd later
        times = times.clone() if times.is_inference() else times
        times = check_times(times)
        tables, basis = trace(sampler, schedule, times), getattr(sampler, "basis", None)
        begin = float(times[0].detach())
        moved = basis is not None and begin != float(tables.times[0].detach())
        made = Plan(*tables, format_spec(sampler), schedule.to_dict(), basis, begin if moved else None)
    made.__dict__["_schedule"] = made.__dict__["_checked"] = schedule
    return made


def _same(x: Tensor, alpha: Any) -> Tensor:
    return x


def _format_term(c: Any, what: str) -> str:
    """A term: "+ 0.5 x_0", or with the least and the largest number of all directions, "+ [0.5, 0.7] u_0"."""
    if isinstance(c, Tensor):
        return f"+ [{float(c.min()):.6g}, {float(c.max()):.6g}] {what}"
    return f"{'-' if c < 0 else '+'} {abs(c):.6g} {what}"


def _describe_schedule(schedule: Schedule) -> str:
    """A schedule in a message: a table by its length."""
    text = repr(schedule)
    table = getattr(schedule, "alphas_cumprod", None)
    return text if table is None else f"{type(schedule).__name__}(table of {len(table)}, last {table[-1]:.4g})"


OPTIONS = tuple(inspect.signature(Plan.__call__).parameters)[1:-1]
