"""Copies of a network's modules that share its parameters."""

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

    Other attributes of the modules (hooks, settings, processors) are shared too, but lists, dictionaries and sets are
    copied, and references in them to a module or one of its methods are replaced by the copy. A submodule whose
    `forward` was replaced on the instance, as by hooks that offload weights, is shared: such hooks know it by identity.

    Unlike `copy.deepcopy` this copies no object of an unknown class (pipelines, streams, stores of attention maps).

    Args:
        net: the network.
        tensors: by `id`: replacements of parameters or buffers.
        modules: by `id`: replacements of modules, not copied.

    Returns:
        The copy.
    """
    tensors, copies = tensors or {}, dict(modules or {})
    new_modules: list[nn.Module] = []

    def module(old: nn.Module, top: bool = False) -> nn.Module:
        if id(old) in copies:
            return copies[id(old)]
        if "forward" in vars(old) and not top:
            copies[id(old)] = old
            return old
        copies[id(old)] = new = object.__new__(type(old))
        new_modules.append(new)
        vars(new).update(vars(old))
        vars(new).pop("_compiled_call_impl", None)  # compiled for the original, whose weights it would use
        for name in ("_parameters", "_buffers"):
            vars(new)[name] = {key: tensors.get(id(one), one) for key, one in vars(old)[name].items()}
        vars(new)["_modules"] = {
            key: None if child is None else module(child) for key, child in vars(old)["_modules"].items()
        }
        return new

    copied = module(net, top=True)
    seen: dict[int, Any] = {}
    replaced: dict[int, Any] = {**tensors, **copies}
    for new in new_modules:
        vars(new).update(
            {key: _copy_attribute(value, replaced, seen) for key, value in vars(new).items() if key not in OWN}
        )
    return copied


def _copy_attribute(value: Any, replaced: Mapping[int, Any], seen: dict[int, Any]) -> Any:
    """The copy's value of an attribute that is no parameter, buffer or submodule."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        return replaced.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in replaced:
        return types.MethodType(value.__func__, replaced[id(value.__self__)])
    if type(value) not in CONTAINERS and type(value) is not Tensor and not hasattr(type(value), "__deepcopy__"):
        return value
    if id(value) not in seen:
        seen[id(value)] = _copy_container(value, replaced, seen)
    return seen[id(value)]


def _copy_container(value: Any, replaced: Mapping[int, Any], seen: dict[int, Any]) -> Any:
    """A copy of a tensor, container or deep-copyable object."""
    if type(value) is Tensor:
        return value.clone()  # state that is not a buffer
    if isinstance(value, dict) and type(value) in CONTAINERS:
        return type(value)((key, _copy_attribute(item, replaced, seen)) for key, item in value.items())
    if type(value) in CONTAINERS:
        return type(value)(_copy_attribute(item, replaced, seen) for item in value)
    return value if isinstance(value, Tensor) else copy.deepcopy(value)


def own_parameters(net: nn.Module) -> dict[int, Tensor]:
    """`tensors` for `copy_modules`: new parameters that share the memory of the old ones.

    A copy with them can be moved, cast, frozen or changed in memory format without its original. Parameters of other
    classes (packed ones) are still shared.
    """
    parameters: dict[int, Tensor] = {}
    for old in net.parameters():
        if type(old) is nn.Parameter and type(old.data) is torch.Tensor:
            parameters[id(old)] = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
    return parameters
