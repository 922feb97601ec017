"""Plans: a sampler compiled to a table of numbers, with the fast loop that runs it.

Most samplers only add multiples of the state, of the network's outputs and of fresh noise. On given times such a
sampler *is* a table (see `Plan`), which `plan` reads off it by running its coroutine on symbols.
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
from ..processes import Process  # noqa: F401  defines the processes that files name
from ..sampling import Callback, Progress, Sampler, SamplerBase, basis_of, check_process, check_state
from ..schedules.base import Schedule
from ..schedules.serialize import schedule_from_dict
from ..times import as_times, check_times
from ..utils.conditions import conditions_of
from ..utils.random import no_noise
from .basis import Basis
from .branches import branch_evaluator, check_branches
from .diagnose import check_result
from .marginals import marginals
from .program import NoiseDraws, Program, combine, filled, program, sparse
from .text import describe_schedule, format_plan
from .tracing import trace

__all__ = ["Plan", "plan"]

SCHEMAS = (1, 2)  # 2: with branches
TABLES = ("a", "A", "B", "C")


@dataclass(frozen=True, eq=False)
class Plan:
    """A linear sampler on given times, for K model evaluations and M noise draws:

        x_0     = start[0] x_init + sum_j start[1 + j] xi_j
        x_{k+1} = a[k] x_k + sum_{j<k} A[k, j] x_j + sum_{j<=k} B[k, j] x0_j + sum_j C[k, j] xi_j,    k = 0 .. K-1

    `x0_k` is the denoiser's output at (x_k, times[k]), `xi_j` the j-th noise draw, `x_K` the result, at `times[K]`. All
    float64. `start` is (1, 0, ...) except for samplers that add noise before their first evaluation. `A` is zero except
    for methods with a history of noise predictions (x_j and x0_j together), which need more terms in x0 alone.

    With a `basis` of G groups of directions all of this is in its coordinates: x_j stands for U^T (x_j - alpha_j m),
    x0_j for U^T (x0_j - m), xi_j for U^T xi_j, and every table has a last axis G: one number for each group.

    Args:
        times: (K + 1,). Not always decreasing: Heun with churn adds noise before it evaluates.
        start: (1 + M,).
        a: (K,).
        A, B: (K, K), A strictly lower and B lower triangular.
        C: (K, M).
        sampler: the text that `hasten.pick` reads as the sampler. For information only.
        schedule: its `to_dict()`; running needs it only where there is a basis.
        basis: the coordinates, if not those of the samples themselves.
        begin: the time of `x_init`, where a sampler moves it before its first evaluation; None: `times[0]`.
        branches: of classifier-free guidance, "cond" or "uncond", of each evaluation; the rows are then sums
            over the outputs of both, see `guided_plan`. None: every evaluation is the denoiser's as it is.
        guidance_scale: that the numbers of a plan with branches were made for.

    Raises:
        BadInput: for tables of other shapes or dtypes, with numbers that are not finite, or not triangular.
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
    branches: tuple[str, ...] | None = None
    guidance_scale: float | None = None

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
            raise BadInput("plan: a row may use earlier states and outputs only (A strictly, B lower triangular)")
        if self.branches is not None:
            object.__setattr__(self, "branches", check_branches(self.branches, K, self.guidance_scale))

    @property
    def _groups(self) -> tuple[int, ...]:
        """The last axis of every table: (G,), or () without a basis."""
        return () if self.basis is None else (self.basis.groups,)

    @property
    def nfe(self) -> int:
        """Model evaluations per sample, K."""
        return len(self.a)

    steps = nfe

    @property
    def stochastic(self) -> bool:
        """Whether it uses noise other than the initial one."""
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
            denoiser: `denoiser(x_t, t, **cond) -> x0`; modules with a `reset()` are reset once, before the first step.
            x: the initial state (B, *S).
            noise: returns fresh noise (B, *S) at each call; needed where `stochastic`.
            progress: called as `progress(evaluations done, evaluations in total)`.
            grad: record gradients; by default only where `x` or the coefficients require them.
            callback: called after each evaluation as `callback(step, t, x, x0)`: its number from 0, the time, the state
                and the model output. It must not change the tensors.
            cond: the conditions, passed to the denoiser as keyword arguments. Conditions that the network names in its
                `forward` may also be given as keywords.

        Raises:
            BadInput: for a denoiser of another schedule than the plan's, and for a keyword that is no condition.
            NonFinite: for a result that holds NaN or infinity, unless gradients are recorded.
        """
        result = self.run(denoiser, x, noise, progress, grad, callback=callback, cond=cond, **keywords)
        return check_result(result, denoiser, noise, lambda d, xi: self.run(d, x, xi, cond=cond, **keywords))

    def run(
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
        """A call of the plan without the check for NaN and infinity in the result."""
        check_state(x, progress=progress, callback=callback)
        conditions = conditions_of("plan", OPTIONS, cond, keywords, denoiser)
        if isinstance(schedule := getattr(denoiser, "schedule", None), Schedule):
            self.check_schedule(schedule)
        if grad is None:
            grad = torch.is_grad_enabled() and (x.requires_grad or self.fitted)
        rows = self._program(tensors=True) if self.fitted and grad else self._numbers.to(x)
        reset(denoiser)
        evaluate = branch_evaluator(denoiser, self, merge=not (self.fitted and grad))
        basis, draw_noise = self.basis, no_noise if noise is None else noise
        into, back = (_identity, _identity) if basis is None else (basis.coordinates, basis.pixels)
        draws = NoiseDraws(lambda: into(draw_noise().to(x.dtype), 0.0))
        with torch.set_grad_enabled(grad):
            alpha = [0.0] * (self.nfe + 1) if basis is None else self._schedule.alpha(self.times).unbind()
            first = alpha[0] if basis is None or self.begin is None else self._schedule.alpha(self.begin)
            state = combine(rows.start, {0: into(x, first)}, {}, draws, basis)
            states, outputs = {}, {}
            for k, (t, row) in enumerate(zip(rows.times, rows.rows)):
                states[k] = state
                z = back(state, alpha[k])
                x0 = evaluate(k, z, t, conditions).to(x.dtype)
                outputs[k] = into(x0, 1.0)
                if callback is not None:
                    callback(k, t, z, x0)
                state = combine(row, states, outputs, draws, basis)
                for j in row.last_states:
                    del states[j]
                for j in row.last_outputs:
                    del outputs[j]
                if progress is not None:
                    progress(k + 1, self.nfe)
            return back(state, alpha[-1])

    @property
    def fitted(self) -> bool:
        """Whether a coefficient or a time requires a gradient."""
        return any(getattr(self, name).requires_grad for name in ("times", "start", *TABLES))

    def check_schedule(self, schedule: Schedule) -> None:
        """Check that a schedule has the alpha and sigma that the plan was made for, at the plan's times.

        Args:
            schedule: of the denoiser.

        Raises:
            BadInput: where they differ. A plan without a schedule accepts any.
        """
        if self.schedule and self.__dict__.get("_checked") is not schedule:
            try:
                own, at = self._schedule, self.times.detach()
            except BadInput:  # a class that is not defined in this process
                if json.loads(json.dumps(schedule.to_dict())) != json.loads(json.dumps(self.schedule)):
                    raise
                own, at = schedule, self.times.detach()
            if own != schedule and not (own.ordinary and schedule.ordinary):
                raise BadInput(
                    f"the plan was made for {describe_schedule(own)}, the model has {describe_schedule(schedule)}: "
                    "compile one of its own samplers"
                )
            for name in ("alpha", "sigma"):
                here, there = getattr(own, name)(at), getattr(schedule, name)(at)
                if not torch.allclose(here, there, rtol=1e-3, atol=1e-4):
                    k = int((here - there).abs().argmax())
                    raise BadInput(
                        f"the plan was made for {describe_schedule(own)}, "
                        f"the model has {describe_schedule(schedule)}: "
                        f"at t = {float(at[k]):.4g} {name} is {float(here[k]):.4g} in one and {float(there[k]):.4g} in "
                        "the other; compile the sampler for this model's schedule"
                    )
            self.__dict__["_checked"] = schedule

    @cached_property
    def _numbers(self) -> Program:
        """The program with its coefficients as numbers."""
        with torch.inference_mode(False):  # cached values may be used under autograd later
            return self._program(tensors=False)

    def _program(self, tensors: bool) -> Program:
        """The program, with coefficients as tensors or as numbers."""
        return program(self.times, self.start, self.a, self.A, self.B, self.C, tensors)

    @cached_property
    def _schedule(self) -> Schedule:
        """The schedule that the plan was made for."""
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
            two (K + 1, D) float64 tensors: for the state of every evaluation and for the result.
        """
        return marginals(self, mean, variance, start)

    @cached_property
    def gain(self) -> float:
        """The largest standard deviation of the result for data of mean 0 and variance 1, .1 or .0025 and their exact
        denoiser: about 1 for a method that converges, far more where its order is too high for so few steps."""
        _, variances = self.marginals(torch.zeros(3), torch.tensor([1.0, 0.1, 0.0025]))
        return float(variances[-1].max().sqrt())

    def to_json(self) -> str:
        """The plan as JSON, with all bits of every number and without the zeros of the tables; see `from_json`.

        Raises:
            BadInput: for a schedule with fields other than numbers and tuples.
        """
        schema = 1 if self.branches is None else 2
        content: dict[str, Any] = {"schema": schema, "sampler": self.sampler, "schedule": self.schedule}
        content["times"] = self.times.tolist()
        content["start"] = self.start.tolist()
        content["a"] = self.a.tolist()
        content.update({name: sparse(getattr(self, name)) for name in ("A", "B", "C")})
        if self.basis is not None:
            content["basis"] = self.basis.to_dict()
        if self.begin is not None:
            content["begin"] = self.begin
        if self.branches is not None:
            content |= {"branches": list(self.branches), "guidance_scale": self.guidance_scale}
        try:
            return json.dumps(content)
        except TypeError as error:
            what = f"the schedule {self.schedule.get('name')} cannot be written: its fields must be numbers or tuples"
            raise BadInput(f"plan: {what} ({error})") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            BadInput: for other texts, with the first error in it.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise BadInput(f"plan: not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("schema") not in SCHEMAS:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise BadInput(f"plan: schema {found!r} cannot be read; this version of hasten reads up to {SCHEMAS[-1]}")
        try:
            vectors = {name: torch.tensor(content[name], dtype=torch.float64) for name in ("times", "start", "a")}
            K, M = len(vectors["a"]), len(vectors["start"]) - 1
            basis = Basis.from_dict(content["basis"]) if "basis" in content else None
            groups = () if basis is None else (basis.groups,)
            tables = {name: filled(content[name], K, M if name == "C" else K, groups) for name in ("A", "B", "C")}
            sampler, schedule = str(content["sampler"]), dict(content["schedule"])
            begin = float(content["begin"]) if "begin" in content else None
            branches = tuple(map(str, content["branches"])) if "branches" in content else None
            scale = float(content["guidance_scale"]) if branches is not None else None
        except KeyError as error:
            raise BadInput(f"plan: {error} is missing") from error
        except BadInput as error:  # a ValueError too
            raise BadInput(f"plan: {error}") from error
        except (TypeError, ValueError, IndexError) as error:
            raise BadInput(f"plan: its tables cannot be read: {error}") from error
        if basis is not None or "." not in str(schedule.get("name")):  # a class of another package may be unknown here
            schedule_from_dict(schedule)
        more: dict[str, Any] = {"basis": basis, "begin": begin, "branches": branches, "guidance_scale": scale}
        tensors: dict[str, Any] = {**vectors, **tables}
        return cls(**tensors, sampler=sampler, schedule=schedule, **more)

    def table(self) -> str:
        """The plan as readable text, one line per evaluation. In a basis u stands for U^T (x - alpha m), with the range
        of each number over the directions."""
        return format_plan(self, self._numbers)


def plan(sampler: Sampler, schedule: Schedule, times: Tensor) -> Plan:
    """The table of a linear sampler on these times.

    Each row is written with the shortest possible history, then the fewest terms: the contribution of older outputs and
    draws is carried by `a_k x_k` where it is proportional to their contribution to x_k. Terms of at most 1e-12 of the
    largest coefficient of their state (in the initial state, the outputs and the draws) are dropped: they are zeros up
    to float64 rounding. Where `times` require gradients, so do the tables and the plan's times.

    Args:
        sampler: with `linear` True. One with a `basis` gives tables in its coordinates.
        schedule: of the denoiser.
        times: (steps + 1,) float64, strictly decreasing in [0, 1].

    Raises:
        HastenError: for a sampler with `linear = False`, or one that turns out not to be linear.
        BadInput: for times that do not decrease, or on which the sampler has no finite coefficients.
    """
    sampler = resolve_sampler(sampler)
    if not isinstance(schedule, Schedule):
        raise BadInput(f"plan needs a schedule, such as VPLinear(), found {type(schedule).__name__}")
    check_process(sampler, schedule)
    times = as_times(times)
    if not sampler.linear:
        why = getattr(sampler, "why", SamplerBase.why)
        raise HastenError(f"{format_spec(sampler)} cannot be compiled to a plan: {why}; run it with walk()")
    with torch.inference_mode(False):  # a plan may be used under autograd later
        times = times.clone() if times.is_inference() else times
        times = check_times(times)
        tables, basis = trace(sampler, schedule, times), basis_of(sampler, schedule)
        begin = float(times[0].detach())
        moved = basis is not None and begin != float(tables.times[0].detach())
        compiled = Plan(*tables, format_spec(sampler), schedule.to_dict(), basis, begin if moved else None)
    compiled.__dict__["_schedule"] = compiled.__dict__["_checked"] = schedule
    return compiled


def _identity(x: Tensor, alpha: Any) -> Tensor:
    """The samples themselves, as coordinates where there is no basis."""
    return x


OPTIONS = tuple(inspect.signature(Plan.__call__).parameters)[1:-1]
