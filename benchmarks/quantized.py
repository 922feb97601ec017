"""Time of one evaluation of a U-Net of 36 million parameters on a CPU: float32, bfloat16, quantized, compiled.

    OMP_NUM_THREADS=1 python -m benchmarks.quantized [--bits 8] [--batch 4] [--runs 15] [--out quantized.jsonl]

The network has the configuration of google/ddpm-cifar10-32 (`--unet hasten`: our own U-Net of about that size) and
random weights; weights are rounded to nearest, activations between the minimum and the maximum of one evaluation.
Variants are interleaved; reported is the lower quartile of the thread's CPU time, which other processes disturb less
than wall-clock time. `compiled` is `torch.compile` with freezing, whose first call takes minutes.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor, nn

from hasten.nets.quantized import ChannelSlice, QConv2d, QLinear, execution, replace_layers
from hasten.nets.unet import UNet
from hasten.storage.weights import write_weights


def build(name: str) -> nn.Module:
    """The U-Net to measure."""
    torch.manual_seed(0)
    if name == "hasten":
        return UNet(channels=3, widths=(128, 256, 256, 256), blocks=2, attention=(1,)).eval()
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        freq_shift=1,
        flip_sin_to_cos=False,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        downsample_padding=0,
        attention_head_dim=None,
        norm_eps=1e-6,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def round_slice(weight: Tensor, bits: int, low: float, high: float) -> ChannelSlice:
    """A layer's weight rounded to nearest, for activations between two values."""
    rows, view = weight.flatten(1), [-1] + [1] * (weight.ndim - 1)
    if bits == 8:
        scale, zero = (rows.abs().amax(1) / 127).clamp(min=1e-8), None
        q = (weight / scale.view(view)).round().clamp(-127, 127).to(torch.int8)
    else:
        minimum, maximum = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        scale = ((maximum - minimum) / 15).clamp(min=1e-8)
        zero = (-minimum / scale).round().to(torch.uint8)
        q = ((weight / scale.view(view)).round() + zero.view(view)).clamp(0, 15).to(torch.uint8)
    step = (high - low) / 255 or 1.0
    return ChannelSlice(
        (0, weight.shape[1]), q, scale, zero, bits, torch.tensor([step]), torch.tensor([round(-low / step)])
    )


def quantize(net: nn.Module, run: Callable[[nn.Module], Any], bits: int) -> nn.Module:
    """The network with every convolution and linear layer quantized."""
    ranges: dict[str, tuple[float, float]] = {}
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}

    def see(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            ranges[name] = min(0.0, float(inputs[0].min())), max(0.0, float(inputs[0].max()))

        return hook

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
    run(net)
    for hook in hooks:
        hook.remove()
    replacements = {
        name: (QLinear if isinstance(layer, nn.Linear) else QConv2d).from_layer(
            layer, [round_slice(layer.weight.detach(), bits, *ranges[name])]
        )
        for name, layer in layers.items()
    }
    return replace_layers(net, replacements)


def time_variants(variants: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Milliseconds of each variant, interleaved."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        for name, variant in variants.items():
            start = time.thread_time()
            variant()
            samples[name].append(1000 * (time.thread_time() - start))
    return {name: sorted(times)[len(times) // 4] for name, times in samples.items()}


def main(
    *,
    unet: str = "ddpm",
    bits: int = 8,
    batch: int = 4,
    runs: int = 15,
    compiled: bool = True,
    out: Path | None = None,
) -> None:
    """Measure, print a table, and append a row to `out`."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    net = build(unet)
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(10, 990, batch) if unet == "ddpm" else torch.linspace(0.01, 0.99, batch)

    def run(one: Callable[..., Any], value: Tensor = x) -> Tensor:
        raw = one(value, times)
        return raw if isinstance(raw, Tensor) else raw.sample

    def low(one: Callable[..., Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(one)

    fast = quantize(net, run, bits)
    plain_last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    halves = copy.deepcopy(plain_last).to(torch.bfloat16)
    integers = f"W{bits}A8 ({execution(fast)})"
    variants: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: run(net),
        "float32, channels last": lambda: run(plain_last),
        "bfloat16, channels last": lambda: run(halves, x.bfloat16()),
        integers: lambda: run(fast),
        f"{integers}, bfloat16 around": lambda: low(fast),
    }
    if compiled:
        compiled = torch.compile(fast, fullgraph=True, options={"freezing": True})
        variants[f"{integers}, compiled"] = lambda: run(compiled)
    exact, errors, cold = run(net), {}, {}
    for name, variant in variants.items():
        start = time.perf_counter()
        errors[name] = float((variant().float() - exact).norm() / exact.norm())
        cold[name] = time.perf_counter() - start
        variant()
    medians = time_variants(variants, runs)
    file = Path(f"quantized-{bits}.tmp.safetensors")
    write_weights(fast, file)
    fraction = file.stat().st_size / (4 * sum(p.numel() for p in net.parameters()))
    file.unlink()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, batch {batch}")
    print(f"{'way':40s} {'ms':>8s} {'x float32':>10s} {'rel. error':>11s} {'first call, s':>14s}")
    for name in variants:
        print(
            f"{name:40s} {medians[name]:8.1f} {medians['float32'] / medians[name]:10.2f} "
            f"{errors[name]:11.4f} {cold[name]:14.1f}"
        )
    print(f"weights file: {fraction:.4f} of float32's bytes")
    if out is not None:
        row = {
            "unet": unet,
            "bits": bits,
            "batch": batch,
            "runs": runs,
            "torch": torch.__version__,
            "ms": medians,
            "error": errors,
            "first_call_s": cold,
            "bytes": fraction,
        }
        with out.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
