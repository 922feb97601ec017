"""The workload of a network, from its shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..utils.deprecation import renamed
from ._recorder import AttentionRecorder, ShapeRecorder, operation, recording
from .workload import Message, Op, Workload

__all__ = ["Message", "Op", "Workload", "work_of"]

__getattr__ = renamed(__name__, {"Work": "Workload", "Talk": "Message"})


def work_of(net: nn.Module, shape: Sequence[int], dtype: torch.dtype | None = None, **cond: Any) -> Workload:
    """The workload of `net(x, time, **cond)`, found on a copy without memory or arithmetic (the meta device).

    It is run there at H and 2 H rows, and for half of the batch again: what grows with H can be divided. Multiply-
    accumulates are those of products, convolutions and attention, as `hasten.performance.cost` counts them.

    Args:
        net: hasten's UNet, a diffusers network, or any module whose shapes do not depend on values.
        shape: (B, C, H, W) of x.
        dtype: of weights and feature maps, by default that of the network. (Autocast is not followed; hasten's own
            network is of float32 or float64.)
        cond: tensors, or dictionaries of them; those of B rows belong to the rows of the batch.

    Raises:
        BadInput: for a network that cannot run so: whose shapes depend on values, or that does not take this shape.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise BadInput(f"the shape of a batch of images is (B, C, H, W), found {tuple(shape)}")
    batch, _, rows, _ = shape
    meta = _on_meta_device(net, dtype)
    kind = dtype or next((p.dtype for p in meta.parameters() if p.is_floating_point()), torch.float32)

    def run(height: int, count: int) -> ShapeRecorder:
        conditions = _conditions(cond, kind, batch, count)
        x = torch.empty((count, shape[1], height, shape[3]), dtype=kind, device="meta")
        recorder = ShapeRecorder()
        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(recording(meta, recorder))
            stack.enter_context(AttentionRecorder(recorder))
            stack.enter_context(recorder)
            try:
                meta(x, torch.empty(count, dtype=kind, device="meta"), **conditions)
            except BadInput:
                raise
            except Exception as error:
                message = (str(error).splitlines() or [type(error).__name__])[0]
                raise BadInput(
                    f"{type(net).__name__} does not run on shapes alone, at {tuple(x.shape)}: {message}"
                ) from error
        return recorder

    def workload(count: int) -> Workload:
        one, two = run(rows, count), run(2 * rows, count)
        if len(one.ops) != len(two.ops):
            raise BadInput(f"{type(net).__name__} does other operations at {2 * rows} rows than at {rows}")
        ops = tuple(operation(a, b) for a, b in zip(one.ops, two.ops))
        output = count * shape[1] * rows * shape[3] * kind.itemsize
        supported = bool(one.messages) and one.messages[-1].kind == "rows"
        return Workload(count, ops, tuple(one.messages) if supported else None, one.coarsest or rows, output)

    full = workload(batch)
    return full if batch == 1 else replace(full, half=workload(-(-batch // 2)))


def _on_meta_device(net: nn.Module, dtype: torch.dtype | None) -> Any:
    """A copy of the network on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*net.parameters(), *net.buffers()):
        kind = dtype if tensor.is_floating_point() else None
        empty = torch.empty_like(tensor, device="meta", dtype=kind)
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(net, memo).eval()


def _conditions(cond: Any, dtype: torch.dtype, batch: int, count: int) -> Any:
    """Conditions on the meta device, of `count` rows."""
    if isinstance(cond, dict):
        return {key: _conditions(value, dtype, batch, count) for key, value in cond.items()}
    if not isinstance(cond, Tensor):
        return cond
    rows = cond[:count] if cond.ndim and len(cond) == batch else cond
    return torch.empty(rows.shape, dtype=dtype if rows.is_floating_point() else rows.dtype, device="meta")
