"""Accelerators: each makes a network evaluation cheaper. One frozen dataclass a file; `accelerate` combines them.

An accelerator is any object with the members of `Accelerator`; a class that derives from it inherits the defaults.
`stage` says in which order several are applied:

    EXCHANGE   replaces layers of a copy of the network (quantisation)
    COMPILE    compiles its parts
    PART       gives each process a patch of the image
    WRAP       caches features from one model evaluation to the next
    HALVE      gives each process one half of the batch

What caches something has `reset()`, which every trajectory calls first. No accelerator knows another's name: what two
of them cannot share is a claim of both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from torch import Tensor, nn

from ..denoiser import Denoiser, Wrapper
from ..errors import BadInput
from ..pick import format_spec

if TYPE_CHECKING:
    from ..plan.table import Plan

__all__ = [
    "COMPILE",
    "EXCHANGE",
    "FIRST_SEED",
    "HALVE",
    "PART",
    "WRAP",
    "Accelerator",
    "Call",
    "Conflict",
    "Recorder",
    "SamplingContext",
    "accelerate",
    "ordered",
    "with_defaults",
]

EXCHANGE, COMPILE, PART, WRAP, HALVE = 10, 20, 25, 30, 40
FIRST_SEED = 2_000_000  # of calibration images, far from the seeds that sampling and comparisons begin with
Call = tuple[Tensor, float, dict[str, Tensor]]  # x_t (B, *S), t, conditions: one recorded model evaluation


class Conflict(BadInput):
    """Two accelerators of one denoiser claim the same resource."""


@dataclass(frozen=True)
class SamplingContext:
    """What is known in advance of the sampling that a denoiser is accelerated for.

    Attributes:
        times: t of its model evaluations, in order; None where they are not known in advance (adaptive samplers).
        calls: `calls(n, seed)` samples n images with the plain network and returns its model evaluations in order,
            both branches of guidance in one batch; None where nothing can be sampled.
        claimed: the claims of all accelerators together; `accelerate` fills it in.
    """

    times: tuple[float, ...] | None = None
    calls: Callable[[int, int], list[Call]] | None = None
    claimed: frozenset[str] = frozenset()

    def required(self, who: str) -> tuple[float, ...]:
        """The times of all model evaluations.

        Args:
            who: the accelerator, for the message.

        Raises:
            BadInput: where they are not known in advance.
        """
        if self.times is None:
            raise BadInput(
                f"{who} must know the times of all model evaluations: use a sampler with fixed steps, not an adaptive "
                "one"
            )
        return self.times

    def calibration(self, who: str, n: int, seed: int) -> list[Call]:
        """The model evaluations of n calibration images.

        Args:
            who: the accelerator, for the message.
            n: how many images are sampled.
            seed: of the first of them.

        Raises:
            BadInput: where nothing can be sampled.
        """
        if self.calls is None:
            raise BadInput(
                f"{who} needs calibration samples, and this denoiser comes without: use it on a Model, or on a "
                "pipeline with calls=lambda pipe: pipe(...), a call as it will be used"
            )
        return self.calls(n, seed)


class Recorder(Wrapper):
    """A denoiser that records its model evaluations, in `calls`."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.calls: list[Call] = []

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S)."""
        self.calls.append((x_t, float(t), cond))
        return super().forward(x_t, t, **cond)


class Accelerator(Protocol):
    """What `accelerate` takes. Only `apply` has no default; `with_defaults` adds the others to a class of your own."""

    @property
    def stage(self) -> int:
        """The position among other accelerators, see the module's table."""
        return WRAP

    @property
    def claims(self) -> frozenset[str]:
        """What it cannot share with another: "features", "arithmetic", "graph", "space", "branches"."""
        return frozenset()

    @property
    def min_queries(self) -> int:
        """The fewest model evaluations it works for: a pipeline skips it in shorter samplings, with a warning."""
        return 0

    @property
    def inject(self) -> float:
        """The amount of prior noise that `plan` adds; not 0 where the plan is changed."""
        return 0.0

    @property
    def size(self) -> int | None:
        """The number of processes that share an image, where "space" is claimed; None: all."""
        return None

    def apply(self, denoiser: nn.Module, context: SamplingContext, /) -> nn.Module:
        """The accelerated denoiser, a new one: `denoiser` is not changed.

        Raises:
            BadInput: where it does not work for this network or sampling.
        """
        ...

    def plan(self, plan: Plan, denoiser: Denoiser) -> Plan:
        """The plan that the accelerated denoiser is sampled by; by default unchanged."""
        return plan


class _Defaulted:
    """An accelerator that does not derive from `Accelerator`, with the defaults of what it does not define."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def __getattr__(self, name: str) -> Any:
        for defined in (name, "least_queries") if name == "min_queries" else (name,):  # the latter is its old name
            if hasattr(self._method, defined):
                return getattr(self._method, defined)
        return vars(Accelerator)[name].__get__(self)


def with_defaults(method: Any) -> Accelerator:
    """An accelerator of which every optional member can be read, whatever its class defines.

    Args:
        method: any object with `apply`, such as a dataclass of your own.
    """
    return method if Accelerator in type(method).__mro__ else cast(Accelerator, _Defaulted(method))


def accelerate(
    denoiser: nn.Module,
    accelerators: Iterable[Any],
    context: SamplingContext | None = None,
    *,
    ahead: SamplingContext | None = None,
) -> nn.Module:
    """The denoiser with all these accelerators, applied in the order of their stages.

    Args:
        denoiser: is not changed.
        accelerators: objects with the members of `Accelerator`, in any order.
        context: what is known of the sampling; by default nothing.
        ahead: the old name of `context`.

    Raises:
        Conflict: where two claim the same.
        BadInput: where one does not work for this network or sampling.
    """
    if ahead is not None:
        warnings.warn("accelerate(ahead=) is now context=", DeprecationWarning, stacklevel=2)
    context, methods = context or ahead or SamplingContext(), ordered(accelerators)
    claimed = context.claimed.union(*(with_defaults(method).claims for method in methods))
    context = replace(context, claimed=claimed)
    for method in methods:
        denoiser = method.apply(denoiser, context)
    return denoiser


def ordered(accelerators: Iterable[Any]) -> list[Any]:
    """The accelerators in the order of their stages.

    Raises:
        Conflict: where two claim the same, before any is applied.
    """
    owners: dict[str, Any] = {}
    methods = sorted(accelerators, key=lambda method: with_defaults(method).stage)
    for method in methods:
        for claim in sorted(with_defaults(method).claims):
            if claim in owners:
                both = f"{format_spec(owners[claim])} and {format_spec(method)}"
                raise Conflict(f"{both} both claim {claim!r}: use one of them")
            owners[claim] = method
    return methods
