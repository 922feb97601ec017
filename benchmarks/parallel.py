"""Two processes against one: time of a model evaluation in patches and in branches, and quality with stale patches.

    python -m benchmarks.parallel speed [--unet hasten] [--side 256] [--runs 7] [--out parallel.jsonl]
    python -m benchmarks.parallel quality [--images 1000] [--sampler ddim] [--steps 50] [--warmup 4] [--only full]

`speed`: a U-Net with random weights (`hasten`: ours, on images of `--side`; `sd`: the configuration of Stable
Diffusion 1.5 on latents of `--side` 64, a text of 77 tokens), one thread per process. Variants are interleaved, one
evaluation each, between two barriers; reported are the median and the CPU time of the first process, which measures the
work on a device that is not idle. `one` is one process while the others are idle; patches are one image, `cfg` two rows
against the same two rows in one process. Bytes are those that one rank sends per model evaluation. Each ratio is shown
with the prediction of `hasten.performance.parallel` from this device's arithmetic, memory and link, measured in the
same run.

`quality`: the bundled model `fashion`, images of the same seeds for each variant; PSNR against one process and the
Frechet distance to the data. Variants differ in the moments of group norms; "held" is without extrapolation
(`forecast=0`). The 7 rows of the coarsest level are split 4 and 3 between two processes.

It starts its own processes, which communicate through gloo. Needs an idle device with a core for each of them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor, distributed, multiprocessing, nn

import hasten
from hasten.accelerators import accelerate
from hasten.accelerators.cfg_parallel import CfgParallel
from hasten.accelerators.patch_parallel import NORMS, PatchParallel
from hasten.denoiser import Denoiser
from hasten.metrics import evaluate_images, feature_net, reference
from hasten.metrics.difference import image_difference
from hasten.nets.unet import UNet
from hasten.performance.hardware import ParallelLayout
from hasten.performance.parallel import forecast, measured_device, measured_link, work_of
from hasten.schedules import VPCosine

app = cyclopts.App(help=__doc__)
PATCHES = {
    "sync": PatchParallel(mode="sync"),
    "async": PatchParallel(warmup=0),
    "async, keys in bf16": PatchParallel(warmup=0, keys="bf16"),
    "naive": PatchParallel(mode="naive"),
}


def spawn(work: Callable[..., None], ranks: int, arguments: dict[str, Any]) -> None:
    """Run `work(rank, **arguments)` in `ranks` processes; a failure of one ends all."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_rank, (work, ranks, f"{folder}/store", arguments), ranks, start_method="spawn")


def _rank(rank: int, work: Callable[..., None], ranks: int, store: str, arguments: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(minutes=30)
    )
    with torch.no_grad():
        work(rank, **arguments)
    distributed.barrier()
    distributed.destroy_process_group()


def build(unet: str, side: int) -> tuple[Denoiser, int, dict[str, Tensor]]:
    """A denoiser with random weights, its channels, and the conditions of one row of a batch."""
    torch.manual_seed(0)
    if unet == "hasten":
        net: nn.Module = UNet(channels=3, widths=(64, 128, 192, 256), attention=(3,), classes=10)
        for p in net.parameters():
            p.data.add_(0.02 * torch.randn_like(p))  # some layers are initialised to zero
        return Denoiser(net, VPCosine(), "v").eval(), 3, {"label": torch.zeros(1, dtype=torch.long)}
    from diffusers import UNet2DConditionModel

    from hasten.adapters.diffusers.wrap import split_network

    net = split_network(UNet2DConditionModel(sample_size=side, cross_attention_dim=768))
    return Denoiser(net, VPCosine(), "v", clock="t1000").eval(), 4, {"text": torch.randn(1, 77, 768)}


def predicted(net: nn.Module, shape: tuple[int, ...], two: dict[str, Tensor], ranks: int) -> dict[str, float]:
    """The predicted speed-up of one evaluation, by variant; `two`: conditions of two rows. All ranks call it."""
    device, link = measured_device(), measured_link()
    work = work_of(net, (2, *shape[1:]), **two)
    assert work.half is not None
    results = {"cfg": forecast(work, device, link, ParallelLayout(2, branches=True)).gain} if ranks == 2 else {}
    for name, accelerator in PATCHES.items():
        if accelerator.mode != "naive":
            config = forecast(
                work.half, device, link, ParallelLayout(ranks, mode=accelerator.mode, keys=accelerator.keys)
            )
            results[f"patches, {name}"] = config.alone / config.later
    if distributed.get_rank() == 0:
        print(f"one process: {device}\n{link}")
    return results


