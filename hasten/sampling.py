"""Running a sampler: its requests for model evaluations (`Query`), and the loop that makes them (`walk`).

A sampler is a frozen dataclass whose `steps` is the paper's algorithm as a coroutine. It never sees the network: it
yields the noisy sample and its time, and is sent the network's estimate of the clean one.

    def steps(self, schedule, x, times, noise):
        for t, s in zip(times, times[1:]):
            x0 = yield Query(x, t)
            ...
        return x
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .denoiser import Wrapper, reset
from .errors import BadInput, HastenError
from .pick import format_spec, resolve_sampler
from .schedules.base import Schedule
from .times import as_times
from .utils.conditions import conditions_of
from .utils.deprecation import forward
from .utils.random import Noise, no_noise

__all__ = ["Bindable", "Count", "Noise", "Query", "Sampler", "SamplerBase", "walk"]

Progress = Callable[[int, int], None]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]
Self = TypeVar("Self", bound="Bindable")


@dataclass(frozen=True, slots=True)
class Query:
    """A model evaluation requested by a sampler: the state `x` (B, *S) at time `t`.

    Without `rows`, an `x` of W B rows is W states of every sample at once: row w B + b belongs to sample b.

    Args:
        x: the state (B, *S).
        t: a float64 tensor in [0, 1], 0-d or one time per row (B,).
        rows: evaluate these samples of the batch only, (R,) integers; `x` is then (R, *S).
        moments: return the pair (x0, E[eps^2 | x_t]), each (B, *S), or what else of two tensors the denoiser's
            `moments` gives, such as x0 and a learned variance.
    """

    x: Any
    t: Tensor
    rows: Tensor | None = None
    moments: bool = False


Steps = Generator[Query, Any, Any]
Evaluate = Callable[..., Any]  # (x (B, *S), t, rows=None) -> x0 (B, *S)


class Sampler(Protocol):
    """What every file of `samplers/` defines: a frozen dataclass of this form. `SamplerBase` has the optional members.

    `linear`: `steps` uses only +, -, * and / by numbers on x, the model outputs and `noise()`, so that it can be
    compiled to a `Plan`. `order`: the convergence order of the method.
    """

    linear: Any
    order: Any

    def nfe(self, steps: int) -> int | None:
        """Model evaluations on a grid of `steps` steps that ends at t = 0; None where they depend on the values."""
        ...

    def steps(self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]) -> Steps:
        """The algorithm, from `x` (B, *S) at `times[0]` to the result at `times[-1]`."""
        ...


class Bindable:
    """Base of methods that may use statistics or networks of a model; by default they need none."""

    def bind(self: Self, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Self:
        """The method with what it needs of a model.

        Args:
            statistics: tensors measured on the model, by name.
            parts: networks tuned for the model, by name.

        Raises:
            BadInput: where the model lacks what the method needs.
        """
        return self


class SamplerBase(Bindable):
    """Defaults of a sampler's optional members. A plain dataclass with the members of `Sampler` is a sampler too.

    `differentiable`: gradients can be recorded. `why`: the reason, where `linear` is False. `processes`: the classes of
    `hasten.processes`, by name, that the sampler is for; by default it is for ordinary schedules.
    """

    processes: ClassVar[tuple[str, ...]] = ()

    differentiable: ClassVar[bool] = True
    why: ClassVar[str] = "its steps depend on the values it sees"

    @property
    def basis(self) -> Any:
        """The `plan.basis.Basis` in which the sampler is linear; None: the samples' own coordinates."""
        return None

    def basis_for(self, schedule: Schedule) -> Any:
        """The basis for this schedule; by default `basis`."""
        return self.basis

    def wrap(self, denoiser: nn.Module) -> nn.Module:
        """The denoiser to sample with; by default the same one."""
        return denoiser

    def solve(
        self: Any, evaluate: Evaluate, schedule: Schedule, x: Tensor, times: Tensor, noise: Callable[[], Tensor]
    ) -> Any:
        """Run the sampler from `x` (B, *S) at `times[0]` to the result at `times[-1]`, by default its coroutine.

        An algorithm driven by another library overrides this in place of `steps`.

        Args:
            evaluate: `evaluate(x, t, rows=None, moments=False) -> x0`, see `Query`.
        """
        coroutine = self.steps(schedule, x, times, noise)
        result = None
        while True:
            try:
                query = coroutine.send(result)
            except StopIteration as stop:
                return stop.value
            result = evaluate(query.x, query.t, query.rows, query.moments)


