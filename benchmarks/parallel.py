"""Two processes against one: time of an evaluation in patches and in branches, and what stale patches cost in quality.

    python -m benchmarks.parallel speed [--unet hasten] [--side 256] [--runs 7] [--out parallel.jsonl]
    python -m benchmarks.parallel quality [--images 1000] [--sampler ddim] [--steps 50] [--warmup 4] [--only full]

`speed`: a U-Net with random weights (`hasten`: ours, on images of `--side`; `sd`: the configuration of Stable
Diffusion 1.5 on latents of `--side` 64, a text of 77 tokens), one thread a process. The ways take turns, one evaluation
each, between two barriers; each gets its median, and the CPU time of the first process, which tells of the work when
the machine is not idle. `one` is one process while the others wait; patches are one image, `cfg` two rows against the
same two rows in one process. Bytes are what one rank sends in a query. Beside each ratio stands the one that
`hasten.performance.parallel` predicts from this machine's arithmetic, memory and link, measured in the same run.

`quality`: the bundled model `fashion`, images of the same seeds in each way; PSNR against one process and the Frechet
distance to the data. Ways are by the moments of group norms, and "held" where nothing is drawn on (`forecast=0`). Its 7
rows of the coarsest level are parted 4 and 3 between two processes.

It starts its own processes, which talk through gloo. Wants an idle machine with a core for each of them.
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
from hasten.performance.hardware import Way
from hasten.performance.parallel import forecast, measured_device, measured_link, work_of
from hasten.schedules import VPCosine

app = cyclopts.App(help=__doc__)
PATCHES = {
    "sync": PatchParallel(mode="sync"),
    "async": PatchParallel(warmup=0),
    "async, keys in bf16": PatchParallel(warmup=0, keys="bf16"),
    "naive": PatchParallel(mode="naive"),
}


def spawned(work: Callable[..., None], ranks: int, given: dict[str, Any]) -> None:
    """`work(rank, **given)` on so many processes; a failure of one ends all."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_rank, (work, ranks, f"{folder}/store", given), ranks, start_method="spawn")


def _rank(rank: int, work: Callable[..., None], ranks: int, store: str, given: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(minutes=30)
    )
    with torch.no_grad():
        work(rank, **given)
    distributed.barrier()
    distributed.destroy_process_group()


def built(unet: str, side: int) -> tuple[Denoiser, int, dict[str, Tensor]]:
    """A denoiser with random weights, its channels, and what one row of a batch is told."""
    torch.manual_seed(0)
    if unet == "hasten":
        net: nn.Module = UNet(channels=3, widths=(64, 128, 192, 256), attention=(3,), classes=10)
        for p in net.parameters():
            p.data.add_(0.02 * torch.randn_like(p))  # some layers start at zero
        return Denoiser(net, VPCosine(), "v").eval(), 3, {"label": torch.zeros(1, dtype=torch.long)}
    from diffusers import UNet2DConditionModel

    from hasten.adapters.diffusers.wrap import split_network

    net = split_network(UNet2DConditionModel(sample_size=side, cross_attention_dim=768))
    return Denoiser(net, VPCosine(), "v", clock="t1000").eval(), 4, {"text": torch.randn(1, 77, 768)}


def predicted(net: nn.Module, shape: tuple[int, ...], two: dict[str, Tensor], ranks: int) -> dict[str, float]:
    """How many times faster one evaluation should be, by way; `two` is what two rows are told. All ranks call it."""
    device, link = measured_device(), measured_link()
    work = work_of(net, (2, *shape[1:]), **two)
    assert work.half is not None
    found = {"cfg": forecast(work, device, link, Way(2, branches=True)).gain} if ranks == 2 else {}
    for name, how in PATCHES.items():
        if how.mode != "naive":
            told = forecast(work.half, device, link, Way(ranks, mode=how.mode, keys=how.keys))
            found[f"patches, {name}"] = told.alone / told.later
    if distributed.get_rank() == 0:
        print(f"one process: {device}\n{link}")
    return found


