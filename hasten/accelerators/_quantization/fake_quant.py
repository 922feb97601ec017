"""`FakeQuantLayer`: a layer with fake-quantised weights and activations, in floating point and with gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nets.copies import copy_modules
from ...nets.quantized import ChannelSlice, QConv2d, QLinear, why_not_quantizable
from .quantizer import ACTS, WEIGHTS, as_channels, codes, fake_quantize, weight_range

__all__ = [
    "FakeQuantLayer",
    "FakeQuantSlice",
    "fake_quant_layers",
    "frozen_copy",
    "is_quantizable",
    "is_reparametrised",
    "replace_module",
]

ALTERNATIONS = 4  # of the low-rank branch and the rounding

Rounding = Callable[[Tensor], Tensor]


class FakeQuantSlice(nn.Module):
    """One slice of a layer's input channels: the codes of its weights, and the range of its activations.

    Args:
        weight: (C_out, C_in, ...), of the layer.
        channels: [first, last) of the input channels.
        bits: of the weights, 8 or 4.
        how: "minmax" or "search", of the weights' ranges.
        rank: of the low-rank branch; 0: none.

    Attributes:
        target: (C_out, c, ...), the weights to round, float32.
        q: (C_out, c, ...), their codes, float32.
        scale: (C_out,).
        zero: (C_out,).
        v: what decides each rounding while it is learned, see `learn_rounding`; else None.
        act_scale: (G,), of each group of times; None where activations are not rounded.
        act_zero: (G,), or None.
        log_step: (G,), the logarithm of `act_scale` while it is learned; else None.
        up: (C_out, r), of the low-rank branch, or None.
        down: (r, fan_in), or None.
    """

    target: Tensor
    q: Tensor
    scale: Tensor
    zero: Tensor
    up: Tensor | None
    down: Tensor | None
    act_scale: Tensor | None
    act_zero: Tensor | None

    def __init__(self, weight: Tensor, channels: tuple[int, int], bits: int, how: str, rank: int) -> None:
        super().__init__()
        self.channels, self.bits, self.grid = channels, bits, WEIGHTS[bits]
        target = weight.detach()[:, channels[0] : channels[1]].float()
        up, down, target = _low_rank_branch(target, bits, how, rank)
        scale, zero = weight_range(target, bits, how)
        for name, value in {"target": target, "scale": scale, "zero": zero, "up": up, "down": down}.items():
            self.register_buffer(name, value)
        self.register_buffer("q", codes(target, as_channels(scale, target), as_channels(zero, target), self.grid))
        self.register_buffer("act_scale", None)
        self.register_buffer("act_zero", None)
        self.v: Tensor | None = None
        self.log_step: Tensor | None = None

    def codes(self, rounding: Rounding) -> Tensor:
        """The weights' codes; while rounding is learned, floor + rounding(v)."""
        if self.v is None:
            return self.q
        floor = torch.floor(self.target / as_channels(self.scale, self.target)) + rounding(self.v)
        return (floor + as_channels(self.zero, self.target)).clamp(self.grid.low, self.grid.high)

    def weight(self, rounding: Rounding) -> Tensor:
        """The dequantised weights."""
        zero, scale = as_channels(self.zero, self.target), as_channels(self.scale, self.target)
        return (self.codes(rounding) - zero) * scale

    def low_rank_weight(self) -> Tensor | None:
        """The low-rank branch as a weight, or None."""
        return None if self.up is None or self.down is None else (self.up @ self.down).view_as(self.target)

    def quantize_acts(self, x: Tensor, group: int) -> Tensor:
        """Fake-quantised activations.

        Args:
            x: activations of this slice.
            group: the group of times whose scale is used.
        """
        if self.act_scale is None or self.act_zero is None:
            return x
        scale = self.act_scale if self.log_step is None else self.log_step.exp()
        return fake_quantize(x, scale[group].to(x.dtype), self.act_zero[group].to(x.dtype), ACTS[8])

    def to_part(self) -> ChannelSlice:
        """The slice for a layer that computes with integers."""
        four = self.bits == 4
        return ChannelSlice(
            channels=self.channels,
            q=self.q.to(torch.uint8 if four else torch.int8),
            scale=self.scale,
            zero=self.zero.to(torch.uint8) if four else None,
            bits=self.bits,
            act_scale=self.act_scale,
            act_zero=None if self.act_zero is None else self.act_zero.to(torch.uint8),
            low_rank=None if self.up is None or self.down is None else (self.up, self.down),
        )


