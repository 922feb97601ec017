"""Time of one evaluation of a U-Net of 36 million parameters on a CPU: float32, bfloat16, layers of integers, compiled.

    OMP_NUM_THREADS=1 python -m benchmarks.quantized [--bits 8] [--batch 4] [--runs 15] [--out quantized.jsonl]

The network has the configuration of google/ddpm-cifar10-32 (`--unet hasten`: our own U-Net of about that size) and
random weights; its layers are rounded to the nearest, activations between the least and the greatest value of one
evaluation. The ways take turns; each gets the lower quartile of its thread's CPU time, which other processes on the
machine disturb less than wall-clock time. `compiled` is `torch.compile` with freezing, whose first call takes minutes.
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
from hasten.storage.weights import store


def built(name: str) -> nn.Module:
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


def part(weight: Tensor, bits: int, low: float, high: float) -> ChannelSlice:
    """A layer's weight rounded to the nearest, for activations between two values."""
    rows, view = weight.flatten(1), [-1] + [1] * (weight.ndim - 1)
    if bits == 8:
        scale, zero = (rows.abs().amax(1) / 127).clamp(min=1e-8), None
        q = (weight / scale.view(view)).round().clamp(-127, 127).to(torch.int8)
    else:
        least, most = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        scale = ((most - least) / 15).clamp(min=1e-8)
        zero = (-least / scale).round().to(torch.uint8)
        q = ((weight / scale.view(view)).round() + zero.view(view)).clamp(0, 15).to(torch.uint8)
    step = (high - low) / 255 or 1.0
    return ChannelSlice(
        (0, weight.shape[1]), q, scale, zero, bits, torch.tensor([step]), torch.tensor([round(-low / step)])
    )


def of_integers(net: nn.Module, ask: Callable[[nn.Module], Any], bits: int) -> nn.Module:
    """The network with every convolution and linear layer made of integers."""
    ranges: dict[str, tuple[float, float]] = {}
    chosen = {name: layer for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}

    def see(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            ranges[name] = min(0.0, float(inputs[0].min())), max(0.0, float(inputs[0].max()))

        return hook

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in chosen.items()]
    ask(net)
    for hook in hooks:
        hook.remove()
    made = {
        name: (QLinear if isinstance(layer, nn.Linear) else QConv2d).from_layer(
            layer, [part(layer.weight.detach(), bits, *ranges[name])]
        )
        for name, layer in chosen.items()
    }
    return replace_layers(net, made)


def timed(ways: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Milliseconds of each way, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            began = time.thread_time()
            way()
            taken[name].append(1000 * (time.thread_time() - began))
    return {name: sorted(times)[len(times) // 4] for name, times in taken.items()}


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
    net = built(unet)
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(10, 990, batch) if unet == "ddpm" else torch.linspace(0.01, 0.99, batch)

    def ask(one: Callable[..., Any], given: Tensor = x) -> Tensor:
        raw = one(given, times)
        return raw if isinstance(raw, Tensor) else raw.sample

    def low(one: Callable[..., Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return ask(one)

    fast = of_integers(net, ask, bits)
    plain_last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    halves = copy.deepcopy(plain_last).to(torch.bfloat16)
    integers = f"W{bits}A8 ({execution(fast)})"
    ways: dict[str, Callable[[], Tensor]] = {
        "float32": lambda: ask(net),
        "float32, channels last": lambda: ask(plain_last),
        "bfloat16, channels last": lambda: ask(halves, x.bfloat16()),
        integers: lambda: ask(fast),
        f"{integers}, bfloat16 around": lambda: low(fast),
    }
    if compiled:
        made = torch.compile(fast, fullgraph=True, options={"freezing": True})
        ways[f"{integers}, compiled"] = lambda: ask(made)
    exact, errors, cold = ask(net), {}, {}
    for name, way in ways.items():
        began = time.perf_counter()
        errors[name] = float((way().float() - exact).norm() / exact.norm())
        cold[name] = time.perf_counter() - began
        way()
    took = timed(ways, runs)
    file = Path(f"quantized-{bits}.tmp.safetensors")
    store(fast, file)
    share = file.stat().st_size / (4 * sum(p.numel() for p in net.parameters()))
    file.unlink()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, batch {batch}")
    print(f"{'way':40s} {'ms':>8s} {'x float32':>10s} {'rel. error':>11s} {'first call, s':>14s}")
    for name in ways:
        print(
            f"{name:40s} {took[name]:8.1f} {took['float32'] / took[name]:10.2f} {errors[name]:11.4f} {cold[name]:14.1f}"
        )
    print(f"weights file: {share:.4f} of float32's bytes")
    if out is not None:
        row = {
            "unet": unet,
            "bits": bits,
            "batch": batch,
            "runs": runs,
            "torch": torch.__version__,
            "ms": took,
            "error": errors,
            "first_call_s": cold,
            "bytes": share,
        }
        with out.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
