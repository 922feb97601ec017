"""Convolutions and linear layers with 8- and 4-bit integer weights: packed on disk, run by integer kernels if possible.

One layer is a sum over `ChannelSlice`s of its input channels (one, or two for a split shortcut, Li et al. 2023,
2302.04304). With u = clamp(round(x / s_x) + z_x, 0, 255) and integer weights v (v = q for 8 bits, q - z for 4),

    y = bias + sum over slices of  s_x s_w  conv(u - z_x, v)  +  up down x        (the last only with a low-rank branch)

where conv runs in integers (`execution == "int8"`) or in floating point on the same integers (`"simulated"`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import _int8
from ._packed import ChannelSlice, PackedSlice, check_slices
from .copies import copy_modules
from .layers import ModuleListOf

__all__ = [
    "ChannelSlice",
    "QConv2d",
    "QLinear",
    "empty_quantized",
    "execution",
    "quantization_config",
    "replace_layers",
    "scale_names",
    "set_group",
    "why_not_quantizable",
]

Q = TypeVar("Q", bound="Quantized")


def why_not_quantizable(layer: nn.Module) -> str | None:
    """Why a layer cannot be quantized here; None if it can."""
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv2d):
        return f"it is a {type(layer).__name__}, not a Conv2d or Linear"
    if layer.groups != 1:
        return f"it has {layer.groups} groups of channels, not 1"
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return f"its padding is {layer.padding!r}, {layer.padding_mode}: only zero padding by numbers is supported"
    return None


def quantizable(layer: nn.Module) -> nn.Conv2d | nn.Linear:
    """The layer itself; raises ValueError if it cannot be quantized."""
    if (reason := why_not_quantizable(layer)) or not isinstance(layer, (nn.Conv2d, nn.Linear)):
        raise ValueError(f"this layer cannot be quantized: {reason}")
    return layer


class Quantized(nn.Module):
    """Base class of both layers: slices, a bias, and the active time group.

    The tensors are those on disk; the kernels are built from them, and again after a move or a load. The output dtype
    is autocast's where it is on, else that of the input. The gradient by x is that of the float layer with the
    dequantized weights (straight-through estimator); weights have no gradient.

    The same input gives the same bits. But a difference of 1e-6, such as a compiler makes between the layers, moves
    some values across a rounding boundary, and later layers amplify that: deep networks compiled and not compiled
    agree about as well as either agrees with the float network.

    Args:
        layer: whose bias is copied.
        parts: the slices, in the order of their channels.
    """

    geometry: _int8.ConvGeometry | None = None

    def __init__(self, layer: nn.Conv2d | nn.Linear, parts: Sequence[ChannelSlice]) -> None:
        super().__init__()
        bias = layer.bias
        self.parts: ModuleListOf[PackedSlice] = ModuleListOf(PackedSlice(part) for part in parts)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.group = 0
        self.index = torch.zeros(1, dtype=torch.int64)  # the group, for compiled graphs; not a buffer: those are frozen
        self.kernels: tuple[_int8.Kernel, ...] = ()
        self.register_load_state_dict_post_hook(rebuild_kernels)

    @classmethod
    def from_layer(cls: type[Q], layer: nn.Module, parts: Sequence[ChannelSlice]) -> Q:
        """The layer with these slices in place of its weight; its bias is copied.

        Raises:
            ValueError: if the layer cannot be quantized or the slices do not match its weight.
        """
        layer = quantizable(layer)
        check_slices(layer.weight, parts)
        return cls(layer, parts).prepare()

    def prepare(self: Q) -> Q:
        """Build the kernels; on the meta device there are none."""
        device = self.parts[0].q.device
        if device.type == "meta":
            return self
        self.index = self.index.to(device)
        biases = [self.bias, *[None] * (len(self.parts) - 1)]
        self.kernels = tuple(part.kernel(bias, self.geometry) for part, bias in zip(self.parts, biases, strict=True))
        return self

    @property
    def execution(self) -> str:
        """`int8` if integer kernels run this layer, `simulated` if floating point does."""
        kernels = self.kernels or self.prepare().kernels
        return "int8" if all(kernel.execution == "int8" for kernel in kernels) else "simulated"

    @property
    def time_groups(self) -> int:
        """The number of time groups, each with its own activation scale and zero."""
        return self.parts[0].time_groups

    def set_group(self, group: int) -> None:
        """Use the activation scales of this time group; without effect on a layer with one group.

        Raises:
            ValueError: if there is no such group.
        """
        if (count := self.time_groups) == 1 or group == self.group:
            return
        if not 0 <= group < count:
            raise ValueError(f"there is no time group {group}: this layer has groups 0..{count - 1}")
        self.group = group
        self.index.fill_(group)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, low-rank branch included, in the float layer's shape."""
        return torch.cat([part.weight() for part in self.parts], dim=1)

    def quantization_config(self) -> dict[str, Any]:
        """One entry of the function of this name."""
        first = self.parts[0]
        return {
            "bits": first.bits,
            "act_bits": None if first.act_scale is None else 8,
            "parts": [part.channels[0] for part in self.parts],
            "groups": self.time_groups,
            "rank": 0 if first.up is None else first.up.shape[1],
        }

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for x, `(B, C_in, H, W)` or `(..., C_in)`."""
        device = x.device.type
        if device == "meta":  # only shapes and operation counts
            return _int8.float_product(x, self.weight.to(x), self.geometry, None)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if not self.kernels:
            self.prepare()
        with torch.autocast(device, enabled=False):
            if not (torch.is_grad_enabled() and x.requires_grad):
                return self.run(x, dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            y = _int8.float_product(x.to(dtype), self.weight.to(dtype), self.geometry, bias)
            return y + (self.run(x.detach(), dtype) - y).detach()

    def run(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's output in `dtype`, without a gradient."""
        single = len(self.kernels) == 1
        out_dtype = dtype if single else torch.promote_types(dtype, torch.float32)
        axis, total = -1 if self.geometry is None else 1, None
        for part, kernel in zip(self.parts, self.kernels, strict=True):
            first, last = part.channels
            x_part = x if single else x.narrow(axis, first, last - first)
            y = kernel(x_part, self.group, self.index, out_dtype)
            low_rank = part.low_rank(x_part, self.geometry, y.dtype)
            y = y if low_rank is None else y + low_rank
            total = y if total is None else total + y
        assert total is not None
        return total.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        return self.prepare() if self.kernels else self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kernels": ()}  # kernels are opaque: a copy builds its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()