def timed(rank: int, unet: str, side: int, runs: int, ranks: int, out: Path | None) -> None:
    plain, channels, cond = built(unet, side)
    one = torch.randn(1, channels, side, side)
    two = {key: torch.cat([value, value]) for key, value in cond.items()}
    patches: dict[str, Any] = {name: accelerate(plain, [how]) for name, how in PATCHES.items()}
    halved: Any = accelerate(plain, [CfgParallel()]) if ranks == 2 else None
    ways: dict[str, tuple[Callable[[], Tensor], bool]] = {"one": (lambda: plain(one, 0.5, **cond), False)}
    for name, fast in patches.items():
        ways[f"patches, {name}"] = (lambda fast=fast: fast(one, 0.5, **cond)), True  # type: ignore[misc]
    if halved is not None:
        ways["one, two rows"] = (lambda: plain(torch.cat([one, one]), 0.5, **two), False)
        ways["cfg"] = (lambda: halved(torch.cat([one, one]), 0.5, **two), True)
    foretold = predicted(plain.net, tuple(one.shape), two, ranks)
    took: dict[str, list[float]] = {name: [] for name in ways}
    used: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, (way, together) in ways.items():
            distributed.barrier()
            begin, before = time.perf_counter(), time.process_time()
            if together or rank == 0:
                way()
            distributed.barrier()
            took[name].append(time.perf_counter() - begin)
            used[name].append(time.process_time() - before)
    if rank:
        return
    seconds, cpu = ({name: statistics.median(each[1:]) for name, each in all_.items()} for all_ in (took, used))
    sent = {f"patches, {name}": dict(fast.net.traffic) for name, fast in patches.items()}
    if halved is not None:
        sent["cfg"] = halved.traffic
    weights = sum(p.numel() for p in plain.parameters()) / 1e6
    print(f"{unet}, {weights:.0f} M weights, side {side}, {ranks} processes of one thread, torch {torch.__version__}")
    print(f"{'way':30s} {'s':>8s} {'ratio':>6s} {'model':>6s} {'CPU s':>8s}  bytes sent by one rank in a query")
    for name, each in seconds.items():
        base = seconds["one, two rows" if name == "cfg" else "one"]
        share = "" if name.startswith("one") else f"{base / each:6.2f}"
        model = f"{foretold[name]:6.2f}" if name in foretold else ""
        bytes_ = json.dumps(sent[name]) if name in sent else ""
        print(f"{name:30s} {each:8.3f} {share:>6s} {model:>6s} {cpu[name]:8.3f}  {bytes_}")
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
            "predicted": foretold,
        }
        with out.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


def judged(
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
    ways = {"one process": None, "sync": PatchParallel(mode="sync")}
    for norm in NORMS:
        ways[norm], ways[f"{norm}, held"] = PatchParallel(warmup, norm), PatchParallel(warmup, norm, forecast=0)
    ways["naive"] = PatchParallel(mode="naive")
    told: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
    told |= {"times": "trailing"} if sampler == "ddim" else {}
    known = reference("fashion")
    features, alone, found = feature_net(known.features), None, []
    if rank == 0:
        print(f"fashion, {images} images, {sampler} of {steps} steps, guidance {guidance_scale:g}, warm-up {warmup}")
        print(f"{'way':16s} {'PSNR, dB':>9s} {'Frechet':>9s} {'s':>7s}")
    for name, how in ways.items():
        if how is not None and only and name not in only:
            continue
        begin = time.perf_counter()
        if how is None and rank:
            distributed.barrier()
            continue
        made = model.sample(images, batch_size=batch_size, accelerators=[] if how is None else [how], **told)
        if how is None:
            alone = made
            distributed.barrier()
        if rank == 0 and alone is not None:
            seen = evaluate_images(made, model.labels(images), features, known, range(images))
            row = {
                "way": name,
                "psnr": image_difference(made, alone)["psnr"],
                "frechet": seen["frechet"].value,
                "seconds": time.perf_counter() - begin,
            }
            found.append(row)
            print(f"{name:16s} {row['psnr']:9.2f} {row['frechet']:9.4f} {row['seconds']:7.1f}", flush=True)
    if rank == 0 and out is not None:
        setting = {"images": images, "warmup": warmup, **told}
        with out.open("a") as rows:
            rows.writelines(json.dumps({**setting, **row}) + "\n" for row in found)


@app.command
def speed(
    unet: str = "hasten", side: int | None = None, runs: int = 7, ranks: int = 2, out: Path | None = None
) -> None:
    """Time of one evaluation, each way in turn."""
    side = side or {"hasten": 256, "sd": 64}[unet]
    spawned(timed, ranks, {"unet": unet, "side": side, "runs": runs, "ranks": ranks, "out": out})


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
    """PSNR to one process, and Frechet distance, of each way, or of the `only` ones that are named."""
    given: dict[str, Any] = {
        "images": images,
        "sampler": sampler,
        "steps": steps,
        "warmup": warmup,
        "guidance_scale": guidance_scale,
    }
    spawned(judged, ranks, {**given, "batch_size": batch_size, "only": only or [], "out": out})


if __name__ == "__main__":
    app()
