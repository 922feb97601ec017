"""The headline figures on a GPU, in five minutes, as rows for benchmarks/RESULTS.md.

    make gpu                                             all rows, printed and written to gpu.md
    python -m benchmarks.gpu --device cpu --quick        a trial of the script itself, in seconds

Measured on the bundled text-to-image pipeline at batch 1 and 64, and on a U-Net of Stable Diffusion 1.5's size with
random weights: sampling in fp32, fp16 and bf16, few steps, compiled, with cached features, in 8 bits (hasten's and
torchao's). All rows of a table are timed in turns after a warm-up. The speed-up is the median over the rounds of the
ratio to the first row, with minimum and maximum, PSNR is to the images of the first row, and peak memory is the
allocator's. What cannot run on a device, or no longer fits into the minutes, is listed with the reason.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor

import hasten
from hasten._version import __version__
from hasten.accelerators import SamplingContext, accelerate
from hasten.denoiser import Denoiser
from hasten.errors import HastenError
from hasten.metrics.paired import psnr_by_image
from hasten.performance import cost
from hasten.performance.device import device_for, processor
from hasten.pick import pick
from hasten.plan.draw import draw
from hasten.sampling import Noise
from hasten.schedules import Discrete

from .reuse import network

PROMPTS = ("a grinning face", "a red apple", "a blue car", "a cat")
RESERVE = 0.1  # of the minutes, for what is written at the end


@dataclass
class Row:
    """A row of a table.

    Args:
        name: of the row.
        make: builds what `run()` calls: it loads, casts and accelerates, and samples once.
    """

    name: str
    make: Callable[[], Callable[[], Tensor]]
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    peak: int = 0
    psnr: float | None = None
    why: str | None = None


@dataclass
class Clock:
    """The time that is left."""

    end: float

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def emoji_rows(device: torch.device, batch: int, quick: bool) -> list[Row]:
    """The rows of the bundled text-to-image pipeline."""
    steps, many = (2, 9) if quick else (8, 50)

    def sampling(dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            pipe = hasten.load("emoji").pipeline
            model = hasten.load(pipe.to(dtype) if dtype != torch.float32 else pipe, device=device)
            how: dict[str, Any] = {"sampler": "unipc", "steps": steps, "guidance_scale": 4.0, **options}
            labels = [PROMPTS[k % len(PROMPTS)] for k in range(batch)]
            return lambda: model.sample(batch, labels, batch_size=batch, **how)

        return make

    cache = f"deep_cache:every={2 if quick else 5}"
    rows = [
        Row(f"UniPC, {steps} steps, fp32", sampling()),
        Row("the same, fp32 with TF32 products", sampling(precision="fp32+high")),
        Row("the same, bf16 autocast", sampling(precision="bf16")),
        Row("the same, bf16 weights", sampling(torch.bfloat16)),
        Row("the same, fp16 weights", sampling(torch.float16)),
        Row("the same, compiled, bf16 weights", sampling(torch.bfloat16, accelerators=["compile"])),
        Row("the same, quantize (8 bits)", sampling(accelerators=["quantize:images=2,steps=2"])),
        Row("the same, torchao int8", sampling(torch.bfloat16, accelerators=["torchao"])),
        Row(f"DDIM, {many} steps, fp32", sampling(sampler="ddim", times="trailing", steps=many)),
        Row(f"the same, {cache}", sampling(sampler="ddim", times="trailing", steps=many, accelerators=[cache])),
    ]
    return [row for row in rows if not (quick and "compiled" in row.name)]


def unet_rows(device: torch.device, batch: int, quick: bool) -> list[Row]:
    """The rows of a U-Net of Stable Diffusion 1.5's size: DDIM on 64 x 64 x 4 latents, without guidance."""
    steps, side = (9, 16) if quick else (10, 64)

    def sampling(dtype: torch.dtype, *specs: str) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            net = network(quick).to(device, dtype)
            denoiser = Denoiser(net, Discrete(torch.cumprod(1 - betas, 0)), "eps", clock="index").eval()
            times = pick("times", "uniform:start=0.999")(denoiser.schedule, steps)
            context = SamplingContext(tuple(times[:-1].tolist()))
            fast = accelerate(denoiser, [pick("accelerators", spec) for spec in specs], context)
            noise = Noise(range(batch), (4, side, side), torch.float32, device)
            text = torch.randn(batch, 77, 768, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            sampler = pick("samplers", "ddim")

            def run() -> Tensor:
                with torch.no_grad():
                    return draw(fast, sampler, times, noise, text=text)

            return run

        return make

    half, cache = torch.float16, f"deep_cache:every={2 if quick else 5},branch=0"
    propagate = "encoder_propagation:keys=uniform,every=2"
    rows = [
        Row(f"DDIM, {steps} steps, fp16 weights", sampling(half)),
        Row("the same, fp32 weights", sampling(torch.float32)),
        Row("the same, bf16 weights", sampling(torch.bfloat16)),
        Row("the same, compiled", sampling(half, "compile")),
        Row(f"the same, {cache}", sampling(half, cache)),
        Row(f"the same, {propagate}", sampling(half, propagate)),
        Row("the same, torchao int8, compiled", sampling(half, "torchao", "compile")),
        Row("the same, torchao float8, compiled", sampling(half, "torchao:dtype=float8", "compile")),
    ]
    return [row for row in rows if not (quick and "compiled" in row.name)]


def measure(rows: list[Row], device: torch.device, rounds: int, clock: Clock) -> None:
    """Warm up, measure memory and PSNR, and time in turns; a row that fails says why."""
    calls: dict[str, Callable[[], Tensor]] = {}
    expected: Tensor | None = None
    for row in rows:
        if clock.left <= 0:
            row.why = "no time left"
            continue
        try:
            run, started = row.make(), time.monotonic()
            run()  # compiles, and fills what is kept
            row.first = time.monotonic() - started
            with cost.peak_memory(device) as memory:
                images = run().float().cpu()
        except (HastenError, RuntimeError) as error:  # also what a device has no kernel for
            row.why = str(error).splitlines()[0][:160]
            continue
        row.peak = memory.peak if device.type != "cpu" else memory.above
        if expected is None:
            expected = images
        elif images.isfinite().all():
            row.psnr = float(psnr_by_image(images, expected).mean())
        calls[row.name] = run
    known = {row.name: row for row in rows}
    for _ in range(rounds):
        if clock.left <= 0 or not calls:
            break
        for name, seconds in cost.interleave(calls, 1, warmup=0).items():
            known[name].seconds += seconds


def table(title: str, rows: list[Row], batch: int) -> list[str]:
    """The lines of a table in Markdown."""
    timed = [row for row in rows if row.seconds]
    lines = [f"**{title}**, batch {batch}" + (f", rounds: {len(timed[0].seconds)}" if timed else ""), ""]
    if timed:
        lines += [
            "| | ms an image | speed-up | PSNR to the first row | peak memory, MB |",
            "| --- | --- | --- | --- | --- |",
        ]
    for row in timed:
        ratio = cost.ratio(timed[0].seconds, row.seconds)
        psnr = "" if row.psnr is None else f"{row.psnr:.1f} dB"
        each = 1000 * statistics.median(row.seconds) / batch
        lines.append(f"| {row.name} | {each:.3g} | {ratio} | {psnr} | {row.peak / 2**20:.0f} |")
    failed = [f"{row.name}: {row.why}" for row in rows if row.why]
    return [*lines, "", *([f"Not measured: {'; '.join(failed)}.", ""] if failed else [])]


def driver(device: torch.device) -> str:
    """The version of the driver, where it is known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        found = []
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" and torch.version.cuda else ""
    return (f", driver {found[0]}" if found and device.type == "cuda" else "") + cuda


def versions() -> str:
    """The versions of what was measured."""
    known = [f"hasten {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("diffusers", "torchao"):
        try:
            known.append(f"{name} {__import__(name).__version__}")
        except ImportError:
            known.append(f"no {name}")
    return ", ".join(known)


def main(
    *,
    device: str = "auto",
    quick: bool = False,
    minutes: float = 5.0,
    rounds: int = 5,
    out: Path | None = None,
) -> int:
    """Measure and print the rows.

    Args:
        device: cuda, xpu, mps; auto: the GPU. The CPU only with --quick.
        quick: Small networks, few steps, one round: a trial of the script, whose figures mean nothing.
        minutes: Limit of the time.
        rounds: Timings of each row.
        out: A file for the rows, in Markdown.
    """
    where = device_for(device)
    if where.type == "cpu" and not quick:
        print(
            "There is no GPU here (torch finds neither CUDA, XPU nor MPS). What this script measures on a CPU is in "
            "benchmarks/RESULTS.md; --device cpu --quick tries the script itself."
        )
        return 2
    clock = Clock(time.monotonic() + 60 * minutes * (1 - RESERVE))
    rounds = 1 if quick else rounds
    command = f"python -m benchmarks.gpu --device {where.type}{' --quick' if quick else ''} --minutes {minutes:g}"
    lines = [
        f"## {'Trial of benchmarks.gpu' if quick else 'Headline figures'} on {processor(where)} "
        f"({time.strftime('%Y-%m-%d', time.gmtime())})",
        "",
        f"`{command}`; {processor(where)}{driver(where)}; {versions()}; seeds 0 to batch - 1.",
        "",
    ]
    for batch in (1, 2) if quick else (1, 64):
        rows = emoji_rows(where, batch, quick)
        measure(rows, where, rounds, clock)
        lines += table("`emoji` with its text encoder and decoder, guidance 4", rows, batch)
    rows = unet_rows(where, 1, quick)
    measure(rows, where, rounds, clock)
    lines += table("U-Net of Stable Diffusion 1.5's size" + (", a tenth of its channels" if quick else ""), rows, 1)
    text = "\n".join(lines)
    print(text)
    if out is not None:
        out.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(cyclopts.run(main))
