"""Running a sampler: the model evaluations it asks for (`Query`), and the loop that makes them (`walk`).

A sampler is a frozen dataclass whose `steps` is the paper's algorithm as a coroutine. It never sees the network: it
yields the noisy sample and its time, and is sent the network's estimate of the clean one.

    def steps(self, schedule, x, times, noise):
        for t, s in zip(times, times[1:]):
            x0 = yield Query(x, t)
            ...
        return x
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

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

if TYPE_CHECKING:
    pass

__all__ = ["Count", "Noise", "Query", "Sampler", "walk"]

Progress = Callable[[int, int], None]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class Query:
    """A question to the denoiser: `x` (B, *S) at time `t`, a float64 tensor in [0, 1], 0-d or one time a row (B,).

    rows: the query is about these samples of the batch only (R,), whole numbers; `x` (R, *S).
    moments: the answer wanted is the pair (x0, E[eps^2 | x_t]), each (B, *S), from the denoiser's `moments`.

    Without `rows`, an `x` of W B rows asks about W states of every sample at once: row w B + b is of sample b.
    """

    x: Any
    t: Tensor
    rows: Tensor | None = None
    moments: bool = False


class Sampler(Protocol):
    """What every file of `samplers/` holds: a frozen dataclass of this form.

    `linear` says that `steps` uses only +, -, * and / by numbers on x, the answers and `noise()`, so that it can be
    compiled to a `Plan`; where it is False, `why` may say why not. `differentiable` False: gradients are refused.
    `order` is the convergence order the method claims.
    `nfe(steps)` is how many queries it makes on a grid of `steps` steps that ends at t = 0, None where only the run
    tells. An algorithm that a library drives, calling back, is written as `solve(ask, schedule, x, times, noise)`
    in place of `steps`, where `ask(x, t, rows=None)` gives x0. What needs something measured on the model, or a network
    beside it, has `bind(statistics, parts)`, which returns the sampler that has it.
    """

    linear: Any
    order: Any

    def nfe(self, steps: int) -> int | None: ...

    def steps(
        self, schedule: Schedule, x: Any, times: Tensor, noise: Callable[[], Any]
    ) -> Generator[Query, Any, Any]: ...


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
        denoiser: `denoiser(x_t, t, **cond) -> x0`; modules with a `reset()` are reset once, before the first step.
        noise: gives a fresh (B, *S) draw at each call; needed by stochastic samplers only.
        schedule: by default the denoiser's own.
        progress: called as `progress(queries done, queries in all)`.
        grad: record gradients; by default only where `x` or `times` require them.
        callback: called after each evaluation as `callback(step, t, x, x0)`: its number from 0, the time, the state
            that was asked about and the answer. It must not change the tensors.
        cond: the conditions, passed on to the denoiser as keywords. Keywords that the network knows may stand here too.

    Returns (B, *S) in the dtype of `x`.
    """
    sampler = resolve_sampler(sampler)
    check_state(x, progress=progress, callback=callback)
    times = as_times(times) if not isinstance(times, Tensor) else times
    schedule = _schedule_of(denoiser) if schedule is None else schedule
    given = conditions_of("walk", OPTIONS, cond, keywords, denoiser)
    fresh = no_noise if noise is None else noise
    expected, done, B = sampler.nfe(len(times) - 1), 0, len(x)

    def noise_like_x() -> Any:
        return fresh().to(x.dtype)

    def answer(query: Query) -> Any:
        nonlocal done
        result = _evaluate(denoiser, query, B, given)
        result = result if query.moments else result.to(x.dtype)
        if callback is not None:
            callback(done, query.t, query.x, result[0] if query.moments else result)
        done += 1
        if progress is not None:
            progress(done, max(done, expected or 0))
        return result

    records = _records(grad, x, times)
    if records and not getattr(sampler, "differentiable", True):
        raise BadInput(
            f"{format_spec(sampler)} keeps no gradients (its steps follow the values that it sees): detach x, or use a "
            "sampler with fixed steps, such as unipc or heun"
        )
    reset(denoiser)
    with torch.set_grad_enabled(records):
        if hasattr(sampler, "solve"):
            return sampler.solve(lambda x, t, rows=None: answer(Query(x, t, rows)), schedule, x, times, noise_like_x)
        coroutine = sampler.steps(schedule, x, times, noise_like_x)
        result = None
        while True:
            try:
                query = coroutine.send(result)
            except StopIteration as stop:
                return stop.value
            result = answer(query)


