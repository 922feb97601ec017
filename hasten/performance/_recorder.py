"""Records the operations of a network on the meta device, and what ranks with patches would exchange."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..accelerators._patches.swap import ASIDE, core_of
from .workload import Message, Op

__all__ = ["AttentionRecorder", "RecordedOp", "ShapeRecorder", "operation", "recording"]


@dataclass(frozen=True)
class RecordedOp:
    """An operation at one height: its macs, bytes, and the bytes of keys and values of self-attention."""

    macs: int
    bytes: int
    keys: int = 0
    text: bool = False


class ShapeRecorder(TorchDispatchMode):
    """Records operations, and what ranks with patches would exchange."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.flops = flop_registry
        self.ops: list[RecordedOp] = []
        self.messages: list[Message] = []
        self.coarsest = 0
        self.projections = 0  # of keys and values that are running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = [r.alias_info for r in func._schema.returns]
        packet = func._overloadpacket
        if any(a is not None and not a.is_write for a in alias) or "empty" in packet.__name__:
            return out  # a view
        macs = self.flops[packet](*args, **(kwargs or {}), out_val=out) // 2 if packet in self.flops else 0
        moved = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs or {}, out)))
        self.ops.append(RecordedOp(macs, moved, text=self.projections > 0))
        return out


class AttentionRecorder(TorchFunctionMode):
    """Counts attention as one operation that never writes its weights."""

    def __init__(self, recorder: ShapeRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (
            (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3] if kwargs else args[:3]
        )
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        macs = q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        own, others = ((a.numel() + b.numel()) * q.element_size() for a, b in ((q, out), (k, v)))
        self.recorder.ops.append(RecordedOp(macs, own, others))
        return out


def operation(one: RecordedOp, two: RecordedOp) -> Op:
    """An operation from its records at two heights.

    Args:
        one: at H rows.
        two: at 2 H rows.
    """
    moving = min(one.bytes, max(two.bytes - one.bytes, 0))
    divided = moving > 0 or two.macs > one.macs
    return Op(one.macs, moving, one.bytes - moving + one.keys, divided, one.text and not divided)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors inside lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


@contextmanager
def recording(net: nn.Module, recorder: ShapeRecorder) -> Iterator[None]:
    """A context manager in which the layers of a U-Net record what they would exchange.

    Args:
        net: the network, on the meta device.
        recorder: of the messages.
    """
    core: Any = core_of(net)
    handles = []
    padded: set[int] = set()
    if all(isinstance(getattr(core, end, None), nn.Conv2d) for end in ("conv_in", "conv_out")):
        for name, module in core.named_modules():
            if name.partition(".")[0] in ASIDE or "norm_cross" in name.split(".") or id(module) in padded:
                continue
            if _is_padded_downsampler(module):
                padded.add(id(module.conv))
            handles += _hooks(name, module, recorder)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_padded_downsampler(module: Any) -> bool:
    """Whether a module is a downsampler of diffusers that pads by itself, a row below."""
    named = type(module).__name__ == "Downsample2D" and getattr(module, "padding", None) == 0
    return named and getattr(module, "conv", None) is not None


def _hooks(name: str, module: Any, recorder: ShapeRecorder) -> list[Any]:
    """The hooks that record what one module would exchange."""
    messages = recorder.messages

    def halo(_: Any, args: Any) -> None:
        conv = module.conv if type(module).__name__ == "Downsample2D" else module
        x, k, s, d = args[0], conv.kernel_size[0], conv.stride[0], conv.dilation[0]
        B, C, h, w = x.shape
        recorder.coarsest = min(recorder.coarsest or h, max(h // s, 1))
        pad = conv.padding if isinstance(conv.padding, str) else int(conv.padding[0])
        above = {"valid": 0, "same": d * (k - 1) // 2}[pad] if isinstance(pad, str) else pad
        below = max(0, d * (k - 1) - above - s + 1)
        if name != "conv_in" and (above or below):
            messages.append(Message("halo", B * C * w, x.element_size(), h, above, below))

    def output(_: Any, args: Any, out: Tensor) -> None:
        messages.append(Message("rows", out.numel(), out.element_size()))

    def norm(_: Any, args: Any) -> None:
        x = args[0]
        size = 8 if x.dtype == torch.float64 else 4
        messages.append(Message("moments", 2 * len(x) * module.num_groups, size, x.numel(), width=x.element_size()))

    def keys(_: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        if text is not None:
            return
        tokens = x[:, 0].numel() if x.ndim == 4 else x[..., 0].numel()
        both = 2 * module.qkv.in_features if hasattr(module, "qkv") else 2 * module.to_k.out_features
        messages.append(Message("keys", tokens * both, x.element_size()))

    def begin_projection(_: Any, args: Any) -> None:
        recorder.projections += 1

    def end_projection(_: Any, args: Any, out: Any) -> None:
        recorder.projections -= 1

    if _is_padded_downsampler(module):
        return [module.register_forward_pre_hook(halo)]
    if type(module) is nn.Conv2d:
        last = [module.register_forward_hook(output)] if name == "conv_out" else []
        return [module.register_forward_pre_hook(halo), *last]
    if type(module) is nn.GroupNorm:
        return [module.register_forward_pre_hook(norm)]
    if type(module).__name__ == "Attention" and (hasattr(module, "qkv") or hasattr(module, "to_k")):
        return [module.register_forward_pre_hook(keys, with_kwargs=True)]
    if name.rpartition(".")[2] in ("to_k", "to_v"):
        return [module.register_forward_pre_hook(begin_projection), module.register_forward_hook(end_projection)]
    return []
