"""Integer arithmetic of one convolution or linear layer: quantizing x to bytes, and multiplying the bytes.

A kernel has int8 weights v (C_out, C_in, ...), scales s_w (C_out,) and one pair (s_x, z_x) per time group. Called with
x it returns  s_x s_w conv(u - z_x, v) + bias,  u = clamp(round(x / s_x + z_x), 0, 255).

`OneDnnKernel` runs on x86 with VNNI (u8 x s8 -> s32; any zero point, with correct zero padding). `IntMmKernel` uses
`torch._int_mm`, for linear layers and 1x1 convolutions on CUDA. `SimulatedKernel` computes the same sums over the same
integers in floating point, anywhere. `FloatKernel` is for layers whose activations are not quantized.
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

OUTPUT_DTYPES = (torch.float32, torch.bfloat16)  # of integer kernels; other dtypes are cast from float32


@dataclass(frozen=True)
class ConvGeometry:
    """Stride, padding and dilation of a 2-D convolution (height, width); None stands for a linear layer."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, image: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Height and width of the output for an image and a kernel of these sizes."""
        sizes = zip(image, kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + 2 * pad - d * (k - 1) - 1) // step + 1 for n, k, step, pad, d in sizes]


def quantize_uint8(x: Tensor, scale: float | Tensor, zero: int | Tensor) -> Tensor:
    """`u = clamp(round(x * (1 / scale) + zero), 0, 255)`, half to even, in the memory format of x.

    In eager mode on a CPU this is one pass over x. Its fused multiply-add rounds once, so about one value in 30,000,
    on the boundary of two steps, differs by one step from the other code paths. The bytes are taken from the storage:
    `int_repr()` copies byte by byte and takes six times as long as the pass itself.

    Args:
        x: of any shape and floating-point dtype.
        scale: s_x > 0.
        zero: z_x in 0..255.

    Returns:
        uint8, of the shape of x.
    """
    if not uses_one_pass(x) or not x.numel() or isinstance(scale, Tensor):
        return torch.clamp(torch.round(x.float() * (1.0 / scale) + zero), 0, 255).to(torch.uint8)
    quantized = torch.quantize_per_tensor(x.float(), scale, int(zero), torch.quint8)
    return torch.empty(0, dtype=torch.uint8).set_(
        quantized.untyped_storage(), quantized.storage_offset(), quantized.size(), quantized.stride()
    )


def uses_one_pass(x: Tensor) -> bool:
    """Whether the one-pass quantizer is available for x."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and one_pass_works()


@functools.cache
def one_pass_works() -> bool:
    """Whether torch has the one-pass quantizer, which is deprecated, and exposes the storage of its result."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns once, and it does so here
            quantized = torch.quantize_per_tensor(torch.tensor([0.9, -0.2]), 0.1, 3, torch.quint8)
            bytes_ = torch.empty(0, dtype=torch.uint8).set_(quantized.untyped_storage(), 0, (2,), (1,))
        return bytes_.tolist() == [12, 1]
    except (RuntimeError, AttributeError, TypeError):
        return False


def float_product(x: Tensor, w: Tensor, geometry: ConvGeometry | None, bias: Tensor | None = None) -> Tensor:
    """The layer in floating point: a convolution, or a linear layer where `geometry` is None."""
    if geometry is None:
        return F.linear(x, w, bias)
    return F.conv2d(x, w, bias, geometry.stride, geometry.padding, geometry.dilation)


