"""Putting accelerators together: order, conflicts, and what they are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import nn

from hasten.accelerators import COMPILE, EXCHANGE, WRAP, Conflict, SamplingContext, accelerate
from hasten.errors import BadInput


class Layer(nn.Module):
    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name


@dataclass(frozen=True)
class Swap:
    stage: ClassVar[int] = EXCHANGE
    claims: ClassVar[frozenset[str]] = frozenset({"arithmetic"})

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        return Layer(denoiser, "swap")


@dataclass(frozen=True)
class Compile:
    stage: ClassVar[int] = COMPILE
    claims: ClassVar[frozenset[str]] = frozenset({"graph"})

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        return Layer(denoiser, "compile")


@dataclass(frozen=True)
class Cache:
    every: int = 2
    stage: ClassVar[int] = WRAP
    claims: ClassVar[frozenset[str]] = frozenset({"features"})

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        return Layer(denoiser, f"cache of {len(context.required('cache'))}")


def names(module: Any) -> list[str]:
    return [*names(module.inner), module.name] if isinstance(module, Layer) else []


def test_stages_decide_the_order_and_the_denoiser_is_kept() -> None:
    net = nn.Identity()
    made = accelerate(net, [Cache(), Swap(), Compile()], SamplingContext(times=(1.0, 0.5)))
    assert names(made) == ["swap", "compile", "cache of 2"]
    assert accelerate(net, []) is net


def test_a_conflict_names_both() -> None:
    with pytest.raises(Conflict, match="Cache and .*Cache:every=3 both claim 'features'"):
        accelerate(nn.Identity(), [Cache(), Swap(), Cache(3)], SamplingContext(times=(1.0,)))


def test_what_is_not_known_is_said_in_the_name_of_who_needs_it() -> None:
    with pytest.raises(BadInput, match="cache must know the times"):
        accelerate(nn.Identity(), [Cache()])
    with pytest.raises(BadInput, match="quantize needs calibration samples"):
        SamplingContext().calibration("quantize", 4, 0)