def basis_of(sampler: Any, schedule: Schedule) -> Any:
    """`sampler.basis_for(schedule)`; for a plain dataclass its `basis`, or None."""
    return sampler.basis_for(schedule) if hasattr(sampler, "basis_for") else getattr(sampler, "basis", None)


def bind_method(method: Any, statistics: Mapping[str, Tensor], parts: Mapping[str, nn.Module]) -> Any:
    """`method.bind(statistics, parts)`, or the method itself where it defines no `bind`."""
    return method.bind(statistics, parts) if hasattr(method, "bind") else method


def wrap_denoiser(method: Any, denoiser: nn.Module, *args: Any) -> Any:
    """`method.wrap(denoiser, *args)`, or the denoiser itself where the method defines no `wrap`."""
    return method.wrap(denoiser, *args) if hasattr(method, "wrap") else denoiser


def walk(
    sampler: Sampler,
    denoiser: Callable[..., Tensor],
    x: Tensor,
    times: Tensor,
    noise: Callable[[], Tensor] | None = None,
    *,
    schedule: Schedule | None = None,
    progress: Progress | None = None,
    grad: bool | None = None,
    callback: Callback | None = None,
    cond: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Tensor:
    """Run the sampler's own coroutine from `x` (B, *S) at `times[0]` to the result at `times[-1]`.

    Args:
        sampler: any sampler, linear or not.
        denoiser: `denoiser(x_t, t, **cond) -> x0`; modules with a `reset()` are reset once, before the first step.
        x: the initial state (B, *S).
        times: (steps + 1,) float64, strictly decreasing in [0, 1].
        noise: returns fresh noise (B, *S) at each call; needed by stochastic samplers only.
        schedule: by default the denoiser's own.
        progress: called as `progress(evaluations done, evaluations in total)`.
        grad: record gradients; by default only where `x` or `times` require them.
        callback: called after each evaluation as `callback(step, t, x, x0)`: its number from 0, the time, the state
            and the model output. It must not change the tensors.
        cond: the conditions, passed to the denoiser as keyword arguments. Conditions that the network names in its
            `forward` may also be given as keywords.

    Returns:
        the result (B, *S), in the dtype of `x`.

    Raises:
        BadInput: for an invalid state, schedule or condition, and for gradients through a sampler without them.
    """
    sampler = resolve_sampler(sampler)
    check_state(x, progress=progress, callback=callback)
    times = as_times(times) if not isinstance(times, Tensor) else times
    schedule = schedule_of(denoiser) if schedule is None else schedule
    check_process(sampler, schedule)
    conditions = conditions_of("walk", OPTIONS, cond, keywords, denoiser)
    draw_noise = no_noise if noise is None else noise
    expected, done, B = sampler.nfe(len(times) - 1), 0, len(x)

    def noise_like_x() -> Any:
        return draw_noise().to(x.dtype)

    def evaluate(state: Any, t: Tensor, rows: Tensor | None = None, moments: bool = False) -> Any:
        nonlocal done
        result = _evaluate(denoiser, Query(state, t, rows, moments), B, conditions)
        result = result if moments else result.to(x.dtype)
        if callback is not None:
            callback(done, t, state, result[0] if moments else result)
        done += 1
        if progress is not None:
            progress(done, max(done, expected or 0))
        return result

    records = _records_gradients(grad, x, times)
    if records and not getattr(sampler, "differentiable", SamplerBase.differentiable):
        raise BadInput(
            f"{format_spec(sampler)} keeps no gradients (its steps follow the values that it sees): detach x, or use a "
            "sampler with fixed steps, such as unipc or heun"
        )
    reset(denoiser)
    solve = getattr(sampler, "solve", None) or functools.partial(SamplerBase.solve, sampler)
    with torch.set_grad_enabled(records):
        result: Tensor = solve(evaluate, schedule, x, times, noise_like_x)
    return result


def _evaluate(denoiser: Any, query: Query, B: int, cond: dict[str, Any]) -> Any:
    """Evaluate the denoiser for a query, with the conditions of the samples that it is about."""
    if query.rows is not None:
        cond = {
            key: value[query.rows.to(value.device)] if _is_batched(value, B) else value for key, value in cond.items()
        }
    elif (repeats := len(query.x) // B) > 1:
        cond = {k: v.repeat(repeats, *[1] * (v.ndim - 1)) if _is_batched(v, B) else v for k, v in cond.items()}
    if query.rows is not None and getattr(denoiser, "takes_rows", False):  # a wrapper with a state of each sample
        cond = {**cond, "rows": query.rows}
    if not query.moments:
        return denoiser(query.x, query.t, **cond)
    if not callable(moments := getattr(denoiser, "moments", None)):
        raise HastenError(f"{type(denoiser).__name__} gives no second moments: bind the sampler's network to it first")
    return moments(query.x, query.t, **cond)


def _is_batched(value: Any, B: int) -> bool:
    """Whether a condition has an entry for each of B samples."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == B


class Count(Wrapper):
    """A denoiser that counts its evaluations: `calls` of the network and `rows` (samples, summed over calls).

    Put inside a guide it counts both branches: a guided step of a batch of B is one call of 2 B rows.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.calls = 0
        self.rows = 0

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Any:
        """The inner denoiser's x0 (B, *S), counted."""
        self.calls += 1
        self.rows += len(x_t)
        return self.denoiser(x_t, t, **cond)

    def features(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The inner denoiser's middle features, counted."""
        self.calls += 1
        self.rows += len(x_t)
        features: tuple[Tensor, Callable[[Tensor], Tensor]] = self.denoiser.features(x_t, t, **cond)
        return features

    def __getattr__(self, name: str) -> Any:
        if name not in ("moments", "raw"):
            return super().__getattr__(name)
        inner = getattr(self.denoiser, name)

        def count_call(x_t: Tensor, t: Tensor, **cond: Any) -> Any:
            self.calls += 1
            self.rows += len(x_t)
            return inner(x_t, t, **cond)

        return count_call


def schedule_of(denoiser: Any) -> Schedule:
    """The schedule of a denoiser.

    Raises:
        BadInput: where it has none.
    """
    schedule = getattr(denoiser, "schedule", None)
    if not isinstance(schedule, Schedule):
        raise BadInput(f"{type(denoiser).__name__} has no schedule: wrap the network in hasten.Denoiser, or name one")
    return schedule


def check_process(sampler: Any, schedule: Schedule) -> None:
    """Check that a sampler is for the forward process of a model.

    Args:
        sampler: an object, with `processes` unless it is for ordinary schedules.
        schedule: of the denoiser.

    Raises:
        BadInput: where it is for another process, with the sampler of this one.
    """
    known, name = tuple(getattr(sampler, "processes", ())), type(schedule).__name__
    if schedule.ordinary and known:
        raise BadInput(
            f"{format_spec(sampler)} is a sampler of {' and '.join(known)}, and this model's process is "
            "x_t = alpha x + sigma eps: use unipc, or another sampler for that"
        )
    if not schedule.ordinary and name not in known:
        own = getattr(schedule, "sampler", "")
        raise BadInput(f"{format_spec(sampler)} is no sampler of the process {name}{f': use {own}' if own else ''}")


def _records_gradients(grad: bool | None, *tensors: Tensor) -> bool:
    """Whether to record gradients: as requested, or by default where a tensor requires them."""
    if grad is None:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return grad


OPTIONS = tuple(inspect.signature(walk).parameters)[:-1]

__getattr__ = forward(__name__, {"draw": "hasten.plan.draw", "spell": "hasten.pick:format_spec"})


def check_state(x: Any, **functions: Any) -> None:
    """Check the initial state and the functions of a sampling call.

    Raises:
        BadInput: for a state that is not a floating tensor (B, *S), and for functions that cannot be called.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"x must be a floating tensor (B, *S), one row a sample, found {found}")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise BadInput(f"{name} must be a function or None, found {function!r}")


def check_noise(noise: Any, x: Any) -> None:
    """Check the noise of a sampling call.

    Raises:
        BadInput: unless it is a `Noise`, or a function where the initial state `x` is given as well.
    """
    if not (callable(noise) and (x is not None or hasattr(noise, "initial"))):
        raise BadInput(f"noise must be a Noise, such as Noise(range(4), (3, 32, 32)), found {type(noise).__name__}")
