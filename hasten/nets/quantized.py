"""Convolutions and linear layers of 8- and 4-bit integers: packed on disk, executed by integer kernels where there are.

One layer is a sum over `Part`s, slices of its input channels (one, or two for a split shortcut, Li et al. 2023,
2302.04304). With u = clamp(round(x / s_x) + z_x, 0, 255) and integer weights v (v = q for 8 bits, q - z for 4),

    y = bias + sum over parts of  s_x s_w  conv(u - z_x, v)  +  up down x        (the last only with a low-rank branch)

where conv runs in integers (`execution == "int8"`) or in floating point on the same integers (`"simulated"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _int8
from ._packed import ChannelSlice, PackedSlice, check_slices
from .copies import copy_modules

__all__ = [
    "ChannelSlice",
    "QConv2d",
    "QLinear",
    "quantization_config",
    "replace_layers",
    "execution",
    "why_not_quantizable",
    "scale_names",
    "set_group",
    "empty_quantized",
]


def why_not_quantizable(layer: nn.Module) -> str | None:
    """Why a layer cannot be made of integers here, None where it can."""
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv2d):
        return f"it is a {type(layer).__name__}, not a Conv2d or Linear"
    if layer.groups != 1:
        return f"it has {layer.groups} groups of channels, not 1"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its padding is {layer.padding!r}, {layer.padding_mode}: only counts of zeros are known"
    return None


class Quantized(nn.Module):
    """What both layers are: parts, a bias, and the group of times that is in use.

    The tensors are what is on disk; the kernels are made from them at once, and again after a move or a load. The
    output has autocast's type where it is on, else that of the input. A gradient by x is that of the float layer with
    the weights that the parts stand for (straight through the roundings); weights have none.

    The same input gives the same bits again. But a change of 1e-6, which a compiler makes between the layers, moves
    some values over the boundary of a step, and the layers after it carry that on: deep networks compiled and not
    compiled agree about as well as either agrees with the float network.
    """

    moves: _int8.ConvGeometry | None = None

    def __init__(self, parts: Sequence[ChannelSlice], bias: Tensor | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(PackedSlice(part) for part in parts)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.group = 0
        self.index = torch.zeros(1, dtype=torch.int64)  # the group, for compiled graphs; no buffer: those are frozen
        self.kernels: tuple[_int8.Kernel, ...] = ()
        self.register_load_state_dict_post_hook(rebuild_kernels)

    @classmethod
    def made(cls, layer: nn.Module, parts: Sequence[ChannelSlice]) -> Any:
        """The layer with these parts in place of its weight; its bias is copied.

        Raises ValueError where the layer is not of this kind or the parts do not make it up.
        """
        if why := why_not_quantizable(layer):
            raise ValueError(f"no {cls.__name__} can be made of this layer: {why}")
        check_slices(layer.weight, parts)
        return cls(layer, parts).prepare()  # type: ignore[arg-type, call-arg]

    def prepare(self) -> Quantized:
        """Make the kernels."""
        held = self.bias if self.parts[0].q.device.type != "meta" else None
        if self.parts[0].q.device.type == "meta":
            return self
        self.index = self.index.to(self.parts[0].q.device)
        self.kernels = tuple(part.kernel(held if i == 0 else None, self.moves) for i, part in enumerate(self.parts))
        return self

    @property
    def execution(self) -> str:
        """`int8` where integer kernels run this layer, `simulated` where floating point does."""
        kernels = self.kernels or self.prepare().kernels
        return "int8" if all(kernel.execution == "int8" for kernel in kernels) else "simulated"

    @property
    def groups_of_times(self) -> int:
        """How many pairs of activation scale and zero there are to choose from."""
        return 1 if self.parts[0].act_scale is None else self.parts[0].act_scale.numel()

    def at(self, k: int) -> None:
        """Use the activation scales of group k of the times; a layer with one group has nothing to choose."""
        if (count := self.groups_of_times) == 1 or k == self.group:
            return
        if not 0 <= k < count:
            raise ValueError(f"group {k} of the times was asked, the layer has groups 0..{count - 1}")
        self.group = k
        self.index.fill_(k)

    @property
    def weight(self) -> Tensor:
        """What the parts stand for in floating point, low-rank branch included, in the float layer's shape."""
        return torch.cat([part.weight() for part in self.parts], dim=1)

    def told(self) -> dict[str, Any]:
        """One entry of `described`."""
        one = self.parts[0]
        return {
            "bits": one.bits, "act_bits": None if one.act_scale is None else 8,
            "parts": [part.channels[0] for part in self.parts], "groups": self.groups_of_times,
            "rank": 0 if one.up is None else one.up.shape[1],
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if kind == "meta":  # shapes and counts of operations only
            return _int8.float_product(x, self.weight.to(x), self.moves, None)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if not self.kernels:
            self.prepare()
        with torch.autocast(kind, enabled=False):
            if not (torch.is_grad_enabled() and x.requires_grad):
                return self.run(x, dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            plain = _int8.float_product(x.to(dtype), self.weight.to(dtype), self.moves, bias)
            return plain + (self.run(x.detach(), dtype) - plain).detach()

    def run(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer without a gradient, in this type."""
        whole = len(self.kernels) == 1
        axis, total = -1 if self.moves is None else 1, None
        for part, kernel in zip(self.parts, self.kernels, strict=True):
            first, last = part.channels
            given = x if whole else x.narrow(axis, first, last - first)
            y = kernel(given, self.group, self.index, dtype if whole else torch.promote_types(dtype, torch.float32))
            if part.up is not None:
                y = y + part.side(given, self.moves, y.dtype)
            total = y if total is None else total + y
        assert total is not None
        return total.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        return self.prepare() if self.kernels else self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kernels": ()}  # kernels are opaque: a copy makes its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()


def rebuild_kernels(layer: Quantized, _: Any) -> None:
    """New kernels after a load."""
    layer.prepare()


class QConv2d(Quantized):
    """A 2-D convolution of one group, zero-padded: `(B, C_in, H, W) -> (B, C_out, H', W')`, channels last inside."""

    def __init__(self, layer: nn.Conv2d, parts: Sequence[ChannelSlice]) -> None:
        super().__init__(parts, layer.bias)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation
        self.moves = _int8.ConvGeometry(pair(layer.stride), pair(layer.padding), pair(layer.dilation))


class QLinear(Quantized):
    """A linear layer: `(..., C_in) -> (..., C_out)`."""

    def __init__(self, layer: nn.Linear, parts: Sequence[ChannelSlice]) -> None:
        super().__init__(parts, layer.bias)
        self.in_features, self.out_features = layer.in_features, layer.out_features


def pair(value: Any) -> tuple[int, int]:
    a, b = value
    return int(a), int(b)


def layers(net: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """The quantised layers of a network by name."""
    for name, module in net.named_modules():
        if isinstance(module, Quantized):
            yield name, module


def replace_layers(net: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a network with the named layers replaced; the network itself stays as it was.

    All other parameters and buffers are shared with it, but for the weights of convolutions that stay in floating
    point beside integer ones: the copy has its own, channels last, so that images keep the layout that integer kernels
    read and write. (One layer that makes them channels first costs more than an integer convolution.)

    Raises ValueError for a name that the network does not have.
    """
    modules = dict(net.named_modules())
    if unknown := sorted(made.keys() - modules.keys()):
        raise ValueError(f"the network has no layer {unknown[0]!r}")
    tensors: dict[int, Tensor] = {}
    made_by_id = {id(modules[name]): layer for name, layer in made.items()}
    if any(isinstance(layer, QConv2d) for layer in made.values()):
        for name, module in modules.items():
            if isinstance(module, nn.Conv2d) and name not in made:
                w = module.weight
                own = w.detach().clone(memory_format=torch.channels_last)
                tensors[id(w)] = nn.Parameter(own, requires_grad=w.requires_grad)
    return copy_modules(net, tensors, made_by_id)


def set_group(net: nn.Module, k: int) -> None:
    """Let the network's layers that have several groups of times use group k; those with one keep it."""
    for _, layer in layers(net):
        layer.at(k)


def execution(net: nn.Module) -> str:
    """`int8` where every quantised layer runs in integers, `simulated` where one or more do not."""
    return "int8" if all(layer.execution == "int8" for _, layer in layers(net)) else "simulated"


def quantization_config(net: nn.Module) -> dict[str, dict[str, Any]]:
    """What `vacant` needs to know: {layer name: {bits, act_bits, parts (first channels), groups, rank}}."""
    return {name: layer.told() for name, layer in layers(net)}


def scale_names(net: nn.Module) -> set[str]:
    """The names of the quantised layers' scales in the network's state, which are not to be rounded."""
    names = ("scale", "act_scale")
    return {f"{at}.parts.{i}.{name}" for at, layer in layers(net) for i in range(len(layer.parts)) for name in names}


def empty_quantized(net: nn.Module, told: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """`exchange` with empty quantised layers as `described` told them, for a weights file to fill."""
    modules, made = dict(net.named_modules()), {}
    for name, one in told.items():
        if name not in modules:
            raise ValueError(f"the network has no layer {name!r}")
        layer = modules[name]
        kind = QLinear if isinstance(layer, nn.Linear) else QConv2d
        made[name] = kind.made(layer, empty_slices(layer, one))
    return replace_layers(net, made)


def empty_slices(layer: nn.Module, told: Mapping[str, Any]) -> list[ChannelSlice]:
    """Parts of zeros in the shapes that `Quantized.told` told."""
    if why := why_not_quantizable(layer):
        raise ValueError(why)
    weight: Any = layer.weight
    bits, acts, groups, rank = (int(told[key] or 0) for key in ("bits", "act_bits", "groups", "rank"))
    starts, rows, parts = [int(first) for first in told["parts"]], weight.shape[0], []
    for first, last in zip(starts, [*starts[1:], weight.shape[1]], strict=True):
        q = torch.zeros(rows, last - first, *weight.shape[2:], dtype=torch.uint8 if bits == 4 else torch.int8)
        low = (torch.zeros(rows, rank), torch.zeros(rank, q[0].numel())) if rank else None
        scale, zero = torch.ones(groups), torch.zeros(groups, dtype=torch.uint8)
        none = torch.zeros(rows, dtype=torch.uint8) if bits == 4 else None
        parts.append(ChannelSlice((first, last), q, torch.ones(rows), none, bits, scale if acts else None,
                          zero if acts else None, low))  # fmt: skip
    return parts
