"""The blocks of a network in the order in which it runs them, and what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from ...errors import BadInput
from .simulated import takes

# Modules that are reconstructed as one: hasten's own and those of `diffusers`. Everything else goes layer by layer.
BLOCKS = {
    "ResBlock", "Attention", "ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock",
    "FluxSingleTransformerBlock", "SanaTransformerBlock", "LTXVideoTransformerBlock",
}  # fmt: skip
Batch = tuple[Tensor, Tensor, dict[str, Any]]  # x_t (B, *S), t (B,), conditions


@dataclass
class Traced:
    """What one run of a network shows.

    layers: names of the convolutions and linear layers that ran, in their order. splits: of those that read
        `cat([h, skip])` directly, the number of channels of h. units: (name, its layers), in the order of the run.
    """

    layers: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    units: list[tuple[str, list[str]]] = field(default_factory=list)


class Joins(TorchFunctionMode):
    """Remembers which tensors are two others side by side, along which dimension, and how long the first is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, tuple[Tensor, int, int]] = {}  # the tensor is kept, so that its id stays its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate) and isinstance(made, Tensor):
            tensors = args[0] if args else (kwargs or {})["tensors"]
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            if len(tensors) == 2:
                self.found[id(made)] = made, dim % made.ndim, tensors[0].shape[dim]
        return made


@torch.no_grad()
def trace(denoiser: nn.Module, net: nn.Module, batch: Batch) -> Traced:
    """Run the network once on a small batch and see its layers, its units and what is joined before which layer.

    A layer is split where its input, of three dimensions or more, is the very tensor that a `torch.cat` of two along
    the channels has made: in U-Nets, the shortcuts of the expanding half.
    """
    seen, joins = Traced(), Joins()
    names = {module: name for name, module in net.named_modules() if takes(module)}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        name = names[module]  # type: ignore[index]
        if name in seen.layers:
            return
        seen.layers.append(name)
        made, dim, first = joins.found.get(id(args[0]), (None, 0, 0)) if args else (None, 0, 0)
        channels = 1 if isinstance(module, nn.Conv2d) else args[0].ndim - 1
        if made is not None and made.ndim >= 3 and dim == channels:
            seen.splits[name] = first

    handles = [module.register_forward_pre_hook(look) for module in names]
    try:
        with joins:
            ask(denoiser, batch)
    finally:
        for handle in handles:
            handle.remove()
    units: dict[str, list[str]] = {}
    for name in seen.layers:
        units.setdefault(_unit(net, name), []).append(name)
    seen.units = list(units.items())
    return seen


def _unit(net: nn.Module, name: str) -> str:
    """The outermost block around a layer, or the layer itself."""
    parts = name.split(".")
    for k in range(1, len(parts)):
        outer = ".".join(parts[:k])
        if type(net.get_submodule(outer)).__name__ in BLOCKS:
            return outer
    return name


def ask(denoiser: Any, batch: Batch) -> Tensor:
    """What the network of a denoiser says to a batch."""
    x, t, cond = batch
    return denoiser.raw(x, t, **cond)


class _Stop(Exception):
    """The unit that was wanted has run."""


@contextmanager
def _watched(unit: nn.Module, keep: Callable[..., None]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
        keep(args, kwargs, made)
        raise _Stop

    handle = unit.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def given(denoiser: nn.Module, unit: nn.Module, batch: Batch) -> tuple[Any, list[Tensor]]:
    """What a unit is given at its first call on a batch, all positional and keyword arguments, and what it makes: the
    tensors in its answer. The network is run no further.

    Raises BadInput where the unit does not run.
    """
    found: list[Any] = []
    with _watched(unit, lambda args, kwargs, made: found.append(((args, kwargs), made))), suppress(_Stop):
        ask(denoiser, batch)
    if not found:
        raise BadInput(f"quantize: {type(unit).__name__} does not run for every batch, so it cannot be reconstructed")
    return found[0][0], [leaf for leaf in tree_flatten(found[0][1])[0] if isinstance(leaf, Tensor)]


class Rows:
    """The arguments of a unit's calls, put together so that rows can be drawn from all of them.

    What has as many entries as the first tensor goes row by row; all else is taken from the first call.
    """

    def __init__(self, calls: list[Any]) -> None:
        flat = [tree_flatten(call) for call in calls]
        self.spec = flat[0][1]
        self.rows = [_length(leaves) for leaves, _ in flat]
        self.leaves: list[Any] = []
        self.each: list[bool] = []
        for k, first in enumerate(flat[0][0]):
            each = isinstance(first, Tensor) and first.ndim > 0 and len(first) == self.rows[0]
            self.leaves.append(torch.cat([leaves[k] for leaves, _ in flat]) if each else first)
            self.each.append(each)

    def __len__(self) -> int:
        return sum(self.rows)

    def take(self, index: Tensor) -> Any:
        """The arguments of these rows, as the unit takes them."""
        leaves = [leaf[index] if each else leaf for leaf, each in zip(self.leaves, self.each)]
        return torch.utils._pytree.tree_unflatten(leaves, self.spec)


def size(tree: Any) -> int:
    """Bytes of all tensors in a tree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def detached(tree: Any) -> Any:
    """The same tree with tensors that nobody writes into later."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def _length(leaves: list[Any]) -> int:
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)
