"""The other processes of a run: the store in which small things are left for them, and who of them is alive."""

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

SILENCE = 60.0  # seconds without a sign of life
PULSE = 1.0  # seconds between two of them
TOGETHER = 1800.0  # seconds that a collective of a training step may take


class ProcessLost(HastenError):
    """Another process of the run is gone, so that it cannot end as it should."""


@contextlib.contextmanager
def peer_errors(sure: bool = True) -> Iterator[None]:
    """What torch says where another process is gone, as ProcessLost. sure: nothing else can have gone wrong inside."""
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as e:
        if is_out_of_memory(e) or isinstance(e, NotImplementedError):
            raise
        end = time.monotonic() + 1
        while not (dead := peers.gone(range(peers.world))) and time.monotonic() < end:
            time.sleep(0.05)  # its connections close a little before it is gone
        if not (dead or sure):
            raise
        said = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise ProcessLost(
            peers.lost(dead) if dead else f"the other processes cannot be reached any more ({said})"
        ) from e


class Peers:
    """The store between the processes, and who of them is alive. One a process."""

    def __init__(self) -> None:
        self.store: Any = None
        self.torch: Any = None
        self.group: Any = None  # for tensors on the CPU; None: the one that torch takes by itself
        self.joined = False
        self.rank, self.world, self.seconds = 0, 1, SILENCE
        self.counts: dict[str, int] = {}
        self.homes: dict[int, tuple[Any, int]] = {}
        self.ended = threading.Event()
        self.pulse: threading.Thread | None = None
        self.failed = False  # then nobody waits for the others

    def meet(self, rank: int, world: int, seconds: float) -> None:
        """Find the store that all use, once; from then on the others know that this process lives."""
        if self.store is not None:
            return
        if distributed.is_initialized():
            store, rank = distributed.distributed_c10d._get_default_store(), distributed.get_rank()
        else:
            try:
                meeting = distributed.rendezvous(
                    "env://", rank, world, timeout=timedelta(seconds=max(seconds, SILENCE))
                )
                store, rank, world = next(iter(meeting))
            except (RuntimeError, ValueError) as e:
                said = str(e).splitlines()[0]
                raise HastenError(f"process {rank} of {world} cannot join the others: {said}") from e
        self.store, self.torch = distributed.PrefixStore("hasten", store), distributed.PrefixStore("torch", store)
        self.rank, self.world, self.seconds = rank, world, seconds
        self.store.set(f"home/{rank}", pickle.dumps((home(), os.getpid())))
        self.pulse = threading.Thread(target=self.beat, daemon=True, name="hasten-pulse")
        self.pulse.start()
        atexit.register(self.leave)

    def join(self, cuda: bool) -> None:
        """Open the ways for tensors, once. cuda: also between GPUs."""
        if self.joined:
            return
        limit = timedelta(seconds=max(self.seconds, TOGETHER))
        if variable("LOCAL_WORLD_SIZE", 0) == self.world and Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # whatever the name of this machine resolves to
        with peer_errors():
            if not distributed.is_initialized():
                distributed.init_process_group(
                    "cpu:gloo,cuda:nccl" if cuda else "gloo", store=self.torch, rank=self.rank, world_size=self.world,
                    timeout=limit,
                )  # fmt: skip
            if "gloo" not in str(distributed.get_backend_config()):
                self.group = distributed.new_group(backend="gloo", timeout=limit)
        self.joined = True

    def beat(self) -> None:
        """Give signs of life until the end."""
        while not self.ended.wait(PULSE):
            try:
                self.store.add(f"pulse/{self.rank}", 1)
            except Exception:  # the store has gone, which the main thread will notice
                return

    def leave(self) -> None:
        """At the end of the process."""
        self.ended.set()
        if self.pulse is not None:
            self.pulse.join(5)  # a thread that the interpreter ends while it talks to the store aborts the process
        if not self.failed and distributed.is_initialized():
            with contextlib.suppress(Exception):
                distributed.destroy_process_group()

    def next(self, kind: str) -> str:
        """The name of the next exchange; all processes come through here in the same order."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"{kind}/{self.counts[kind]}"

    def watch(self, ready: Callable[[], bool], missing: Callable[[int], bool]) -> None:
        """Until it is ready. missing: whether a rank has still to do its part. Raises
        ProcessLost where it dies before."""
        pause, looked = 0.001, time.monotonic()
        seen: dict[int, tuple[int, float]] = {}
        with peer_errors():
            while not ready():
                time.sleep(pause)  # and not a blocking call, in which no signal would be heard
                pause = min(1.2 * pause, 0.05)
                if time.monotonic() - looked < 0.5:
                    continue
                looked = time.monotonic()
                silent, others = [], [r for r in range(self.world) if r != self.rank and missing(r)]
                for r in others:
                    pulse = self.store.add(f"pulse/{r}", 0)
                    if r not in seen or seen[r][0] != pulse:
                        seen[r] = pulse, looked
                    elif looked - seen[r][1] > self.seconds:
                        silent.append(r)
                if (dead := self.gone(others)) and not ready():
                    raise ProcessLost(self.lost(dead))
                if silent and not ready():
                    raise ProcessLost(f"{self.lost(silent, 'has')} given no sign of life for {self.seconds:g} s")

    def gone(self, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks on this machine that are dead."""
        found = []
        for r in ranks:
            if r == self.rank:
                continue
            if r not in self.homes:
                with contextlib.suppress(Exception):
                    if self.store.check([f"home/{r}"]):
                        self.homes[r] = pickle.loads(self.store.get(f"home/{r}"))
            host, pid = self.homes.get(r, (None, 0))
            if host == home() and not alive(pid):
                found.append(r)
        return found

    def lost(self, ranks: list[int], verb: str = "has died") -> str:
        """Who is lost, in words."""
        names = ", ".join(str(r) for r in ranks)
        return f"of the {self.world} processes of this run number {names} {verb}"


def home() -> tuple[str, str, str]:
    """Where the numbers of processes mean the same as here."""
    boot = space = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), boot, space


def alive(pid: int) -> bool:
    """Whether a process of this machine is there and no zombie."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # another user's, or a system without /proc
        return True
    return state not in "ZX"


def variable(name: str, default: int) -> int:
    """A whole number from the environment."""
    return env_int(name, default)


peers = Peers()
