"""The tensors of one channel slice of a quantized layer: as a quantizer returns them, and as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _int8


@dataclass(frozen=True)
class ChannelSlice:
    """One slice of a layer's input channels, as a quantizer returns it.

    Args:
        channels: [first, last) of the input channels.
        q: weight codes in the layer's own shape (C_out, last - first, ...): int8 in -127..127 for 8 bits (symmetric),
            uint8 in 0..15 for 4 bits (asymmetric).
        scale: s_w (C_out,) float32.
        zero: (C_out,) integers 0..15 for 4 bits, None for 8.
        bits: 8 or 4.
        act_scale: s_x (G,) float32, one per time group; None: activations are not quantized, only the file is smaller.
        act_zero: z_x (G,), integers 0..255; None with `act_scale`.
        low_rank: (C_out, r) and (r, fan_in), a floating-point branch that is added; stored as float16.
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
    """Pack codes 0..15 of any shape two to a byte, the first in the low half; an odd count is padded with a zero.

    Returns:
        uint8 (ceil(count / 2),).
    """
    flat = codes.reshape(-1).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack4(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack4`: uint8 codes of this shape."""
    count = 1
    for side in shape:
        count *= side
    return torch.stack([packed & 15, packed >> 4], dim=1).reshape(-1)[:count].reshape(tuple(shape))


class PackedSlice(nn.Module):
    """The stored tensors of one `ChannelSlice`; its buffers are the entries of the weights file."""

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    act_scale: Tensor | None
    act_zero: Tensor | None
    up: Tensor | None
    down: Tensor | None

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

    @property
    def time_groups(self) -> int:
        """How many pairs of activation scale and zero there are."""
        return 1 if self.act_scale is None else self.act_scale.numel()

    def integer_weight(self) -> Tensor:
        """v as int8, in the layer's shape: `weight = v * scale`."""
        if self.zero is None:
            return self.q
        q = unpack4(self.q, self.shape).to(torch.int8)
        return q - self.zero.to(torch.int8).reshape(-1, *[1] * (q.ndim - 1))

    def weight(self) -> Tensor:
        """The dequantized weight, low-rank branch included, float32 in the layer's shape."""
        w = self.integer_weight().float() * self.scale.reshape(-1, *[1] * (len(self.shape) - 1))
        if self.up is None or self.down is None:
            return w
        return w + (self.up.float() @ self.down.float()).reshape(self.shape)

    def kernel(self, bias: Tensor | None, geometry: _int8.ConvGeometry | None) -> _int8.Kernel:
        """The fastest kernel on the device of the tensors."""
        v = self.integer_weight()
        if self.act_scale is None or self.act_zero is None:
            return _int8.FloatKernel(v, self.scale, bias, geometry)
        return _int8.best_kernel(v, self.scale, bias, geometry, self.act_scale.tolist(), self.act_zero.tolist())

    def low_rank(self, x: Tensor, geometry: _int8.ConvGeometry | None, dtype: torch.dtype) -> Tensor | None:
        """`up down x` in `dtype`; None without a low-rank branch."""
        if self.up is None or self.down is None:
            return None
        down, up = self.down.to(dtype), self.up.to(dtype)
        if geometry is None:
            return _int8.float_product(_int8.float_product(x.to(dtype), down, None), up, None)
        inner = _int8.float_product(x.to(dtype), down.reshape(-1, *self.shape[1:]), geometry)
        return _int8.float_product(inner, up.reshape(*up.shape, 1, 1), _int8.ConvGeometry())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():  # a network in half precision has its scales in float32
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


def check_slices(weight: Tensor, parts: Sequence[ChannelSlice]) -> None:
    """Check that slices make up a layer of this weight (C_out, C_in, ...).

    Raises:
        ValueError: for other shapes, gaps between the slices, codes out of range, or slices of different bits.
    """
    expected_first = 0
    for part in parts:
        first, last = part.channels
        expected, shape = (weight.shape[0], last - first, *weight.shape[2:]), tuple(part.q.shape)
        if first != expected_first or shape != expected:
            raise ValueError(
                f"slice {first}..{last} has codes {shape}, expected {expected} from channel {expected_first}"
            )
        if part.bits not in (4, 8) or (part.zero is None) != (part.bits == 8):
            raise ValueError(f"a slice has 8 bits and no zero, or 4 bits and a zero a channel, got {part.bits} bits")
        if (part.act_scale is None) != (part.act_zero is None):
            raise ValueError("act_scale and act_zero must be given together or not at all")
        low, high = (-127, 127) if part.bits == 8 else (0, 15)
        smallest, largest = int(part.q.min()), int(part.q.max())
        if smallest < low or largest > high:
            raise ValueError(f"codes of {part.bits} bits lie in {low}..{high}, got {smallest}..{largest}")
        expected_first = last
    if expected_first != weight.shape[1]:
        raise ValueError(f"the slices cover {expected_first} of the layer's {weight.shape[1]} input channels")
    kinds = {(p.bits, p.act_scale is None, 0 if p.act_scale is None else p.act_scale.numel()) for p in parts}
    if len(kinds) > 1:
        raise ValueError("the slices of one layer must have the same bits and the same number of time groups")
