"""Combining accelerators: order, conflicts, context, defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import nn

from hasten.accelerators import COMPILE, EXCHANGE, WRAP, Conflict, SamplingContext, accelerate, with_defaults
from hasten.accelerators.encoder_propagation import EncoderPropagation
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


def test_accelerators_apply_in_the_order_of_their_stages() -> None:
    net = nn.Identity()
    built = accelerate(net, [Cache(), Swap(), Compile()], SamplingContext(times=(1.0, 0.5)))
    assert names(built) == ["swap", "compile", "cache of 2"]
    assert accelerate(net, []) is net


def test_a_conflict_names_both() -> None:
    with pytest.raises(Conflict, match="Cache and .*Cache:every=3 both claim 'features'"):
        accelerate(nn.Identity(), [Cache(), Swap(), Cache(3)], SamplingContext(times=(1.0,)))


def test_missing_context_is_an_error_in_the_accelerators_name() -> None:
    with pytest.raises(BadInput, match="cache must know the times"):
        accelerate(nn.Identity(), [Cache()])
    with pytest.raises(BadInput, match="quantize needs calibration samples"):
        SamplingContext().calibration("quantize", 4, 0)


@dataclass(frozen=True)
class Bare:
    """An accelerator that derives from nothing and defines nothing but what it does."""

    def apply(self, denoiser: nn.Module, context: SamplingContext) -> nn.Module:
        return Layer(denoiser, "bare")


@dataclass(frozen=True)
class Old(Bare):
    """One with a minimum under its old name."""

    least_queries: ClassVar[int] = 12


def test_a_class_of_ones_own_has_the_defaults_of_what_it_does_not_define() -> None:
    bare = with_defaults(Bare())
    assert (bare.stage, bare.claims, bare.min_queries, bare.inject, bare.size) == (WRAP, frozenset(), 0, 0.0, None)
    plan: Any = object()
    assert bare.plan(plan, None) is plan  # type: ignore[arg-type]
    assert names(accelerate(nn.Identity(), [Bare(), Swap()])) == ["swap", "bare"]
    assert with_defaults(Old()).min_queries == 12 and with_defaults(Cache()).claims == Cache.claims
    own = EncoderPropagation(inject=0.003)
    assert with_defaults(own) is own and own.size is None and own.min_queries == 9


def test_the_old_name_of_the_context_is_accepted() -> None:
    net, context = nn.Identity(), SamplingContext(times=(1.0, 0.5))
    with pytest.warns(DeprecationWarning, match="context="):
        assert names(accelerate(net, [Cache()], ahead=context)) == ["cache of 2"]
