"""The tensors of one slice of a quantised layer: as a quantiser gives them, and packed as they are kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _int8


@dataclass(frozen=True)
class ChannelSlice:
    """One slice of a layer's input channels, as a quantiser made it.

    channels: [first, last) of the input channels.
    q: weight codes in the layer's own shape (C_out, last - first, ...): int8 in -127..127 for 8 bits (symmetric),
        uint8 in 0..15 for 4 bits (asymmetric).
    scale: (C_out,) float32, s_w. zero: (C_out,) integers 0..15 for 4 bits, None for 8.
    bits: 8 or 4.
    act_scale, act_zero: (G,) float32 and (G,) integers 0..255, one for each group of times; None: activations stay
        in floating point, so that only the file is smaller ("simulated").
    low_rank: (C_out, r) and (r, fan_in), a branch in floating point that is added; kept as float16.
    """

    channels: tuple[int, int]
    q: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    act_scale: Tensor | None
    act_zero: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None = None


def pack4(codes: Tensor) -> Tensor:
    """Codes 0..15 of any shape -> two a byte, the first in the low half; an odd count ends with a zero."""
    flat = codes.reshape(-1).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack4(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """What `pack4` packed, uint8 in this shape."""
    count = 1
    for side in shape:
        count *= side
    return torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1)[:count].reshape(tuple(shape))


class PackedSlice(nn.Module):
    """The tensors of one part, as they are on disk, and what a kernel needs of them, made when it is first asked."""

    def __init__(self, part: ChannelSlice) -> None:
        super().__init__()
        self.channels, self.bits, self.shape = part.channels, part.bits, tuple(part.q.shape)
        self.register_buffer("q", pack4(part.q) if part.bits == 4 else part.q.to(torch.int8).contiguous())
        self.register_buffer("scale", part.scale.detach().float().reshape(-1).clone())
        self.register_buffer("zero", None if part.zero is None else part.zero.reshape(-1).to(torch.uint8))
        acts, zeros, low = part.act_scale, part.act_zero, part.low_rank
        self.register_buffer("act_scale", None if acts is None else acts.detach().float().reshape(-1).clone())
        self.register_buffer("act_zero", None if zeros is None else zeros.reshape(-1).to(torch.uint8))
        self.register_buffer("up", None if low is None else low[0].detach().half())
        self.register_buffer("down", None if low is None else low[1].detach().half())

    def integers(self) -> Tensor:
        """The weights v as int8, in the layer's shape; `v * scale` is what they stand for."""
        if self.bits == 8:
            return self.q
        q = unpack4(self.q, self.shape).to(torch.int8)
        return q - self.zero.to(torch.int8).reshape(-1, *[1] * (q.ndim - 1))

    def weight(self) -> Tensor:
        """What the part stands for in floating point."""
        w = self.integers().float() * self.scale.reshape(-1, *[1] * (len(self.shape) - 1))
        return w if self.up is None else w + (self.up.float() @ self.down.float()).reshape(self.shape)

    def kernel(self, bias: Tensor | None, moves: _int8.ConvGeometry | None) -> _int8.Kernel:
        """The best kernel for where the tensors are."""
        if self.act_scale is None:
            return _int8.FloatKernel(self.integers(), self.scale, bias, moves)
        return _int8.best_kernel(
            self.integers(), self.scale, bias, moves, self.act_scale.tolist(), self.act_zero.tolist()
        )

    def side(self, x: Tensor, moves: _int8.ConvGeometry | None, dtype: torch.dtype) -> Tensor:
        """up down x, in floating point."""
        down, up = self.down.to(dtype), self.up.to(dtype)
        if moves is None:
            return _int8.float_product(_int8.float_product(x.to(dtype), down, None), up, None)
        inner = _int8.float_product(x.to(dtype), down.reshape(-1, *self.shape[1:]), moves)
        return _int8.float_product(inner, up.reshape(*up.shape, 1, 1), _int8.ConvGeometry())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: value for name, value in self._buffers.items() if value is not None and value.is_floating_point()}
        super()._apply(fn, recurse)
        for name, value in kept.items():  # a network in half precision keeps its scales in float32
            moved = self._buffers[name]
            if moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self


def check_slices(weight: Tensor, parts: Sequence[ChannelSlice]) -> None:
    """Refuse parts that do not make up a layer of this weight."""
    at = 0
    for part in parts:
        first, last = part.channels
        shape, found = (weight.shape[0], last - first, *weight.shape[2:]), tuple(part.q.shape)
        if first != at or found != shape:
            raise ValueError(f"part {first}..{last} has codes {found}, expected {shape} from channel {at}")
        if part.bits not in (4, 8) or (part.zero is None) != (part.bits == 8):
            raise ValueError(f"a part has 8 bits and no zero, or 4 bits and a zero a channel, got {part.bits} bits")
        if (part.act_scale is None) != (part.act_zero is None):
            raise ValueError("act_scale and act_zero are given together or not at all")
        low, high = (-127, 127) if part.bits == 8 else (0, 15)
        least, most = int(part.q.min()), int(part.q.max())
        if least < low or most > high:
            raise ValueError(f"codes of {part.bits} bits lie in {low}..{high}, got {least}..{most}")
        at = last
    if at != weight.shape[1]:
        raise ValueError(f"the parts cover {at} of the layer's {weight.shape[1]} input channels")
    alike = {(p.bits, p.act_scale is None, 0 if p.act_scale is None else p.act_scale.numel()) for p in parts}
    if len(alike) > 1:
        raise ValueError("the parts of one layer need the same bits and the same groups of times")
