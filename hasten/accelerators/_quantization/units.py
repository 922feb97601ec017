"""The blocks of a network in the order in which they run, and their recorded inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...errors import BadInput
from .fake_quant import is_quantizable

__all__ = [
    "Batch",
    "ConcatTracker",
    "NetworkTrace",
    "UnitInputs",
    "detach_tree",
    "raw_of_batch",
    "record_unit",
    "tensor_bytes",
    "trace_layers",
]

# Modules that are reconstructed as one: hasten's own and those of `diffusers`. Everything else goes layer by layer.
BLOCKS = {
    "ResBlock", "Attention", "ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "FluxTransformerBlock",
    "FluxSingleTransformerBlock", "SanaTransformerBlock", "LTXVideoTransformerBlock",
}  # fmt: skip
Batch = tuple[Tensor, Tensor, dict[str, Any]]  # x_t (B, *S), t (B,), conditions


@dataclass
class NetworkTrace:
    """What one run of a network shows.

    Attributes:
        layers: names of the convolutions and linear layers, in the order of the run.
        splits: of those whose input is `cat([h, skip])`, the number of channels of h.
        units: (name, its layers), in the order of the run.
    """

    layers: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    units: list[tuple[str, list[str]]] = field(default_factory=list)


class ConcatTracker(TorchFunctionMode):
    """Records which tensors are concatenations of two, along which dimension, and the length of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.concats: dict[int, tuple[Tensor, int, int]] = {}  # with the tensor, so that its id stays its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate) and isinstance(result, Tensor):
            tensors = args[0] if args else (kwargs or {})["tensors"]
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
            if len(tensors) == 2:
                self.concats[id(result)] = result, dim % result.ndim, tensors[0].shape[dim]
        return result


@torch.no_grad()
def trace_layers(denoiser: nn.Module, net: nn.Module, batch: Batch) -> NetworkTrace:
    """Run a network once and record its layers, its units, and the concatenations that layers read.

    A layer is split where its input, of three dimensions or more, is the very tensor that a `torch.cat` of two along
    the channels returned: in U-Nets, the layers of the decoder that read a skip connection.

    Args:
        denoiser: of the network.
        net: the network.
        batch: a small one.
    """
    trace, tracker = NetworkTrace(), ConcatTracker()
    names: dict[nn.Module, str] = {module: name for name, module in net.named_modules() if is_quantizable(module)}

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        name = names[module]
        if name in trace.layers:
            return
        trace.layers.append(name)
        concat, dim, first = tracker.concats.get(id(args[0]), (None, 0, 0)) if args else (None, 0, 0)
        channels = 1 if isinstance(module, nn.Conv2d) else args[0].ndim - 1
        if concat is not None and concat.ndim >= 3 and dim == channels:
            trace.splits[name] = first

    handles = [module.register_forward_pre_hook(record) for module in names]
    try:
        with tracker:
            raw_of_batch(denoiser, batch)
    finally:
        for handle in handles:
            handle.remove()
    units: dict[str, list[str]] = {}
    for name in trace.layers:
        units.setdefault(_unit(net, name), []).append(name)
    trace.units = list(units.items())
    return trace


def _unit(net: nn.Module, name: str) -> str:
    """The outermost block around a layer, or the layer itself."""
    parts = name.split(".")
    for k in range(1, len(parts)):
        outer = ".".join(parts[:k])
        if type(net.get_submodule(outer)).__name__ in BLOCKS:
            return outer
    return name


def raw_of_batch(denoiser: Any, batch: Batch) -> Tensor:
    """The raw output (B, *S) of a denoiser's network.

    Args:
        denoiser: with `raw`.
        batch: x_t (B, *S), t (B,), conditions.
    """
    x, t, cond = batch
    return denoiser.raw(x, t, **cond)


class _Stop(Exception):
    """The unit has run."""


@contextmanager
def _stop_after(unit: nn.Module, record: Callable[..., None]) -> Iterator[None]:
    """Within the block `record(args, kwargs, output)` is called after the unit, whose run is then stopped."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record(args, kwargs, output)
        raise _Stop

    handle = unit.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def record_unit(denoiser: nn.Module, unit: nn.Module, batch: Batch) -> tuple[Any, list[Tensor]]:
    """The inputs and outputs of a unit at its first call for a batch. The network is run no further.

    Args:
        denoiser: of the network.
        unit: a module of the network.
        batch: the network's input.

    Returns:
        The positional and keyword arguments, (args, kwargs), and the tensors in the output.

    Raises:
        BadInput: where the unit does not run.
    """
    calls: list[Any] = []
    with _stop_after(unit, lambda args, kwargs, output: calls.append(((args, kwargs), output))), suppress(_Stop):
        raw_of_batch(denoiser, batch)
    if not calls:
        raise BadInput(f"quantize: {type(unit).__name__} does not run for every batch, so it cannot be reconstructed")
    return calls[0][0], [leaf for leaf in tree_flatten(calls[0][1])[0] if isinstance(leaf, Tensor)]


class UnitInputs:
    """The arguments of several calls of a unit, concatenated, so that rows can be drawn from all of them.

    Tensors with as many rows as the first one are indexed by row; all else is taken from the first call.

    Args:
        calls: (args, kwargs) of each call.
    """

    def __init__(self, calls: list[Any]) -> None:
        flat = [tree_flatten(call) for call in calls]
        self.spec = flat[0][1]
        self.rows = [_row_count(leaves) for leaves, _ in flat]
        self.leaves: list[Any] = []
        self.by_row: list[bool] = []
        for k, first in enumerate(flat[0][0]):
            by_row = isinstance(first, Tensor) and first.ndim > 0 and len(first) == self.rows[0]
            self.leaves.append(torch.cat([leaves[k] for leaves, _ in flat]) if by_row else first)
            self.by_row.append(by_row)

    def __len__(self) -> int:
        return sum(self.rows)

    def take(self, index: Tensor) -> Any:
        """The arguments (args, kwargs) of these rows."""
        leaves = [leaf[index] if by_row else leaf for leaf, by_row in zip(self.leaves, self.by_row)]
        return tree_unflatten(leaves, self.spec)


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def detach_tree(tree: Any) -> Any:
    """The same tree with detached clones of its tensors, which later in-place changes do not reach."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def _row_count(leaves: list[Any]) -> int:
    """The rows of the first tensor."""
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 1)
