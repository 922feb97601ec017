"""Copies of a network's modules that share its tensors."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copy_modules", "own_parameters"]

OWN = ("_parameters", "_buffers", "_modules")
CONTAINERS = (dict, OrderedDict, list, tuple, set)


def copy_modules(
    net: nn.Module, tensors: Mapping[int, Tensor] | None = None, modules: Mapping[int, nn.Module] | None = None
) -> Any:
    """A copy of every module of a network; parameters and buffers are shared, the very same objects.

    What modules hold besides (hooks, settings, processors) is shared too, but lists, dictionaries and sets are copied,
    and what names a module or one of its methods in them names the copy. A module inside whose `forward` was replaced
    on the object itself, as hooks that offload weights do, is shared: such hooks know it by its identity.

    Unlike `copy.deepcopy` this copies no object that it does not know (pipelines, streams, stores of attention maps).

    Args:
        tensors: by `id`: what takes the place of a parameter or buffer.
        modules: by `id`: what takes the place of a module; taken as it is.
    """
    tensors, known = tensors or {}, dict(modules or {})
    made: list[nn.Module] = []

    def module(old: nn.Module, top: bool = False) -> nn.Module:
        if id(old) in known:
            return known[id(old)]
        if "forward" in vars(old) and not top:
            known[id(old)] = old
            return old
        known[id(old)] = new = object.__new__(type(old))
        made.append(new)
        vars(new).update(vars(old))
        for name in ("_parameters", "_buffers"):
            held = vars(old)[name]
            vars(new)[name] = {key: tensors.get(id(one), one) for key, one in held.items()}
        vars(new)["_modules"] = {
            key: None if child is None else module(child) for key, child in vars(old)["_modules"].items()
        }
        return new

    copied = module(net, top=True)
    seen: dict[int, Any] = {}
    places: dict[int, Any] = {**tensors, **known}
    for new in made:
        vars(new).update({key: _mapped(value, places, seen) for key, value in vars(new).items() if key not in OWN})
    return copied


def _mapped(value: Any, places: Mapping[int, Any], seen: dict[int, Any]) -> Any:
    """A plain attribute for the copy."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        return places.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in places:
        return types.MethodType(value.__func__, places[id(value.__self__)])
    if type(value) not in CONTAINERS and type(value) is not Tensor and not hasattr(type(value), "__deepcopy__"):
        return value
    if id(value) not in seen:
        seen[id(value)] = _container(value, places, seen)
    return seen[id(value)]


def _container(value: Any, places: Mapping[int, Any], seen: dict[int, Any]) -> Any:
    if type(value) is Tensor:
        return value.clone()  # state that is no buffer: a copy has its own
    if isinstance(value, dict) and type(value) in CONTAINERS:
        return type(value)((key, _mapped(item, places, seen)) for key, item in value.items())
    if type(value) in CONTAINERS:
        return type(value)(_mapped(item, places, seen) for item in value)
    return value if isinstance(value, Tensor) else copy.deepcopy(value)


def own_parameters(net: nn.Module) -> dict[int, Tensor]:
    """`tensors` for `copy_modules`: new parameters that share the memory of the old ones, so that a copy can be moved,
    cast, frozen or laid out anew without its original. Parameters of special classes (packed ones) stay shared."""
    made: dict[int, Tensor] = {}
    for old in net.parameters():
        if type(old) is nn.Parameter and type(old.data) is torch.Tensor:
            made[id(old)] = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
    return made
