"""A layer on its way to integers: rounded weights and activations in floating point, so that gradients can be had."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...nets.copies import copy_modules
from ...nets.quantized import ChannelSlice, QConv2d, QLinear, why_not_quantizable
from .quantizer import ACTS, WEIGHTS, codes, fake, of_weights, spread

ALTERNATIONS = 4  # of the low-rank branch and what is rounded


class Piece(nn.Module):
    """One slice of a layer's input channels: the codes of its weights, and the range of its activations.

    q: (C_out, c, ...) codes, as floats; scale, zero: (C_out,). v: while rounding is learned, what tells up from down.
    act_scale, act_zero: (G,), None where activations are not rounded. up, down: (C_out, r), (r, fan_in), or None.
    """

    def __init__(self, weight: Tensor, channels: tuple[int, int], bits: int, how: str, rank: int) -> None:
        super().__init__()
        self.channels, self.bits, self.grid = channels, bits, WEIGHTS[bits]
        target = weight.detach()[:, channels[0] : channels[1]].float()
        up, down, target = _low_rank(target, bits, how, rank)
        scale, zero = of_weights(target, bits, how)
        for name, value in {"target": target, "scale": scale, "zero": zero, "up": up, "down": down}.items():
            self.register_buffer(name, value)
        self.register_buffer("q", codes(target, spread(scale, target), spread(zero, target), self.grid))
        self.register_buffer("act_scale", None)
        self.register_buffer("act_zero", None)
        self.v: Tensor | None = None
        self.log_step: Tensor | None = None  # while steps are learned: (G,), the logarithm of act_scale

    def rounded(self, soft: Callable[[Tensor], Tensor]) -> Tensor:
        """The codes, those being learned as floor + soft(v)."""
        if self.v is None:
            return self.q
        whole = torch.floor(self.target / spread(self.scale, self.target)) + soft(self.v)
        return (whole + spread(self.zero, self.target)).clamp(self.grid.low, self.grid.high)

    def weight(self, soft: Callable[[Tensor], Tensor]) -> Tensor:
        """What the codes stand for."""
        return (self.rounded(soft) - spread(self.zero, self.target)) * spread(self.scale, self.target)

    def branch(self) -> Tensor | None:
        """The low-rank branch as a weight."""
        return None if self.up is None else (self.up @ self.down).view_as(self.target)

    def acts(self, x: Tensor, group: int) -> Tensor:
        """The activations x, rounded with the scale of this group of times."""
        if self.act_scale is None or self.act_zero is None:
            return x
        scale = self.act_scale if self.log_step is None else self.log_step.exp()
        return fake(x, scale[group].to(x.dtype), self.act_zero[group].to(x.dtype), ACTS[8])

    def part(self) -> ChannelSlice:
        """The same for the layers that compute with integers."""
        four = self.bits == 4
        return ChannelSlice(
            self.channels, self.q.to(torch.uint8 if four else torch.int8), self.scale,
            self.zero.to(torch.uint8) if four else None, self.bits, self.act_scale,
            None if self.act_zero is None else self.act_zero.to(torch.uint8),
            None if self.up is None else (self.up, self.down),
        )  # fmt: skip


class Simulated(nn.Module):
    """`y = bias + sum over pieces of conv(acts(x), weight) + branch x`, for a Conv2d or a Linear.

    group: of the times, which of the activation ranges holds. shift: of the bias (C_out,). soft: the h of `_rounding`,
    of what is being learned.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, edges: Sequence[int], bits: int, how: str = "search", rank: int = 0
    ) -> None:
        super().__init__()
        self.conv = isinstance(layer, nn.Conv2d)
        self.kept = [layer]  # in a list, so that it is no submodule: its weights belong to the network
        self.pieces = nn.ModuleList(
            Piece(layer.weight, (a, b), bits, how, rank) for a, b in zip(edges, [*edges[1:], _inputs(layer)])
        )
        self.group = 0
        self.shift: Tensor | None = None
        self.soft: Callable[[Tensor], Tensor] = torch.sigmoid

    @property
    def layer(self) -> nn.Conv2d | nn.Linear:
        return self.kept[0]

    @property
    def weight(self) -> Tensor:
        """The layer's own weight, for what looks at its dtype, device or shape, and for a LoRA around the layer."""
        return self.layer.weight

    def __getattr__(self, name: str) -> Any:
        """What networks read of a layer beside its weight and bias: its channels, kernel size, stride, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "kept" not in self.__dict__:
                raise
            return getattr(self.__dict__["kept"][0], name)

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias, with the shift that rounding asks for."""
        own = self.layer.bias
        return own if own is None or self.shift is None else own + self.shift.to(own)

    def exact(self, x: Tensor) -> Tensor:
        """What the layer itself answers."""
        return self._apply(x, self.layer.weight, self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        pieces: list[Piece] = list(self.pieces)  # type: ignore[arg-type]
        if all(piece.act_scale is None for piece in pieces):
            each = [piece.weight(self.soft) for piece in pieces]
            each = [w if (low := p.branch()) is None else w + low for p, w in zip(pieces, each)]
            return self._apply(x, torch.cat(each, dim=1) if len(each) > 1 else each[0], self.bias)
        y: Tensor | None = None
        for piece in pieces:
            part = x if len(pieces) == 1 else self.slice(x, piece.channels)
            bias = self.bias if y is None else None
            found = self._apply(piece.acts(part, self.group), piece.weight(self.soft), bias)
            if (low := piece.branch()) is not None:
                found = found + self._apply(part, low, None)
            y = found if y is None else y + found
        assert y is not None
        return y

    def slice(self, x: Tensor, channels: tuple[int, int]) -> Tensor:
        """Input channels [first, last) of x."""
        return x[:, channels[0] : channels[1]] if self.conv else x[..., channels[0] : channels[1]]

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer, weight = self.layer, weight.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.linear(x, weight, bias)

    def made(self) -> nn.Module:
        """The layer that computes with integers."""
        kind, layer = QConv2d if self.conv else QLinear, copy.copy(self.layer)
        layer._parameters = {**layer._parameters}
        if (bias := self.bias) is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return kind.from_layer(layer, [piece.part() for piece in self.pieces])  # type: ignore[arg-type,operator,misc]


def takes(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer that can be exchanged."""
    kinds = (nn.Conv2d, nn.Linear)
    plain = any(isinstance(module, k) and type(module).forward is k.forward for k in kinds)
    return plain and not is_reparametrised(module) and why_not_quantizable(module) is None


def is_reparametrised(module: nn.Module) -> bool:
    """Whether the weight is computed from other tensors before each use: `torch.nn.utils.parametrizations`, or the
    older `weight_norm` and `spectral_norm`, which keep a hook."""
    return hasattr(module, "parametrizations") or "weight" not in module._parameters


def shadow(net: nn.Module) -> nn.Module:
    """A copy of a network, in evaluation mode, whose layers can be replaced; the numbers are those of the original,
    which gets no gradients."""
    tensors: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()}
    return copy_modules(net, tensors).eval()


def replace_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, in this very network."""
    parent, _, own = name.rpartition(".")
    setattr(net.get_submodule(parent), own, module)


def simulated(net: nn.Module) -> dict[str, Simulated]:
    """The simulated layers of a network, by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, Simulated)}


def _inputs(layer: nn.Conv2d | nn.Linear) -> int:
    """The number of input channels."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _low_rank(weight: Tensor, bits: int, how: str, rank: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """up (C_out, r), down (r, fan_in), both exact in float16, and what is left of the weight for rounding.

    In turn: the rank-r part nearest to what rounding leaves over, and the rounding of what that part leaves over. The
    first turn of the two is the singular value decomposition of the weight itself (Li et al. 2024, arXiv:2411.05007),
    the turns after it are those of Li et al. 2023, arXiv:2310.08659.
    """
    rows = weight.flatten(1)
    rank = min(rank, *rows.shape)
    if not rank:
        return None, None, weight
    best: tuple[float, Tensor, Tensor] | None = None
    rest = torch.zeros_like(rows)  # what the codes stand for
    for _ in range(ALTERNATIONS):
        u, s, v = torch.linalg.svd(rows - rest, full_matrices=False)
        root = s[:rank].sqrt()
        up, down = (u[:, :rank] * root).half().float(), (root[:, None] * v[:rank]).half().float()
        left = rows - up @ down
        scale, zero = of_weights(left, bits, how)
        q = codes(left, scale[:, None], zero[:, None], WEIGHTS[bits])
        rest = (q - zero[:, None]) * scale[:, None]
        wrong = float((left - rest).square().sum())
        if best is None or wrong < best[0]:
            best = wrong, up, down
    assert best is not None
    return best[1], best[2], (rows - best[1] @ best[2]).view_as(weight)