def _evaluate(denoiser: Any, query: Query, B: int, cond: dict[str, Any]) -> Any:
    """The denoiser's answer to a query, with the conditions of the samples that it is about."""
    if query.rows is not None:
        cond = {key: value[query.rows.to(value.device)] if _each(value, B) else value for key, value in cond.items()}
    elif (many := len(query.x) // B) > 1:
        cond = {k: v.repeat(many, *[1] * (v.ndim - 1)) if _each(v, B) else v for k, v in cond.items()}
    if query.rows is not None and getattr(denoiser, "takes_rows", False):  # a wrapper with something of each sample
        cond = {**cond, "rows": query.rows}
    if not query.moments:
        return denoiser(query.x, query.t, **cond)
    if not callable(moments := getattr(denoiser, "moments", None)):
        raise HastenError(f"{type(denoiser).__name__} gives no second moments: bind the sampler's network to it first")
    return moments(query.x, query.t, **cond)


def _each(value: Any, B: int) -> bool:
    """Whether a condition has an entry for each of B samples."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == B


def batch_progress(progress: Progress | None, start: int, n: int, batch_size: int) -> Progress | None:
    """`progress` of the batch that begins at image `start`, as a share of all `n` images."""
    if progress is None:
        return None
    if not callable(progress):
        raise BadInput(f"progress must be a function or None, found {progress!r}")
    before, batches = start // batch_size, -(-n // batch_size)
    return lambda done, total: progress(before * total + done, batches * total)


class Count(Wrapper):
    """A denoiser that counts what passes through: `calls` of the network and `rows` (samples, summed over calls).

    Put inside a guide it counts both branches: a guided step of a batch of B is one call of 2 B rows.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.calls = 0
        self.rows = 0

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.calls += 1
        self.rows += len(x_t)
        return self.denoiser(x_t, t, **cond)

    def features(self, x_t: Tensor, t: Tensor, **cond: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self.calls += 1
        self.rows += len(x_t)
        return self.denoiser.features(x_t, t, **cond)  # type: ignore[operator]

    def __getattr__(self, name: str) -> Any:
        if name not in ("moments", "raw"):
            return super().__getattr__(name)
        inner = getattr(self.denoiser, name)

        def counted(x_t: Tensor, t: Tensor, **cond: Any) -> Any:
            self.calls += 1
            self.rows += len(x_t)
            return inner(x_t, t, **cond)

        return counted


def _schedule_of(denoiser: Any) -> Schedule:
    schedule = getattr(denoiser, "schedule", None)
    if not isinstance(schedule, Schedule):
        raise BadInput(f"{type(denoiser).__name__} has no schedule: wrap the network in hasten.Denoiser, or name one")
    return schedule


def _records(grad: bool | None, *tensors: Tensor) -> bool:
    if grad is None:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return grad


OPTIONS = tuple(inspect.signature(walk).parameters)[:-1]

__getattr__ = forward(__name__, {"draw": "hasten.plan.draw", "spell": "hasten.pick"})


def check_state(x: Any, **functions: Any) -> None:
    """Refuse a state to start from that is not a floating tensor (B, *S), and functions that cannot be called."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"x must be a floating tensor (B, *S), one row a sample, found {found}")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise BadInput(f"{name} must be a function or None, found {function!r}")


def check_noise(noise: Any, x: Any) -> None:
    """Refuse noise that is no `Noise`, nor a function where the state to start from is given as well."""
    if not (callable(noise) and (x is not None or hasattr(noise, "initial"))):
        raise BadInput(f"noise must be a Noise, such as Noise(range(4), (3, 32, 32)), found {type(noise).__name__}")