class FakeQuantLayer(nn.Module):
    """`y = bias + sum over slices of conv(quantize_acts(x), weight) + branch x`, of a Conv2d or a Linear.

    Args:
        layer: the layer; its weights stay the network's.
        edges: the first input channel of each slice.
        bits: of the weights, 8 or 4.
        how: "minmax" or "search", of the weights' ranges.
        rank: of the low-rank branch; 0: none.

    Attributes:
        group: the group of times whose activation ranges are used.
        shift: (C_out,), added to the bias, or None.
        rounding: the h of `learn_rounding`, while it is learned.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, edges: Sequence[int], bits: int, how: str = "search", rank: int = 0
    ) -> None:
        super().__init__()
        self.conv = isinstance(layer, nn.Conv2d)
        self.wrapped = [layer]  # in a list, so that it is no submodule: its weights belong to the network
        self.pieces = nn.ModuleList(
            FakeQuantSlice(layer.weight, (a, b), bits, how, rank)
            for a, b in zip(edges, [*edges[1:], _input_channels(layer)])
        )
        self.group = 0
        self.shift: Tensor | None = None
        self.rounding: Rounding = torch.sigmoid

    @property
    def slices(self) -> list[FakeQuantSlice]:
        """The slices of the input channels, in order."""
        return cast("list[FakeQuantSlice]", list(self.pieces))

    @property
    def layer(self) -> nn.Conv2d | nn.Linear:
        """The layer in floating point."""
        return self.wrapped[0]

    @property
    def weight(self) -> Tensor:
        """The layer's own weight, for code that reads its dtype, device or shape, and for a LoRA around the layer."""
        return self.layer.weight

    def __getattr__(self, name: str) -> Any:
        """Other attributes of the layer that networks read: its channels, kernel size, stride, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "wrapped" not in self.__dict__:
                raise
            return getattr(self.__dict__["wrapped"][0], name)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, shifted by the bias correction."""
        own = self.layer.bias
        return own if own is None or self.shift is None else own + self.shift.to(own)

    def exact(self, x: Tensor) -> Tensor:
        """The output of the layer in floating point."""
        return self._product(x, self.layer.weight, self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the fake-quantised layer."""
        slices = self.slices
        if all(piece.act_scale is None for piece in slices):
            weights = [piece.weight(self.rounding) for piece in slices]
            weights = [w if (low := p.low_rank_weight()) is None else w + low for p, w in zip(slices, weights)]
            return self._product(x, torch.cat(weights, dim=1) if len(weights) > 1 else weights[0], self.bias)
        y: Tensor | None = None
        for piece in slices:
            inputs = x if len(slices) == 1 else self.input_slice(x, piece.channels)
            bias = self.bias if y is None else None
            term = self._product(piece.quantize_acts(inputs, self.group), piece.weight(self.rounding), bias)
            if (low := piece.low_rank_weight()) is not None:
                term = term + self._product(inputs, low, None)
            y = term if y is None else y + term
        assert y is not None
        return y

    def input_slice(self, x: Tensor, channels: tuple[int, int]) -> Tensor:
        """Some input channels.

        Args:
            x: (B, C_in, H, W) of a convolution, (..., C_in) of a linear layer.
            channels: [first, last).
        """
        return x[:, channels[0] : channels[1]] if self.conv else x[..., channels[0] : channels[1]]

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution or matrix product."""
        layer, weight = self.layer, weight.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(x, weight, bias)

    def to_integer(self) -> nn.Module:
        """The layer that computes with integers."""
        layer = copy.copy(self.layer)
        layer._parameters = {**layer._parameters}
        if (bias := self.bias) is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return (QConv2d if self.conv else QLinear).from_layer(layer, [piece.to_part() for piece in self.slices])


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer that can be quantised."""
    kinds = (nn.Conv2d, nn.Linear)
    plain = any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)
    return plain and not is_reparametrised(module) and why_not_quantizable(module) is None


def is_reparametrised(module: nn.Module) -> bool:
    """Whether the weight is computed from other tensors before each use: `torch.nn.utils.parametrizations`, or the
    older `weight_norm` and `spectral_norm`, which use a hook."""
    return hasattr(module, "parametrizations") or "weight" not in module._parameters


def frozen_copy(net: nn.Module) -> nn.Module:
    """A copy of a network, in evaluation mode and without gradients, whose layers can be replaced; memory is shared."""
    tensors: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    return copy_modules(net, tensors).eval()


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule, in place.

    Args:
        net: the network.
        name: of the submodule.
        module: the new one.
    """
    parent, _, own = name.rpartition(".")
    setattr(net.get_submodule(parent), own, module)


def fake_quant_layers(net: nn.Module) -> dict[str, FakeQuantLayer]:
    """The fake-quantised layers of a network, by name; of such a layer itself, under the empty name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, FakeQuantLayer)}


def _input_channels(layer: nn.Conv2d | nn.Linear) -> int:
    """The number of input channels."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _low_rank_branch(weight: Tensor, bits: int, how: str, rank: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """up (C_out, r), down (r, fan_in), both exact in float16, and the residual of the weight that is rounded.

    Alternately: the best rank-r approximation of the rounding residual, and the rounding of what it leaves. The first
    one is the singular value decomposition of the weight itself (Li et al. 2024, arXiv:2411.05007), the alternation is
    that of Li et al. 2023, arXiv:2310.08659.
    """
    rows = weight.flatten(1)
    rank = min(rank, *rows.shape)
    if not rank:
        return None, None, weight
    best: tuple[float, Tensor, Tensor] | None = None
    rest = torch.zeros_like(rows)  # the dequantised codes
    for _ in range(ALTERNATIONS):
        u, s, v = torch.linalg.svd(rows - rest, full_matrices=False)
        root = s[:rank].sqrt()
        up, down = (u[:, :rank] * root).half().float(), (root[:, None] * v[:rank]).half().float()
        residual = rows - up @ down
        scale, zero = weight_range(residual, bits, how)
        q = codes(residual, scale[:, None], zero[:, None], WEIGHTS[bits])
        rest = (q - zero[:, None]) * scale[:, None]
        error = float((residual - rest).square().sum())
        if best is None or error < best[0]:
            best = error, up, down
    assert best is not None
    return best[1], best[2], (rows - best[1] @ best[2]).view_as(weight)
