"""Several processes for a test: joined by gloo, one thread each, killed together when one fails or time is up."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

# Imported once, by the server that all processes are forked from, before any of them has a thread.
PRELOAD = ["hasten.accelerators.patch_parallel", "hasten.accelerators.cfg_parallel", "tests.accelerators._tiny"]
if all(importlib.util.find_spec(name) for name in ("diffusers", "transformers")):
    PRELOAD += ["diffusers.models.unets.unet_2d_condition", "diffusers.models.unets.unet_2d", "tests.adapters.tiny"]


def together(work: Callable[..., Any], ranks: int, folder: Path, *given: Any, seconds: float = 90) -> list[Any]:
    """What `work(rank, ranks, *given)`, a function of a module, returns on each rank."""
    store = folder / f"{work.__name__}{ranks}"
    args = (work, ranks, str(store), given, seconds)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    running = multiprocessing.start_processes(_rank, args, ranks, join=False, start_method="forkserver")
    deadline = time.monotonic() + seconds
    try:
        while not running.join(timeout=max(0.1, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"{work.__name__} on {ranks} ranks: not done after {seconds:g} s"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(f"{store}.{rank}", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, work: Callable[..., Any], ranks: int, store: str, given: tuple[Any, ...], seconds: float) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the name of this machine resolves to
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds)
    )
    try:
        torch.save(work(rank, ranks, *given), f"{store}.{rank}")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
