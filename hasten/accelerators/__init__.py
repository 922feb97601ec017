"""Accelerators: each makes a network evaluation cheaper. One frozen dataclass a file; `accelerate` puts them together.

An accelerator has

    stage: ClassVar[int]                 where it stands among others: EXCHANGE < COMPILE < PART < WRAP < HALVE
    claims: ClassVar[frozenset[str]]     what it cannot share with another: "features", "arithmetic", "graph", "space",
                                         "branches"
    least_queries: ClassVar[int] = 0     a sampling of fewer is not for it: a pipeline leaves it out, with a warning
    apply(denoiser, ahead) -> denoiser   the denoiser it is given stays as it was

EXCHANGE swaps layers of a copy of the network, COMPILE compiles its parts, PART gives each process a part of the image,
WRAP keeps something from one query to the next, HALVE gives each process half of the batch. What keeps something has
`reset()`, which every trajectory calls first. None knows another's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ..denoiser import Wrapper
from ..errors import BadInput
from ..pick import format_spec

__all__ = [
    "COMPILE", "EXCHANGE", "FIRST_SEED", "HALVE", "PART", "WRAP", "Accelerator", "SamplingContext", "Call", "Conflict",
    "Recorder", "accelerate", "ordered",
]  # fmt: skip

EXCHANGE, COMPILE, PART, WRAP, HALVE = 10, 20, 25, 30, 40
FIRST_SEED = 2_000_000  # of the images that are looked at beforehand, far from those that sample and compare begin with
Call = tuple[Tensor, float, dict[str, Tensor]]  # x_t (B, *S), t, conditions: what a denoiser is asked


class Conflict(BadInput):
    """Two accelerators of one denoiser need the same thing for themselves."""


@dataclass(frozen=True)
class SamplingContext:
    """What is known of the sampling to come.

    times: of its queries, in order; None where only the run tells (an adaptive sampler).
    calls: `calls(n, seed)` samples n images with the plain network and gives the calls that it was asked, in order,
        guidance's two branches in one batch; None where nothing can be sampled.
    claimed: what all the chosen accelerators claim together; `accelerate` fills it in.
    """

    times: tuple[float, ...] | None = None
    calls: Callable[[int, int], list[Call]] | None = None
    claimed: frozenset[str] = frozenset()

    def required(self, who: str) -> tuple[float, ...]:
        """The times. Raises BadInput, in the name of `who`, where they are not known."""
        if self.times is None:
            raise BadInput(
                f"{who} must know the times of all queries: use a sampler with fixed steps, not an adaptive one"
            )
        return self.times

    def calibration(self, who: str, n: int, seed: int) -> list[Call]:
        """The calls of n sampled images. Raises BadInput, in the name of `who`, where there is nothing to sample."""
        if self.calls is None:
            raise BadInput(
                f"{who} must see some samplings first, and this denoiser comes without: use it on a Model, or on a "
                "pipeline with calls=lambda pipe: pipe(...), a call as it will be used"
            )
        return self.calls(n, seed)


class Recorder(Wrapper):
    """A denoiser that keeps what it is asked, in `calls`."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.calls: list[Call] = []

    def forward(self, x_t: Tensor, t: Tensor | float, **cond: Any) -> Tensor:
        self.calls.append((x_t, float(t), cond))
        return super().forward(x_t, t, **cond)


class Accelerator(Protocol):
    """What `accelerate` takes."""

    stage: ClassVar[int]
    claims: ClassVar[frozenset[str]]

    def apply(self, denoiser: nn.Module, ahead: SamplingContext) -> nn.Module:
        """The accelerated denoiser, a new one."""
        ...


def accelerate(denoiser: nn.Module, accelerators: Iterable[Any], ahead: SamplingContext | None = None) -> nn.Module:
    """The denoiser with all these accelerators, applied by their stage, whatever their order here.

    Raises:
        Conflict: where two claim the same.
        BadInput: where one cannot do its work on this network or sampling.
    """
    ahead, chosen = ahead or SamplingContext(), ordered(accelerators)
    ahead = replace(ahead, claimed=ahead.claimed.union(*(one.claims for one in chosen)))
    for one in chosen:
        denoiser = one.apply(denoiser, ahead)
    return denoiser


def ordered(accelerators: Iterable[Any]) -> list[Any]:
    """The accelerators by their stage. Raises Conflict where two claim the same, before any begins its work."""
    owners: dict[str, Any] = {}
    chosen = sorted(accelerators, key=lambda one: one.stage)
    for one in chosen:
        for claim in sorted(one.claims):
            if claim in owners:
                both = f"{format_spec(owners[claim])} and {format_spec(one)}"
                raise Conflict(f"{both} both claim {claim!r}: keep one of them")
            owners[claim] = one
    return chosen
