"""Run a network's own `forward` with some of its modules replaced for that one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...accelerators._caching.split import map_tensors

__all__ = ["Trace", "placeholder", "with_stand_ins"]


class StandIn(nn.Module):
    """Takes the place of a module: other code is called, every attribute is the module's."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["stands_for"], self.__dict__["call"] = module, call
        for own in ("_parameters", "_buffers", "_modules"):  # by which a network finds its dtype and device
            self.__dict__[own] = vars(module)[own]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["call"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # for isinstance
        return type(self.__dict__["stands_for"])


@contextmanager
def with_stand_ins(net: nn.Module, calls: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Within the block other code is called in place of some modules of a network.

    Args:
        net: the network.
        calls: by name of the module.
    """
    slots = []
    for name, call in calls.items():
        parent, _, child = name.rpartition(".")
        children = vars(net.get_submodule(parent))["_modules"]
        slots.append((children, child, children[child], StandIn(children[child], call)))
    try:
        for children, child, _, stand_in in slots:
            children[child] = stand_in
        yield
    finally:
        for children, child, module, _ in slots:
            children[child] = module


class Trace:
    """What one evaluation shows of a network's modules.

    Args:
        rows: of the batch.
        device: of the tensors.

    Attributes:
        order: names of the modules that ran, in order.
        outputs: of each: the structure, of tensors without memory (on the device "meta").
        residual: those of which an output has the shape (B, L, ...) of an input, in order, as in a residual stream.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.order: list[str] = []
        self.outputs: dict[str, Any] = {}
        self.residual: list[str] = []

    def recording(self, name: str, module: nn.Module, store: Callable[[str, Any], None]) -> Callable[..., Any]:
        """A call of a module that records it.

        Args:
            name: of the module.
            module: is run.
            store: is called with the name and the output.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            inputs = _shapes((args, kwargs))
            output = module(*args, **kwargs)
            self.order.append(name)
            if inputs & _shapes(output):
                self.residual.append(name)
            self.outputs[name] = map_tensors(lambda leaf: leaf.detach().to("meta"), output)
            store(name, output)
            return output

        return call


def _shapes(tree: Any) -> set[torch.Size]:
    """The shapes of tensors with more than a batch and features: those of time embeddings are left out."""
    return {leaf.shape for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim > 2}


def placeholder(template: Any, repeats: int, device: torch.device) -> Any:
    """An output of the recorded structure without a value: NaN, so that whatever reads it shows.

    Args:
        template: a tree of tensors on the device "meta".
        repeats: of the batch.
        device: of the tensors.
    """

    def empty(leaf: Tensor) -> Tensor:
        shape = (leaf.shape[0] * repeats, *leaf.shape[1:]) if leaf.ndim else ()
        value: Any = float("nan") if leaf.is_floating_point() else 0
        return torch.full(shape, value, dtype=leaf.dtype, device=device)

    return map_tensors(empty, template)
