"""Integer arithmetic for one convolution or linear layer: what turns x into bytes, and what multiplies the bytes.

A kernel is made of int8 weights v (C_out, C_in, ...), scales s_w (C_out,) and one pair (s_x, z_x) for each group of
times. Called with x it gives  s_x s_w conv(u - z_x, v) + bias,  u = clamp(round(x / s_x + z_x), 0, 255).

`OneDnn` runs on x86 with VNNI (u8 x s8 -> s32; any zero point, and zero padding is right with it). `IntMm` uses
`torch._int_mm`, for linear layers and 1x1 convolutions on CUDA. `Simulated` does the same sums over the same integers
in floating point, anywhere. `Plain` is for layers whose activations stay as they are.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EMITTED = (torch.float32, torch.bfloat16)  # what integer kernels write; other types are cast from float32


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution goes over its image, two numbers each; a linear layer has None in its place."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def size(self, image: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Height and width of the output for an image and a kernel of these sides."""
        known = zip(image, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * pad - d * (k - 1) - 1) // step + 1 for n, k, step, pad, d in known]


def quantize_uint8(x: Tensor, scale: float | Tensor, zero: int | Tensor) -> Tensor:
    """u = clamp(round(x * (1 / scale) + zero), 0, 255) as uint8 in x's memory format; half goes to even.

    Eager on a CPU this is one pass over x. (Its multiply-add rounds once, so that about one value in 30,000 that lies
    on the boundary of two steps may take the other one than in the other paths.) `int_repr()` of what that pass made
    would copy byte by byte and cost six times as much as the pass itself: the bytes are taken as they lie.
    """
    if not eager(x) or not x.numel() or isinstance(scale, Tensor):
        return torch.clamp(torch.round(x.float() * (1.0 / scale) + zero), 0, 255).to(torch.uint8)
    made = torch.quantize_per_tensor(x.float(), scale, int(zero), torch.quint8)
    return torch.empty(0, dtype=torch.uint8).set_(
        made.untyped_storage(), made.storage_offset(), made.size(), made.stride()
    )


def eager(x: Tensor) -> bool:
    """Whether the one-pass kernel of this CPU can be used."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and one_pass()


@functools.cache
def one_pass() -> bool:
    """Whether torch has the one-pass kernel, which it says will go some day, and gives access to its bytes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says so once, and it is said here
            made = torch.quantize_per_tensor(torch.tensor([0.9, -0.2]), 0.1, 3, torch.quint8)
            bytes_ = torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage(), 0, (2,), (1,))
        return bytes_.tolist() == [12, 1]
    except (RuntimeError, AttributeError, TypeError):
        return False


def float_product(x: Tensor, w: Tensor, moves: ConvGeometry | None, bias: Tensor | None = None) -> Tensor:
    """The floating-point layer."""
    if moves is None:
        return F.linear(x, w, bias)
    return F.conv2d(x, w, bias, moves.stride, moves.padding, moves.dilation)


def per_channel(values: Tensor, moves: ConvGeometry | None) -> Tensor:
    """(C_out,) in a shape that goes with the layer's output."""
    return values if moves is None else values.view(-1, 1, 1)


