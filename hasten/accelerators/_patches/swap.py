"""`Patched`: a copy of a network with the same weights, whose layers that mix rows exchange them with other ranks."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any

from torch import nn

from ...errors import BadInput
from ...nets.copies import copy_modules
from .attention import PatchAttention, PatchProcessor, TextVersion
from .exchange import Exchange
from .layers import FirstConv, HaloConv, LastConv, PatchNorm, is_local

__all__ = ["Patched", "core_of", "shared_copy"]

# Modules that only call their children and operations on every row by itself, by their library.
CONTAINERS = {
    "hasten": {"UNet", "UNetStage", "Up", "ResBlock"},
    "diffusers": {
        "UNet2DModel", "UNet2DConditionModel", "DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D",
        "ResnetDownsampleBlock2D", "UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "ResnetUpsampleBlock2D",
        "UNetMidBlock2D", "UNetMidBlock2DCrossAttn", "ResnetBlock2D", "Transformer2DModel", "BasicTransformerBlock",
        "FeedForward", "GEGLU", "GELU", "ApproximateGELU", "SwiGLU", "AdaLayerNorm", "AdaLayerNormZero", "Upsample2D",
        "Downsample2D", "RMSNorm", "FP32LayerNorm", "FP32SiLU", "Timesteps", "TimestepEmbedding",
    },
}  # fmt: skip
ROW_BY_ROW = {
    nn.Linear, nn.Identity, nn.Dropout, nn.Dropout2d, nn.SiLU, nn.GELU, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Embedding, nn.PixelShuffle, nn.PixelUnshuffle, nn.Sequential, nn.ModuleList, nn.ModuleDict,
}  # fmt: skip
# Children of the network itself whose input has no rows: what embeds the time, classes, text.
ASIDE = {
    "time", "label", "guidance", "steps", "time_proj", "time_embedding", "class_embedding", "add_embedding",
    "add_time_proj", "encoder_hid_proj", "time_embed_act",
}  # fmt: skip


def core_of(net: nn.Module) -> nn.Module:
    """The module whose children are the layers: of a `SplitNetwork` the network of diffusers, else the network."""
    inside = getattr(net, "net", None)
    return inside if isinstance(inside, nn.Module) and hasattr(net, "side_inputs") else net


def shared_copy(net: nn.Module) -> Any:
    """A copy of the network with the very same parameters and buffers."""
    return copy_modules(net)


class Patched:
    """The copy, as `net`; sets `exchange.multiple`.

    Args:
        net: the network.
        exchange: of the ranks.
        text: counts the changes of the text.

    Raises:
        BadInput: for a network with an unknown layer, which might mix rows.
    """

    def __init__(self, net: nn.Module, exchange: Exchange, text: TextVersion) -> None:
        self.exchange, self.text = exchange, text
        self._replaced: dict[int, nn.Module] = {}
        self._originals: list[nn.Module] = []  # by whose ids `_replaced` goes: freed, an id might be another's
        self._strides: list[int] = [int(getattr(net, "patch", 1))]
        core = core_of(net)
        ends = ("conv_in", "conv_out")
        if not _is_container(core) or not all(isinstance(getattr(core, end, None), nn.Conv2d) for end in ends):
            raise BadInput(
                f"patch_parallel does not know {type(core).__name__}: supported are hasten's UNet and UNet2DModel and "
                "UNet2DConditionModel of diffusers, neither quantized nor compiled"
            )
        self.net = shared_copy(net)
        copied: Any = core_of(self.net)
        self._replace_children(copied, "", ASIDE)
        exchange.multiple = prod(self._strides)
        copied.conv_in.patch = self._strides[0]

    def _replace_children(self, module: nn.Module, path: str, without: Collection[str] = ()) -> None:
        """Replace the children of a module, in place."""
        children: dict[str, nn.Module | None] = module._modules
        for name, child in list(module.named_children()):
            if name not in without:
                children[name] = self._replacement(child, f"{path}.{name}" if path else name)
        for name, other in list(children.items()):  # the same one under a second name
            if other is not None and id(other) in self._replaced:
                children[name] = self._replaced[id(other)]

    def _replacement(self, child: nn.Module, where: str) -> nn.Module:
        """What replaces a module, the same one each time."""
        if id(child) not in self._replaced:
            self._replaced[id(child)] = layer = self._layer(child, where)
            self._replaced[id(layer)] = layer
            self._originals.append(child)
        return self._replaced[id(child)]

    def _layer(self, child: Any, where: str) -> nn.Module:
        """A module that replaces `child`, or `child` itself with its children replaced."""
        kind, exchange = type(child), self.exchange
        if kind is nn.Conv2d:
            self._strides.append(child.stride[0])
            ends = {"conv_in": FirstConv, "conv_out": LastConv}
            if where in ends:
                return ends[where](child, exchange, where)
            return child if is_local(child) else HaloConv(child, exchange, where)
        if kind is nn.GroupNorm:
            return PatchNorm(child, exchange)
        if kind is nn.LayerNorm and len(child.normalized_shape) == 1:
            return child
        if kind in (nn.AvgPool2d, nn.MaxPool2d) and _tiles(child):
            self._strides.append(_row_size(child.stride))
            return child
        if kind is nn.Upsample and child.mode == "nearest":
            return child
        if kind.__name__ == "Attention" and _library(child) in CONTAINERS:
            self._replace_children(child, where, ("norm_cross",))
            if _library(child) == "hasten":
                return PatchAttention(child, exchange)
            child.processor = PatchProcessor(child, exchange, self.text, where)
            return child
        if _pads_itself(child) and type(child.conv) is nn.Conv2d:
            self._strides.append(child.conv.stride[0])
            return HaloConv(child.conv, exchange, where, (0, 1, 0, 1))
        if kind in ROW_BY_ROW or _is_container(child) or _is_lora(child):
            self._replace_children(child, where)
            return child
        raise BadInput(
            f"patch_parallel does not know {where}, a {kind.__name__}: it may mix rows of the image "
            "(nor can a quantized or compiled network be divided)"
        )


def _library(module: nn.Module) -> str:
    """The package that defines a module's class."""
    return type(module).__module__.partition(".")[0]


def _is_container(module: Any) -> bool:
    """Whether a module does nothing by itself that mixes rows."""
    if type(module).__name__ not in CONTAINERS.get(_library(module), ()):
        return False
    if any(getattr(module, name, None) is not None for name in ("s1", "s2", "b1", "b2")):
        return False  # FreeU, which filters in frequencies
    resampled = [getattr(module, name, None) for name in ("upsample", "downsample")]
    return type(module).__name__ != "ResnetBlock2D" or all(
        one is None or isinstance(one, nn.Module) for one in resampled
    )


def _is_lora(module: Any) -> bool:
    """Whether a module is peft's LoRA around a linear layer, which computes every row by itself."""
    inside = getattr(module, "base_layer", None)
    return _library(module) == "peft" and type(inside) is nn.Linear and not getattr(module, "use_dora", {})


def _pads_itself(module: Any) -> bool:
    """Whether a module is a downsampler of diffusers that adds zeros below and on the right before its convolution."""
    named = type(module).__name__ == "Downsample2D" and _library(module) == "diffusers"
    return named and module.use_conv and module.padding == 0 and module.norm is None


def _row_size(size: Any) -> int:
    """The size along rows, of one for both or a tuple."""
    return int(size[0] if isinstance(size, tuple) else size)


def _tiles(pool: Any) -> bool:
    """Whether the windows of a pooling neither overlap nor skip anything."""
    return _row_size(pool.kernel_size) == _row_size(pool.stride) and _row_size(pool.padding) == 0
