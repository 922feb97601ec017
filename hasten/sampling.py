"""Running a sampler: what it asks (`Query`), the randomness it gets (`Noise`), and the loop (`walk`, `draw`).

A sampler is a frozen dataclass whose `steps` is the paper's algorithm as a coroutine. It never sees the network: it
yields the noisy sample and its time, and is sent the network's estimate of the clean one.

    def steps(self, schedule, x, times, noise):
        for t, s in zip(times, times[1:]):
            x0 = yield Query(x, t)
            ...
        return x
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .denoiser import Wrapper
from .errors import BadInput, HastenError
from .schedules import Schedule

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["Count", "Noise", "Query", "Sampler", "draw", "spell", "walk"]

Progress = Callable[[int, int], None]


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
    compiled to a `Plan`; where it is False, `why` may say why not. `order` is the convergence order the method claims.
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


class Noise:
    """Standard normal noise with one generator per sample: draw k of sample i depends on `seeds[i]` and k alone.

    So image 7 is the same image in a batch of 1, 7 or 64, in any order and on any device: the numbers are always drawn
    in float32 on the CPU, then moved and cast. The starting noise is what `torch.randn(shape, generator=g)` gives
    for a CPU generator `g` with that seed; later draws go on from there.

    Args:
        seeds: one whole number per sample, B of them.
        shape: shape S of one sample.
        dtype, device: of the results.
    """

    def __init__(
        self,
        seeds: Iterable[int],
        shape: Iterable[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seeds = tuple(int(seed) for seed in seeds)
        self.shape = tuple(int(size) for size in shape)
        self.dtype = dtype
        self.device = torch.device(device)
        self._generators: list[torch.Generator] | None = None
        if not self.seeds:
            raise BadInput("Noise needs at least one seed")

    def __len__(self) -> int:
        return len(self.seeds)

    def initial(self) -> Tensor:
        """The noise to start from, (B, *S); the same at every call."""
        return self._draw(self._fresh())

    def draw(self) -> Tensor:
        """The next fresh noise, (B, *S). `noise()` is the same."""
        if self._generators is None:
            self._generators = self._fresh()
            self._draw(self._generators)  # the starting noise comes first, whether or not it was asked for
        return self._draw(self._generators)

    __call__ = draw

    def rows(self, part: slice) -> Noise:
        """The noise of these samples alone, from its beginning: `noise.rows(slice(0, 8))`."""
        return Noise(self.seeds[part], self.shape, self.dtype, self.device)

    def _fresh(self) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def _draw(self, generators: list[torch.Generator]) -> Tensor:
        drawn = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators])
        return drawn.to(self.device, self.dtype)


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
    **cond: Any,
) -> Tensor:
    """Run the sampler's own coroutine from `x` (B, *S) at `times[0]` to the result at `times[-1]`.

    Args:
        denoiser: `denoiser(x_t, t, **cond) -> x0`; modules with a `reset()` are reset once, before the first step.
        noise: gives a fresh (B, *S) draw at each call; needed by stochastic samplers only.
        schedule: by default the denoiser's own.
        progress: called as `progress(queries done, queries in all)`.
        grad: record gradients; by default only where `x` or `times` require them.
        cond: passed on to the denoiser.
    """
    schedule = _schedule_of(denoiser) if schedule is None else schedule
    noise = no_noise if noise is None else noise
    expected, done, B = sampler.nfe(len(times) - 1), 0, len(x)

    def answer(query: Query) -> Any:
        nonlocal done
        result = _ask(denoiser, query, B, cond)
        done += 1
        if progress is not None:
            progress(done, max(done, expected or 0))
        return result

    reset(denoiser)
    with torch.set_grad_enabled(_records(grad, x, times)):
        if hasattr(sampler, "solve"):
            return sampler.solve(lambda x, t, rows=None: answer(Query(x, t, rows)), schedule, x, times, noise)
        coroutine = sampler.steps(schedule, x, times, noise)
        result = None
        while True:
            try:
                query = coroutine.send(result)
            except StopIteration as stop:
                return stop.value
            result = answer(query)


def _ask(denoiser: Any, query: Query, B: int, cond: dict[str, Any]) -> Any:
    """The denoiser's answer to a query, with the conditions of the samples that it is about."""
    if query.rows is not None:
        cond = {key: value[query.rows.to(value.device)] if _each(value, B) else value for key, value in cond.items()}
    elif (many := len(query.x) // B) > 1:
        cond = {k: v.repeat(many, *[1] * (v.ndim - 1)) if _each(v, B) else v for k, v in cond.items()}
    if not query.moments:
        return denoiser(query.x, query.t, **cond)
    if not callable(moments := getattr(denoiser, "moments", None)):
        raise HastenError(f"{type(denoiser).__name__} gives no second moments: bind the sampler's network to it first")
    return moments(query.x, query.t, **cond)


def _each(value: Any, B: int) -> bool:
    """Whether a condition has an entry for each of B samples."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == B


def draw(
    denoiser: Callable[..., Tensor],
    sampler: Sampler | None,
    times: Tensor | Callable[[Schedule, Any], Tensor],
    noise: Noise,
    *,
    steps: int | None = None,
    x: Tensor | None = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
    **cond: Any,
) -> Tensor:
    """Samples (B, *S): start from noise and run the sampler, compiled to a `Plan` where it can be.

    Args:
        times: the float64 times, or a grid that makes them from the denoiser's schedule and `steps`.
        noise: the starting noise and all draws.
        x: the state to start from; by default `noise.initial()` times `schedule.prior_std(times[0])`.
        plan: run this plan; `sampler`, `times` and `steps` are then not used.
        cond: passed on to the denoiser.
    """
    schedule = _schedule_of(denoiser)
    if plan is None and sampler is None:
        raise BadInput("draw needs a sampler or a plan")
    if plan is not None:
        times = plan.times
    elif not isinstance(times, Tensor):
        times = times(schedule, steps)
    if x is None:
        first = times[0].detach() if plan is None or plan.begin is None else plan.begin
        x = noise.initial() * float(schedule.prior_std(first))
    if plan is None and sampler is not None:
        if not sampler.linear:
            return walk(sampler, denoiser, x, times, noise, progress=progress, **cond)
        plan = _compiled(sampler, schedule, times)
    return plan(denoiser, x, noise, progress=progress, **cond)  # type: ignore[misc]


def _compiled(sampler: Any, schedule: Schedule, times: Tensor) -> Plan:
    from .plan import plan

    if times.requires_grad:
        return plan(sampler, schedule, times)
    return _cached(sampler, schedule, tuple(times.tolist()))  # type: ignore[arg-type]  # a frozen dataclass hashes


@functools.lru_cache(maxsize=16)
def _cached(sampler: Any, schedule: Schedule, times: tuple[float, ...]) -> Plan:
    from .plan import plan

    return plan(sampler, schedule, torch.tensor(times, dtype=torch.float64))


def reset(denoiser: Any) -> None:
    """Tell every module inside that a new trajectory begins: each class that defines `reset` has it called once."""
    if isinstance(denoiser, nn.Module):
        for module in denoiser.modules():
            if callable(getattr(type(module), "reset", None)):
                module.reset()  # type: ignore[operator]


def part(progress: Progress | None, start: int, n: int, batch_size: int) -> Progress | None:
    """`progress` of the batch that begins at image `start`, as a share of all `n` images."""
    if progress is None:
        return None
    before, batches = start // batch_size, -(-n // batch_size)
    return lambda done, total: progress(before * total + done, batches * total)


@dataclass
class Way:
    """How images are made, all found and bound to a model: see `Model.way`.

    denoiser: accelerated and guided. inner: accelerated alone.
    """

    denoiser: nn.Module
    inner: nn.Module
    plan: Plan | None
    sampler: Any
    times: Tensor
    start: Any = None

    @property
    def nfe(self) -> float | None:
        """Queries of the denoiser an image, without those of the start; None where only the run tells."""
        return self.sampler.nfe(len(self.times) - 1) if self.plan is None else self.plan.nfe


def no_noise() -> Tensor:
    """The noise of a deterministic sampler. Raises HastenError when it is drawn after all."""
    raise HastenError("this sampler draws noise as it goes: pass noise=Noise(seeds, shape)")


def spell(method: Any) -> str:
    """How a method is written on the command line: `"heun:churn=0.1"`, the fields that are not at their default.

    The name is the class attribute `name` where there is one, else the file that defines the class.
    """
    name = getattr(type(method), "name", None) or type(method).__module__.rpartition(".")[2]
    options = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if not field.metadata.get("bound") and value != field.default:
            options.append(f"{field.name}={_text(value)}")
    return name + (":" + ",".join(options) if options else "")


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ",".join(_text(item) for item in value) + ")"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


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


def _schedule_of(denoiser: Any) -> Schedule:
    schedule = getattr(denoiser, "schedule", None)
    if not isinstance(schedule, Schedule):
        raise BadInput(f"{type(denoiser).__name__} has no schedule: wrap the network in hasten.Denoiser, or name one")
    return schedule


def _records(grad: bool | None, *tensors: Tensor) -> bool:
    if grad is None:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return grad