class Kernel:
    """What all have. scales, zeros: one number for each group of times, and the same as tensors in `table`."""

    execution = "simulated"

    def __init__(
        self, v: Tensor, scale: Tensor, bias: Tensor | None, moves: ConvGeometry | None,
        scales: Sequence[float] = (), zeros: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.moves, self.scales, self.zeros = moves, tuple(scales), tuple(zeros)
        self.scale = scale.detach().float().contiguous()
        self.bias = None if bias is None else bias.detach().float()
        device = self.scale.device  # that of the group's index too: a compiled graph copies nothing to it
        self.table = torch.tensor(self.scales, device=device), torch.tensor(self.zeros, device=device)

    def step(self, group: int, index: Tensor) -> tuple[float | Tensor, int | Tensor]:
        """Scale and zero of a group; where there are several, a compiled graph reads them, so that one graph does."""
        if len(self.scales) > 1 and torch.compiler.is_compiling():
            s, z = (values.index_select(0, index) for values in self.table)
            return s, z
        return self.scales[group], self.zeros[group]

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


class FloatKernel(Kernel):
    """Only the weights are integers, and only on disk."""

    def __init__(self, v: Tensor, *rest: Any) -> None:
        super().__init__(v, *rest)
        self.w = v.float() * self.scale.view(-1, *[1] * (v.ndim - 1))

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        return float_product(
            x.to(dtype), self.w.to(dtype), self.moves, None if self.bias is None else self.bias.to(dtype)
        )


class SimulatedKernel(Kernel):
    """The integers as floating-point numbers: no faster than the float layer."""

    def __init__(self, v: Tensor, *rest: Any) -> None:
        super().__init__(v, *rest)
        self.v = v.float()

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        s, z = self.step(group, index)
        y = float_product(quantize_uint8(x, s, z).float() - z, self.v, self.moves) * per_channel(
            s * self.scale, self.moves
        )
        return (y if self.bias is None else y + per_channel(self.bias, self.moves)).to(dtype)


class IntMmKernel(Kernel):
    """Integer matrix products for linear layers and 1x1 convolutions, with u - 128 in place of u."""

    execution = "int8"
    least = 32  # rows that cuBLAS wants to be more than 16

    def __init__(self, v: Tensor, *rest: Any) -> None:
        super().__init__(v, *rest)
        self.v = v.flatten(1).contiguous()
        self.sums = self.v.sum(1, dtype=torch.int32)

    @staticmethod
    def fits(v: Tensor, moves: ConvGeometry | None) -> bool:
        """Whether the product can be done: whole columns and rows of eight, and a kernel that sees one pixel."""
        return (
            moves in (None, ConvGeometry()) and v[0].numel() == v.shape[1] and not v.shape[0] % 8 and not v.shape[1] % 8
        )

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        s, z = self.step(group, index)
        x = x if self.moves is None else x.permute(0, 2, 3, 1)
        u = (quantize_uint8(x, s, z).reshape(-1, x.shape[-1]).to(torch.int16) - 128).to(torch.int8)
        rows = u.shape[0]
        u = F.pad(u, (0, 0, 0, max(self.least - rows, 0)))
        total = torch._int_mm(u, self.v.t())[:rows] - (z - 128) * self.sums
        y = total.float() * (s * self.scale)
        y = (y if self.bias is None else y + self.bias).to(dtype).view(*x.shape[:-1], -1)
        return y if self.moves is None else y.permute(0, 3, 1, 2)


class OneDnnKernel(Kernel):
    """oneDNN's kernels, their weights packed once: other batches, image sizes and scales need no new packing."""

    execution = "int8"

    def __init__(self, v: Tensor, *rest: Any) -> None:
        super().__init__(v, *rest)
        self.sides, one = list(v.shape[2:]), torch.ops.onednn
        if self.moves is None:
            self.packed = one.qlinear_prepack(v.contiguous(), None)
            self.none = torch.zeros(len(v), dtype=torch.int32)
        else:
            self.packed = one.qconv_prepack(
                v.contiguous(), self.scale, self.scales[0], self.zeros[0],
                self.moves.stride, self.moves.padding, self.moves.dilation, 1, None,
            )  # fmt: skip
            self.none = torch.zeros(len(v), dtype=torch.int8)
        self.numbers = [] if self.moves is None else [*self.moves.stride, *self.moves.padding, *self.moves.dilation]

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        u = quantize_uint8(x, *self.step(group, index))
        if self.moves is None:
            u = u.reshape(-1, u.shape[-1])
        out = dtype if dtype in EMITTED else torch.float32
        fixed = self.packed, self.scale, self.none, self.bias, self.numbers, self.sides, out
        if torch.compiler.is_compiling():
            y = torch.ops.hasten.multiply(u, index, list(self.scales), list(self.zeros), *fixed)
        else:
            y = run_onednn(u, self.scales[group], self.zeros[group], *fixed)
        y = y.view(*x.shape[:-1], -1) if self.moves is None else y
        return y if out == dtype else y.to(dtype)


def run_onednn(
    u: Tensor, s: float, z: int, packed: Tensor, scale: Tensor, none: Tensor, bias: Tensor | None,
    moves: Sequence[int], sides: Sequence[int], out: torch.dtype,
) -> Tensor:  # fmt: skip
    """oneDNN's call."""
    one = torch.ops.onednn
    if not moves:
        return one.qlinear_pointwise(u, s, z, packed, scale, none, bias, 1.0, 0, out, "none", [], "")
    conv = one.qconv_pointwise if hasattr(one, "qconv_pointwise") else one.qconv2d_pointwise
    return conv(
        u, s, z, packed, scale, none, bias, moves[:2], moves[2:4], moves[4:], 1, 1.0, 0, out, "none", [], ""
    )  # fmt: skip


def multiply(
    u: Tensor, index: Tensor, scales: Sequence[float], zeros: Sequence[int], packed: Tensor, *fixed: Any
) -> Tensor:
    """`run` with the group's numbers, as one operator that compilers see and leave as it is."""
    at = int(index) if len(scales) > 1 else 0
    return run_onednn(u, scales[at], zeros[at], packed, *fixed)


def multiply_meta(
    u: Tensor, index: Tensor, scales: Sequence[float], zeros: Sequence[int], packed: Tensor, scale: Tensor,
    none: Tensor, bias: Tensor | None, moves: Sequence[int], sides: Sequence[int], out: torch.dtype,
) -> Tensor:  # fmt: skip
    """What `multiply` gives, by shape and layout only."""
    if not moves:
        return u.new_empty(u.shape[0], scale.shape[0], dtype=out)
    a, b, c, d, e, f = moves
    size = ConvGeometry((a, b), (c, d), (e, f)).size(u.shape[2:], sides)
    return u.new_empty(u.shape[0], *size, scale.shape[0], dtype=out).permute(0, 3, 1, 2)


torch.library.define(
    "hasten::multiply",
    "(Tensor u, Tensor index, float[] scales, int[] zeros, Tensor packed, Tensor scale, Tensor none, Tensor? bias, "
    "int[] moves, int[] sides, ScalarType out) -> Tensor",
)
torch.library.impl("hasten::multiply", "default", multiply)
torch.library.register_fake("hasten::multiply", multiply_meta)


@functools.cache
def onednn_works() -> bool:
    """Whether this machine has the instructions and this torch the operators: a small layer is run and compared."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    try:
        v = torch.arange(-36, 36, dtype=torch.int8).view(4, 2, 3, 3)
        x, scale = torch.linspace(-1, 1, 50).view(1, 2, 5, 5), torch.tensor([0.1, 0.2, 0.3, 0.4])
        index = torch.zeros(1, dtype=torch.int64)
        for moves, w, at in ((ConvGeometry(padding=(1, 1)), v, x), (None, v.flatten(1), x.flatten()[:36].view(2, 18))):
            given = (w, scale, scale, moves, [0.01], [100])
            if not torch.allclose(
                *(kind(*given)(at, 0, index, torch.float32) for kind in (OneDnnKernel, SimulatedKernel))
            ):
                return False
        return True
    except (RuntimeError, AttributeError, TypeError):
        return False


def best_kernel(v: Tensor, scale: Tensor, bias: Tensor | None, moves: ConvGeometry | None,
         scales: Sequence[float], zeros: Sequence[int]) -> Kernel:  # fmt: skip
    """The fastest kernel where these tensors are."""
    kind: type[Kernel] = SimulatedKernel
    if v.device.type == "cpu" and onednn_works():
        kind = OneDnnKernel
    elif v.device.type == "cuda" and IntMmKernel.fits(v, moves):
        kind = IntMmKernel
    return kind(v, scale, bias, moves, scales, zeros)
