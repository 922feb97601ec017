"""The other processes of a run: their common key-value store, and heartbeats that tell which of them are alive."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

from ..errors import HastenError
from ..utils.environment import env_int, is_out_of_memory

HEARTBEAT_TIMEOUT = 60.0  # seconds without a heartbeat after which a process counts as dead
HEARTBEAT_INTERVAL = 1.0  # seconds between two heartbeats
COLLECTIVE_TIMEOUT = 1800.0  # seconds that a collective of a training step may take


class ProcessLost(HastenError):
    """Another process of the run has died, so that the run cannot finish."""


@contextlib.contextmanager
def peer_errors(sure: bool = True) -> Iterator[None]:
    """Turn the errors that torch raises where another process has died into ProcessLost.

    Args:
        sure: nothing else can go wrong inside; False: only where a dead process is found.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as e:
        if is_out_of_memory(e) or isinstance(e, NotImplementedError):
            raise
        end = time.monotonic() + 1
        while not (dead := peers.find_dead(range(peers.world))) and time.monotonic() < end:
            time.sleep(0.05)  # its connections close a little before the process ends
        if not (dead or sure):
            raise
        message = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise ProcessLost(
            peers.describe(dead) if dead else f"the other processes cannot be reached any more ({message})"
        ) from e


class Peers:
    """The store shared by all processes, and who of them is alive. One per process."""

    def __init__(self) -> None:
        self.store: Any = None
        self.torch: Any = None
        self.group: Any = None  # for tensors on the CPU; None: torch's default group
        self.joined = False
        self.rank, self.world, self.seconds = 0, 1, HEARTBEAT_TIMEOUT
        self.counts: dict[str, int] = {}
        self.hosts: dict[int, tuple[Any, int]] = {}
        self.ended = threading.Event()
        self.heartbeat: threading.Thread | None = None
        self.failed = False  # then no process waits for the others

    def connect(self, rank: int, world: int, seconds: float) -> None:
        """Open the common store, once, and start to send heartbeats.

        Args:
            rank: of this process.
            world: number of processes.
            seconds: time without a heartbeat after which a process counts as dead.

        Raises:
            HastenError: where the store cannot be reached.
        """
        if self.store is not None:
            return
        if distributed.is_initialized():
            store, rank = distributed.distributed_c10d._get_default_store(), distributed.get_rank()
        else:
            try:
                rendezvous = distributed.rendezvous(
                    "env://", rank, world, timeout=timedelta(seconds=max(seconds, HEARTBEAT_TIMEOUT))
                )
                store, rank, world = next(iter(rendezvous))
            except (RuntimeError, ValueError) as e:
                message = str(e).splitlines()[0]
                raise HastenError(f"process {rank} of {world} cannot join the others: {message}") from e
        self.store, self.torch = distributed.PrefixStore("hasten", store), distributed.PrefixStore("torch", store)
        self.rank, self.world, self.seconds = rank, world, seconds
        self.store.set(f"home/{rank}", pickle.dumps((host_id(), os.getpid())))
        self.heartbeat = threading.Thread(target=self.send_heartbeats, daemon=True, name="hasten-heartbeat")
        self.heartbeat.start()
        atexit.register(self.close)

    def init_process_group(self, cuda: bool) -> None:
        """Initialise `torch.distributed`, once.

        Args:
            cuda: with NCCL for tensors on GPUs beside gloo for those on CPUs.
        """
        if self.joined:
            return
        limit = timedelta(seconds=max(self.seconds, COLLECTIVE_TIMEOUT))
        if env_int("LOCAL_WORLD_SIZE", 0) == self.world and Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever this host's name resolves to
        with peer_errors():
            if not distributed.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
                distributed.init_process_group(
                    backend, store=self.torch, rank=self.rank, world_size=self.world, timeout=limit
                )
            if "gloo" not in str(distributed.get_backend_config()):
                self.group = distributed.new_group(backend="gloo", timeout=limit)
        self.joined = True

    def send_heartbeats(self) -> None:
        """Count up this process's heartbeat in the store until the end."""
        while not self.ended.wait(HEARTBEAT_INTERVAL):
            try:
                self.store.add(f"pulse/{self.rank}", 1)
            except Exception:  # the store has gone, which the main thread will notice
                return

    def close(self) -> None:
        """Stop the heartbeats and the process group, at the end of the process."""
        self.ended.set()
        if self.heartbeat is not None:
            self.heartbeat.join(5)  # a thread that the interpreter ends inside a store call aborts the process
        if not self.failed and distributed.is_initialized():
            with contextlib.suppress(Exception):
                distributed.destroy_process_group()

    def next_key(self, kind: str) -> str:
        """The store key of the next exchange of this kind; all processes call this in the same order."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"{kind}/{self.counts[kind]}"

    def wait_until(self, ready: Callable[[], bool], missing: Callable[[int], bool]) -> None:
        """Poll until `ready()`.

        Args:
            ready: whether the wait is over.
            missing: whether a rank has not done its part yet.

        Raises:
            ProcessLost: where a missing process dies before, or sends no heartbeat for too long.
        """
        pause, checked = 0.001, time.monotonic()
        seen: dict[int, tuple[int, float]] = {}
        with peer_errors():
            while not ready():
                time.sleep(pause)  # not a blocking call, in which signals are not handled
                pause = min(1.2 * pause, 0.05)
                if time.monotonic() - checked < 0.5:
                    continue
                checked = time.monotonic()
                silent, others = [], [r for r in range(self.world) if r != self.rank and missing(r)]
                for r in others:
                    count = self.store.add(f"pulse/{r}", 0)
                    if r not in seen or seen[r][0] != count:
                        seen[r] = count, checked
                    elif checked - seen[r][1] > self.seconds:
                        silent.append(r)
                if (dead := self.find_dead(others)) and not ready():
                    raise ProcessLost(self.describe(dead))
                if silent and not ready():
                    raise ProcessLost(f"{self.describe(silent, 'has')} given no sign of life for {self.seconds:g} s")

    def find_dead(self, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks on this host whose process has died."""
        dead = []
        for r in ranks:
            if r == self.rank:
                continue
            if r not in self.hosts:
                with contextlib.suppress(Exception):
                    if self.store.check([f"home/{r}"]):
                        self.hosts[r] = pickle.loads(self.store.get(f"home/{r}"))
            host, pid = self.hosts.get(r, (None, 0))
            if host == host_id() and not is_alive(pid):
                dead.append(r)
        return dead

    def describe(self, ranks: list[int], verb: str = "has died") -> str:
        """The beginning of an error message about lost processes."""
        names = ", ".join(str(r) for r in ranks)
        return f"rank {names} of the {self.world} processes of this run {verb}"


def host_id() -> tuple[str, str, str]:
    """Host name, boot and PID namespace: where they are equal, a process id means the same process."""
    boot = space = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, space


def is_alive(pid: int) -> bool:
    """Whether a process of this host exists and is no zombie."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # another user's, or a system without /proc
        return True
    return state not in "ZX"


peers = Peers()