def per_channel(values: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """Reshape (C_out,) so that it broadcasts against the layer's output."""
    return values if geometry is None else values.view(-1, 1, 1)


class Kernel:
    """Base class of the kernels.

    Args:
        v: int8 weights (C_out, C_in, ...).
        scale: s_w (C_out,).
        bias: (C_out,) or None.
        geometry: of the convolution, None for a linear layer.
        scales, zeros: s_x and z_x, one number per time group.
    """

    execution = "simulated"

    def __init__(
        self,
        v: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        geometry: ConvGeometry | None,
        scales: Sequence[float] = (),
        zeros: Sequence[int] = (),
    ) -> None:
        self.geometry, self.scales, self.zeros = geometry, tuple(scales), tuple(zeros)
        self.scale = scale.detach().float().contiguous()
        self.bias = None if bias is None else bias.detach().float()
        device = self.scale.device  # also of the group index, so that a compiled graph copies nothing to the device
        self.table = torch.tensor(self.scales, device=device), torch.tensor(self.zeros, device=device)

    def activation_scale(self, group: int, index: Tensor) -> tuple[float | Tensor, int | Tensor]:
        """(s_x, z_x) of a time group; compiled graphs read them from `table`, so that one graph serves all groups."""
        if len(self.scales) > 1 and torch.compiler.is_compiling():
            s, z = (values.index_select(0, index) for values in self.table)
            return s, z
        return self.scales[group], self.zeros[group]

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The layer's output in `dtype`; `index` (1,) is `group` as a tensor, for compiled graphs."""
        raise NotImplementedError


class FloatKernel(Kernel):
    """Weight-only quantization: the weights are integers on disk and floats in memory."""

    def __init__(self, v: Tensor, *rest: Any) -> None:
        super().__init__(v, *rest)
        self.w = v.float() * self.scale.view(-1, *[1] * (v.ndim - 1))

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        return float_product(
            x.to(dtype), self.w.to(dtype), self.geometry, None if self.bias is None else self.bias.to(dtype)
        )


class SimulatedKernel(Kernel):
    """The integer arithmetic in floating point; no faster than the float layer."""

    def __init__(self, v: Tensor, *rest: Any) -> None:
        super().__init__(v, *rest)
        self.v = v.float()

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        s, z = self.activation_scale(group, index)
        y = float_product(quantize_uint8(x, s, z).float() - z, self.v, self.geometry) * per_channel(
            s * self.scale, self.geometry
        )
        return (y if self.bias is None else y + per_channel(self.bias, self.geometry)).to(dtype)


class IntMmKernel(Kernel):
    """`torch._int_mm` for linear layers and 1x1 convolutions, with u - 128 in place of u."""

    execution = "int8"
    min_rows = 32  # cuBLAS needs more than 16

    def __init__(self, v: Tensor, *rest: Any) -> None:
        super().__init__(v, *rest)
        self.v = v.flatten(1).contiguous()
        self.sums = self.v.sum(1, dtype=torch.int32)

    @staticmethod
    def fits(v: Tensor, geometry: ConvGeometry | None) -> bool:
        """Whether `torch._int_mm` takes this layer: a linear or 1x1 layer, both channel counts divisible by 8."""
        return (
            geometry in (None, ConvGeometry())
            and v[0].numel() == v.shape[1]
            and not v.shape[0] % 8
            and not v.shape[1] % 8
        )

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        s, z = self.activation_scale(group, index)
        x = x if self.geometry is None else x.permute(0, 2, 3, 1)
        u = (quantize_uint8(x, s, z).reshape(-1, x.shape[-1]).to(torch.int16) - 128).to(torch.int8)
        rows = u.shape[0]
        u = F.pad(u, (0, 0, 0, max(self.min_rows - rows, 0)))
        total = torch._int_mm(u, self.v.t())[:rows] - (z - 128) * self.sums
        y = total.float() * (s * self.scale)
        y = (y if self.bias is None else y + self.bias).to(dtype).view(*x.shape[:-1], -1)
        return y if self.geometry is None else y.permute(0, 3, 1, 2)


class OneDnnKernel(Kernel):
    """oneDNN kernels. Weights are packed once, for all batch sizes, image sizes and scales."""

    execution = "int8"

    def __init__(self, v: Tensor, *rest: Any) -> None:
        super().__init__(v, *rest)
        self.kernel_size, g = list(v.shape[2:]), self.geometry
        self.conv_args = [] if g is None else [*g.stride, *g.padding, *g.dilation]
        if g is None:
            self.packed = torch.ops.onednn.qlinear_prepack(v.contiguous(), None)
            self.weight_zeros = torch.zeros(len(v), dtype=torch.int32)
        else:
            activation = self.scales[0], self.zeros[0]
            self.packed = torch.ops.onednn.qconv_prepack(
                v.contiguous(), self.scale, *activation, g.stride, g.padding, g.dilation, 1, None
            )
            self.weight_zeros = torch.zeros(len(v), dtype=torch.int8)

    def __call__(self, x: Tensor, group: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        u = quantize_uint8(x, *self.activation_scale(group, index))
        if self.geometry is None:
            u = u.reshape(-1, u.shape[-1])
        out = dtype if dtype in OUTPUT_DTYPES else torch.float32
        fixed = self.packed, self.scale, self.weight_zeros, self.bias, self.conv_args, self.kernel_size, out
        if torch.compiler.is_compiling():
            y = torch.ops.hasten.multiply(u, index, list(self.scales), list(self.zeros), *fixed)
        else:
            y = run_onednn(u, self.scales[group], self.zeros[group], *fixed)
        y = y.view(*x.shape[:-1], -1) if self.geometry is None else y
        return y if out == dtype else y.to(dtype)


def run_onednn(
    u: Tensor,
    s: float,
    z: int,
    packed: Tensor,
    scale: Tensor,
    weight_zeros: Tensor,
    bias: Tensor | None,
    conv_args: Sequence[int],
    kernel_size: Sequence[int],
    out: torch.dtype,
) -> Tensor:
    """Call oneDNN's convolution, or its linear layer where `conv_args` is empty."""
    ops = torch.ops.onednn
    layer = u, s, z, packed, scale, weight_zeros, bias
    if not conv_args:
        return ops.qlinear_pointwise(*layer, 1.0, 0, out, "none", [], "")
    conv = ops.qconv_pointwise if hasattr(ops, "qconv_pointwise") else ops.qconv2d_pointwise
    return conv(*layer, conv_args[:2], conv_args[2:4], conv_args[4:], 1, 1.0, 0, out, "none", [], "")


def multiply(
    u: Tensor, index: Tensor, scales: Sequence[float], zeros: Sequence[int], packed: Tensor, *fixed: Any
) -> Tensor:
    """`run_onednn` with the scale and zero of a group, as one operator that is opaque to compilers."""
    group = int(index) if len(scales) > 1 else 0
    return run_onednn(u, scales[group], zeros[group], packed, *fixed)


def multiply_meta(
    u: Tensor,
    index: Tensor,
    scales: Sequence[float],
    zeros: Sequence[int],
    packed: Tensor,
    scale: Tensor,
    weight_zeros: Tensor,
    bias: Tensor | None,
    conv_args: Sequence[int],
    kernel_size: Sequence[int],
    out: torch.dtype,
) -> Tensor:
    """The shape and layout of `multiply`'s result."""
    if not conv_args:
        return u.new_empty(u.shape[0], scale.shape[0], dtype=out)
    a, b, c, d, e, f = conv_args
    size = ConvGeometry((a, b), (c, d), (e, f)).output_size(u.shape[2:], kernel_size)
    return u.new_empty(u.shape[0], *size, scale.shape[0], dtype=out).permute(0, 3, 1, 2)


torch.library.define(
    "hasten::multiply",
    "(Tensor u, Tensor index, float[] scales, int[] zeros, Tensor packed, Tensor scale, Tensor weight_zeros, "
    "Tensor? bias, int[] conv_args, int[] kernel_size, ScalarType out) -> Tensor",
)
torch.library.impl("hasten::multiply", "default", multiply)
torch.library.register_fake("hasten::multiply", multiply_meta)


@functools.cache
def onednn_works() -> bool:
    """Whether this CPU and this torch run oneDNN's integer kernels: small layers are run and compared."""
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return False
    try:
        v = torch.arange(-36, 36, dtype=torch.int8).view(4, 2, 3, 3)
        x, scale = torch.linspace(-1, 1, 50).view(1, 2, 5, 5), torch.tensor([0.1, 0.2, 0.3, 0.4])
        index = torch.zeros(1, dtype=torch.int64)
        conv, linear = (ConvGeometry(padding=(1, 1)), v, x), (None, v.flatten(1), x.flatten()[:36].view(2, 18))
        for geometry, w, inputs in (conv, linear):
            args = (w, scale, scale, geometry, [0.01], [100])
            integer, simulated = (
                kind(*args)(inputs, 0, index, scale.dtype) for kind in (OneDnnKernel, SimulatedKernel)
            )
            if not torch.allclose(integer, simulated):
                return False
        return True
    except (RuntimeError, AttributeError, TypeError):
        return False


def best_kernel(
    v: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry | None,
    scales: Sequence[float],
    zeros: Sequence[int],
) -> Kernel:
    """The fastest kernel for this layer on the device of its tensors; arguments as of `Kernel`."""
    kind: type[Kernel] = SimulatedKernel
    if v.device.type == "cpu" and onednn_works():
        kind = OneDnnKernel
    elif v.device.type == "cuda" and IntMmKernel.fits(v, geometry):
        kind = IntMmKernel
    return kind(v, scale, bias, geometry, scales, zeros)