def rebuild_kernels(layer: Quantized, _: Any) -> None:
    """Build new kernels after `load_state_dict`."""
    layer.prepare()


class QConv2d(Quantized):
    """A quantized 2-D convolution with one group and zero padding: `(B, C_in, H, W) -> (B, C_out, H', W')`.

    Channels are last in memory.
    """

    def __init__(self, layer: nn.Conv2d, parts: Sequence[ChannelSlice]) -> None:
        super().__init__(layer, parts)
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation
        self.geometry = _int8.ConvGeometry(_pair(layer.stride), _pair(layer.padding), _pair(layer.dilation))


class QLinear(Quantized):
    """A quantized linear layer: `(..., C_in) -> (..., C_out)`."""

    def __init__(self, layer: nn.Linear, parts: Sequence[ChannelSlice]) -> None:
        super().__init__(layer, parts)
        self.in_features, self.out_features = layer.in_features, layer.out_features


def _pair(value: Any) -> tuple[int, int]:
    """A pair of ints; torch's own types allow other forms."""
    a, b = value
    return int(a), int(b)


def layers(net: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """The quantized layers of a network, with their names."""
    for name, module in net.named_modules():
        if isinstance(module, Quantized):
            yield name, module


def replace_layers(net: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a network with the named layers replaced; the network itself does not change.

    The copy shares all other parameters and buffers, except the weights of the remaining float convolutions beside
    quantized ones: those are copied to channels-last, so that images stay in the layout that integer kernels read and
    write. (One layer that returns channels-first costs more than an integer convolution.)

    Args:
        net: the network.
        replacements: new layers by the name of the layer that they replace.

    Raises:
        ValueError: for a name that the network does not have.
    """
    modules = dict(net.named_modules())
    if unknown := sorted(replacements.keys() - modules.keys()):
        raise ValueError(f"the network has no layer {unknown[0]!r}")
    tensors: dict[int, Tensor] = {}
    by_id = {id(modules[name]): layer for name, layer in replacements.items()}
    if any(isinstance(layer, QConv2d) for layer in replacements.values()):
        for name, module in modules.items():
            if isinstance(module, nn.Conv2d) and name not in replacements:
                w = module.weight
                own = w.detach().clone(memory_format=torch.channels_last)
                tensors[id(w)] = nn.Parameter(own, requires_grad=w.requires_grad)
    return copy_modules(net, tensors, by_id)


def set_group(net: nn.Module, group: int) -> None:
    """Select a time group in every quantized layer of a network that has several."""
    for _, layer in layers(net):
        layer.set_group(group)


def execution(net: nn.Module) -> str:
    """`int8` if every quantized layer runs in integers, else `simulated`."""
    return "int8" if all(layer.execution == "int8" for _, layer in layers(net)) else "simulated"


def quantization_config(net: nn.Module) -> dict[str, dict[str, Any]]:
    """What `empty_quantized` builds from: {layer name: {bits, act_bits, parts (first channels), groups, rank}}."""
    return {name: layer.quantization_config() for name, layer in layers(net)}


def scale_names(net: nn.Module) -> set[str]:
    """The names of the quantized layers' scales in the state dict, which must not be rounded to half precision."""
    names = ("scale", "act_scale")
    return {f"{at}.parts.{i}.{name}" for at, layer in layers(net) for i in range(len(layer.parts)) for name in names}


def empty_quantized(net: nn.Module, config: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """`replace_layers` with zero-filled quantized layers, to load a weights file into.

    Args:
        net: the float network.
        config: the result of `quantization_config`.

    Raises:
        ValueError: for a layer that is missing or cannot be quantized.
    """
    modules, replacements = dict(net.named_modules()), {}
    for name, entry in config.items():
        if name not in modules:
            raise ValueError(f"the network has no layer {name!r}")
        layer = modules[name]
        kind: type[Quantized] = QLinear if isinstance(layer, nn.Linear) else QConv2d
        replacements[name] = kind.from_layer(layer, empty_slices(layer, entry))
    return replace_layers(net, replacements)


def empty_slices(layer: nn.Module, config: Mapping[str, Any]) -> list[ChannelSlice]:
    """Zero-filled slices of a layer, in the shapes of one entry of `quantization_config`."""
    weight = quantizable(layer).weight
    bits, act_bits, groups, rank = (int(config[key] or 0) for key in ("bits", "act_bits", "groups", "rank"))
    starts, rows, parts = [int(first) for first in config["parts"]], weight.shape[0], []
    for first, last in zip(starts, [*starts[1:], weight.shape[1]], strict=True):
        q = torch.zeros(rows, last - first, *weight.shape[2:], dtype=torch.uint8 if bits == 4 else torch.int8)
        part = ChannelSlice(
            channels=(first, last),
            q=q,
            scale=torch.ones(rows),
            zero=torch.zeros(rows, dtype=torch.uint8) if bits == 4 else None,
            bits=bits,
            act_scale=torch.ones(groups) if act_bits else None,
            act_zero=torch.zeros(groups, dtype=torch.uint8) if act_bits else None,
            low_rank=(torch.zeros(rows, rank), torch.zeros(rank, q[0].numel())) if rank else None,
        )
        parts.append(part)
    return parts
