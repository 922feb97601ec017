"""Several processes for a test, all of which end with it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def variables(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def spawn(worker: Callable[..., None], world: int, *arguments: Any, seconds: float = 150) -> list[int | None]:
    """Run `worker(rank, *arguments)` in `world` processes with torchrun's environment; returns their exit codes."""
    context, port = mp.get_context("spawn"), free_port()
    started = []
    for rank in range(world):
        process = context.Process(target=_begin, args=(worker, rank, world, port, arguments))
        process.start()
        started.append(process)
    end = time.monotonic() + seconds
    try:
        for process in started:
            process.join(max(end - time.monotonic(), 0.1))
    finally:
        for process in started:
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def _begin(worker: Callable[..., None], rank: int, world: int, port: int, arguments: tuple[Any, ...]) -> None:
    """The body of a process of `spawn`."""
    import torch

    os.environ.update(variables(rank, world, port))
    torch.set_num_threads(1)
    worker(rank, *arguments)


@contextlib.contextmanager
def torchrun(world: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run `torchrun -m hasten ...` with its output in pipes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--master-port", str(free_port()), "-m", "--", "hasten", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        yield process
    finally:
        for pid in children(process.pid):  # they have their own sessions
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()


def children(pid: int) -> list[int]:
    """The child processes of a process, in order."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                pids.append(int(stat.parent.name))
    return sorted(pids)


def until(ready: Callable[[], Any], seconds: float = 150) -> None:
    """Wait until `ready()`."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
