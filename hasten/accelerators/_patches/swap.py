"""A network that runs on a part of the rows: a copy with the same weights, in which every layer that mixes rows is
exchanged for one that asks the other ranks."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Any

from torch import nn

from ...errors import BadInput
from ...nets.copies import copy_modules
from .attention import PatchAttention, PatchProcessor, Text
from .exchange import Exchange
from .layers import FirstConv, HaloConv, LastConv, PatchNorm, local

__all__ = ["Patched", "core_of", "twin"]

# Modules that only call their children and what works on every row by itself, by the library that they are of.
CONTAINERS = {
    "hasten": {"UNet", "Stage", "Up", "ResBlock"},
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
# Children of the network itself that are given no rows: what embeds the time, classes, text.
ASIDE = {
    "time", "label", "guidance", "steps", "time_proj", "time_embedding", "class_embedding", "add_embedding",
    "add_time_proj", "encoder_hid_proj", "time_embed_act",
}  # fmt: skip


def core_of(net: nn.Module) -> nn.Module:
    """The module whose children are the layers: of a network of diffusers with seams the one inside."""
    inside = getattr(net, "net", None)
    return inside if isinstance(inside, nn.Module) and hasattr(net, "side_inputs") else net


def twin(net: nn.Module) -> Any:
    """A copy of the network with the very same parameters and buffers."""
    return copy_modules(net)


class Patched:
    """The copy, as `net`. The exchange is told how many rows of the image are one row of its coarsest level.

    Raises:
        BadInput: for a network with a layer that is not known, which might mix rows.
    """

    def __init__(self, net: nn.Module, exchange: Exchange, text: Text) -> None:
        self.exchange, self.text = exchange, text
        self._done: dict[int, nn.Module] = {}
        self._kept: list[nn.Module] = []  # what `_done` goes by: freed, its id might be another's
        self._strides: list[int] = [int(getattr(net, "patch", 1))]
        core = core_of(net)
        ends = ("conv_in", "conv_out")
        if not _known(core) or not all(isinstance(getattr(core, end, None), nn.Conv2d) for end in ends):
            raise BadInput(
                f"patch_parallel does not know {type(core).__name__}: what works is hasten's UNet and UNet2DModel and "
                "UNet2DConditionModel of diffusers, neither quantized nor compiled"
            )
        self.net = twin(net)
        self._exchanged(core_of(self.net), "", ASIDE)
        exchange.multiple = prod(self._strides)
        core_of(self.net).conv_in.patch = self._strides[0]  # type: ignore[union-attr]

    def _exchanged(self, module: nn.Module, path: str, without: Collection[str] = ()) -> None:
        for name, child in list(module.named_children()):
            if name not in without and child is not None:
                where = f"{path}.{name}" if path else name
                module._modules[name] = self._made(child, where)
        for name, child in list(module._modules.items()):  # the same one under a second name
            if child is not None and id(child) in self._done:
                module._modules[name] = self._done[id(child)]

    def _made(self, child: nn.Module, where: str) -> nn.Module:
        if id(child) not in self._done:
            self._done[id(child)] = made = self._layer(child, where)
            self._done[id(made)] = made
            self._kept.append(child)
        return self._done[id(child)]

    def _layer(self, child: Any, where: str) -> nn.Module:
        """What stands in the place of one module."""
        kind, exchange = type(child), self.exchange
        if kind is nn.Conv2d:
            self._strides.append(child.stride[0])
            ends = {"conv_in": FirstConv, "conv_out": LastConv}
            if where in ends:
                return ends[where](child, exchange, where)
            return child if local(child) else HaloConv(child, exchange, where)
        if kind is nn.GroupNorm:
            return PatchNorm(child, exchange)
        if kind is nn.LayerNorm and len(child.normalized_shape) == 1:
            return child
        if kind in (nn.AvgPool2d, nn.MaxPool2d) and _tiles(child):
            self._strides.append(_rows(child.stride))
            return child
        if kind is nn.Upsample and child.mode == "nearest":
            return child
        if kind.__name__ == "Attention" and _library(child) in CONTAINERS:
            self._exchanged(child, where, ("norm_cross",))
            if _library(child) == "hasten":
                return PatchAttention(child, exchange)
            child.processor = PatchProcessor(child, exchange, self.text, where)
            return child
        if _pads_itself(child) and type(child.conv) is nn.Conv2d:
            self._strides.append(child.conv.stride[0])
            return HaloConv(child.conv, exchange, where, (0, 1, 0, 1))
        if kind in ROW_BY_ROW or _known(child) or _low_rank(child):
            self._exchanged(child, where)
            return child
        raise BadInput(
            f"patch_parallel does not know {where}, a {kind.__name__}: it may mix rows of the image "
            "(a quantized or compiled network cannot be parted either)"
        )


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _known(module: Any) -> bool:
    """Whether it does nothing by itself that mixes rows."""
    if type(module).__name__ not in CONTAINERS.get(_library(module), ()):
        return False
    if any(getattr(module, name, None) is not None for name in ("s1", "s2", "b1", "b2")):
        return False  # FreeU, which filters in frequencies
    resampled = [getattr(module, name, None) for name in ("upsample", "downsample")]
    return type(module).__name__ != "ResnetBlock2D" or all(
        one is None or isinstance(one, nn.Module) for one in resampled
    )


def _low_rank(module: Any) -> bool:
    """Whether it is peft's LoRA around a linear layer: products by rows, of which one may be missing."""
    inside = getattr(module, "base_layer", None)
    return _library(module) == "peft" and type(inside) is nn.Linear and not getattr(module, "use_dora", {})


def _pads_itself(module: Any) -> bool:
    """Whether it is a downsampler of diffusers that adds zeros below and on the right before its convolution."""
    named = type(module).__name__ == "Downsample2D" and _library(module) == "diffusers"
    return named and module.use_conv and module.padding == 0 and module.norm is None


def _rows(size: Any) -> int:
    return int(size[0] if isinstance(size, tuple) else size)


def _tiles(pool: Any) -> bool:
    """Whether the windows of a pooling neither overlap nor leave anything out."""
    return _rows(pool.kernel_size) == _rows(pool.stride) and _rows(pool.padding) == 0