def timed(rank: int, unet: str, side: int, runs: int, ranks: int, out: Path | None) -> None:
    plain, channels, cond = build(unet, side)
    one = torch.randn(1, channels, side, side)
    two = {key: torch.cat([value, value]) for key, value in cond.items()}
    patches: dict[str, Any] = {name: accelerate(plain, [accelerator]) for name, accelerator in PATCHES.items()}
    halved: Any = accelerate(plain, [CfgParallel()]) if ranks == 2 else None
    variants: dict[str, tuple[Callable[[], Tensor], bool]] = {"one": (lambda: plain(one, 0.5, **cond), False)}
    for name, fast in patches.items():
        variants[f"patches, {name}"] = (lambda fast=fast: fast(one, 0.5, **cond)), True  # type: ignore[misc]
    if halved is not None:
        variants["one, two rows"] = (lambda: plain(torch.cat([one, one]), 0.5, **two), False)
        variants["cfg"] = (lambda: halved(torch.cat([one, one]), 0.5, **two), True)
    predictions = predicted(plain.net, tuple(one.shape), two, ranks)
    wall_times: dict[str, list[float]] = {name: [] for name in variants}
    cpu_times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs + 1):
        for name, (variant, together) in variants.items():
            distributed.barrier()
            start, cpu_start = time.perf_counter(), time.process_time()
            if together or rank == 0:
                variant()
            distributed.barrier()
            wall_times[name].append(time.perf_counter() - start)
            cpu_times[name].append(time.process_time() - cpu_start)
    if rank:
        return
    seconds, cpu = (
        {name: statistics.median(each[1:]) for name, each in all_.items()} for all_ in (wall_times, cpu_times)
    )
    sent = {f"patches, {name}": dict(fast.net.traffic) for name, fast in patches.items()}
    if halved is not None:
        sent["cfg"] = halved.traffic
    weights = sum(p.numel() for p in plain.parameters()) / 1e6
    print(f"{unet}, {weights:.0f} M weights, side {side}, {ranks} processes of one thread, torch {torch.__version__}")
    print(f"{'way':30s} {'s':>8s} {'ratio':>6s} {'model':>6s} {'CPU s':>8s}  bytes sent by one rank per evaluation")
    for name, each in seconds.items():
        base = seconds["one, two rows" if name == "cfg" else "one"]
        speedup = "" if name.startswith("one") else f"{base / each:6.2f}"
        model = f"{predictions[name]:6.2f}" if name in predictions else ""
        bytes_ = json.dumps(sent[name]) if name in sent else ""
        print(f"{name:30s} {each:8.3f} {speedup:>6s} {model:>6s} {cpu[name]:8.3f}  {bytes_}")
    if out is not None:
        row = {
            "unet": unet,
            "side": side,
            "ranks": ranks,
            "runs": runs,
            "torch": torch.__version__,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "sent": sent,
            "predicted": predictions,
        }
        with out.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


def evaluate(
    rank: int,
    images: int,
    sampler: str,
    steps: int,
    warmup: int,
    guidance_scale: float,
    batch_size: int,
    only: list[str],
    out: Path | None,
) -> None:
    torch.set_grad_enabled(False)
    model = hasten.load("fashion")
    variants = {"one process": None, "sync": PatchParallel(mode="sync")}
    for norm in NORMS:
        variants[norm], variants[f"{norm}, held"] = PatchParallel(warmup, norm), PatchParallel(warmup, norm, forecast=0)
    variants["naive"] = PatchParallel(mode="naive")
    config: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
    config |= {"times": "trailing"} if sampler == "ddim" else {}
    data = reference("fashion")
    features, baseline, results = feature_net(data.features), None, []
    if rank == 0:
        print(f"fashion, {images} images, {sampler} of {steps} steps, guidance {guidance_scale:g}, warm-up {warmup}")
        print(f"{'way':16s} {'PSNR, dB':>9s} {'Frechet':>9s} {'s':>7s}")
    for name, accelerator in variants.items():
        if accelerator is not None and only and name not in only:
            continue
        start = time.perf_counter()
        if accelerator is None and rank:
            distributed.barrier()
            continue
        samples = model.sample(
            images, batch_size=batch_size, accelerators=[] if accelerator is None else [accelerator], **config
        )
        if accelerator is None:
            baseline = samples
            distributed.barrier()
        if rank == 0 and baseline is not None:
            measures = evaluate_images(samples, model.labels(images), features, data, range(images))
            row = {
                "way": name,
                "psnr": image_difference(samples, baseline)["psnr"],
                "frechet": measures["frechet"].value,
                "seconds": time.perf_counter() - start,
            }
            results.append(row)
            print(f"{name:16s} {row['psnr']:9.2f} {row['frechet']:9.4f} {row['seconds']:7.1f}", flush=True)
    if rank == 0 and out is not None:
        record = {"images": images, "warmup": warmup, **config}
        with out.open("a") as rows:
            rows.writelines(json.dumps({**record, **row}) + "\n" for row in results)


@app.command
def speed(
    unet: str = "hasten", side: int | None = None, runs: int = 7, ranks: int = 2, out: Path | None = None
) -> None:
    """Time of one evaluation, interleaved."""
    side = side or {"hasten": 256, "sd": 64}[unet]
    spawn(timed, ranks, {"unet": unet, "side": side, "runs": runs, "ranks": ranks, "out": out})


@app.command
def quality(
    images: int = 1000,
    sampler: str = "ddim",
    steps: int = 50,
    warmup: int = 4,
    guidance_scale: float = 1.25,
    ranks: int = 2,
    batch_size: int = 100,
    only: list[str] | None = None,
    out: Path | None = None,
) -> None:
    """PSNR to one process, and Frechet distance, of each variant, or of those in `only`."""
    arguments: dict[str, Any] = {
        "images": images,
        "sampler": sampler,
        "steps": steps,
        "warmup": warmup,
        "guidance_scale": guidance_scale,
    }
    spawn(evaluate, ranks, {**arguments, "batch_size": batch_size, "only": only or [], "out": out})


if __name__ == "__main__":
    app()
