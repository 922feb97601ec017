"""The processes of one run: `Ranks` has this process's rank and device, and their collectives.

Start several with `torchrun --nproc-per-node K -m -- hasten ...`. Small objects (decisions, counts, heartbeats) go
through the store of torchrun; tensors go through `torch.distributed`, with gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..errors import BadInput
from ..utils.devices import default_device_type
from ..utils.environment import launched
from .heartbeat import HEARTBEAT_TIMEOUT, ProcessLost, env_int, peer_errors, peers

__all__ = ["ProcessLost", "Ranks", "launched", "own_device"]

Piece = tuple[Tensor, ...]

DEPRECATED = {
    "agree": "sync_training_state",
    "collect": "gather_pieces",
    "deal": "distribute",
    "first": "is_main_process",
    "leading": "main_process_first",
    "mean": "all_reduce_gradients",
    "mourn": "check_peers",
    "once": "on_main_process",
    "owners": "cached_owners",
    "share": "broadcast_parameters",
    "speaks": "should_report",
    "tell": "broadcast_object",
    "wait": "barrier",
}


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Gradients are averaged after the backward pass, one flat tensor per optimiser. Unlike `DistributedDataParallel` this
    does not overlap with the backward pass, and lets a loss call its modules in any order and number.

    Attributes:
        device: of this process.
        rank: of this process, 0 to world - 1.
        world: number of processes.
        local: rank among the processes of this host.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    local: int = 0

    def __getattr__(self, name: str) -> Any:
        if name not in DEPRECATED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"Ranks.{name} is now Ranks.{DEPRECATED[name]}", DeprecationWarning, stacklevel=2)
        return getattr(self, DEPRECATED[name])

    @classmethod
    def start(cls, device: str | None = None, timeout: float | None = None) -> Ranks:
        """Join the other processes that torchrun started, if any; a second call returns the same.

        torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

        Args:
            device: `cpu`, `cuda`, ... Default: a GPU where there is one. Of several processes each takes the GPU of its
                local rank.
            timeout: seconds without a heartbeat after which a process counts as dead. Default: $HASTEN_TIMEOUT, or 60.
                A process sends heartbeats however long its work takes.

        Raises:
            BadInput: for a device that does not exist here.
            HastenError: where the other processes cannot be reached.
        """
        world = launched()
        if distributed.is_available() and distributed.is_initialized():
            world = distributed.get_world_size()
        if world == 1:
            return cls(own_device(device, None))
        ranks = cls.connect(timeout)
        own = own_device(device, ranks.local)
        if own.type == "cuda":
            torch.cuda.set_device(own)
        peers.init_process_group(own.type == "cuda")
        return replace(ranks, device=own)

    @classmethod
    def connect(cls, timeout: float | None = None) -> Ranks:
        """Open the common store only: enough to know which processes are alive and to report an error once.

        Args:
            timeout: see `start`.
        """
        world = launched()
        if distributed.is_available() and distributed.is_initialized():
            world = distributed.get_world_size()
        if world > 1:
            peers.connect(env_int("RANK", 0), world, _timeout_seconds(timeout))
        return cls(torch.device("cpu"), peers.rank, peers.world, env_int("LOCAL_RANK", peers.rank))

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes the files and shows the progress."""
        return self.rank == 0

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of rank 0 to every process."""
        if self.world > 1:
            with peer_errors():
                for tensor in (*module.parameters(), *module.buffers()):
                    distributed.broadcast(tensor.data, 0)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its mean over the processes.

        A process without a gradient counts as zero. Where no process has one there is none afterwards, which to an
        optimiser is not the same as zero.

        Args:
            parameters: whose `.grad` is replaced.
            loss: (), of this process.

        Returns:
            The mean of the loss, ().
        """
        if self.world == 1:
            return loss
        trained = [p for p in parameters if p.requires_grad]
        mine = [p.grad is not None for p in trained]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        has_grad = torch.tensor(mine, dtype=torch.float32, device=loss.device)
        flat = torch.cat([loss.detach().float().view(1), has_grad, *(grad.float().flatten() for grad in grads)])
        with peer_errors():
            distributed.all_reduce(flat)
        flat /= self.world
        loss, has_grad, means = flat.split([1, len(trained), len(flat) - 1 - len(trained)])
        some = mine if all(mine) else has_grad.tolist()  # which waits for a GPU
        for p, grad, mean, there in zip(trained, grads, means.split([p.numel() for p in trained]), some, strict=True):
            p.grad = grad.copy_(mean.view_as(p)) if there else None
        return loss[0]

    def sync_training_state(self, seconds: float, stop: bool, due: bool) -> tuple[float, bool, bool]:
        """Agree on the state of a training loop.

        Args:
            seconds: training time so far.
            stop: this process was asked to stop.
            due: a checkpoint is due.

        Returns:
            `seconds` and `due` of rank 0, and whether any process has to stop: (seconds, stop, due).
        """
        if self.world == 1:
            return seconds, stop, due
        state = torch.zeros(self.world, 3, dtype=torch.float64)
        state[self.rank] = torch.tensor([seconds, float(stop), float(due)], dtype=torch.float64)
        with peer_errors():
            distributed.all_reduce(state, group=peers.group)
        return float(state[0, 0]), bool(state[:, 1].any()), bool(state[0, 2])

    def barrier(self) -> None:
        """Wait until every process has called this.

        Raises:
            ProcessLost: where one has died, or has sent no heartbeat for too long.
        """
        if self.world > 1:
            key = peers.next_key("wait")
            with peer_errors():
                peers.store.add(f"{key}/{self.rank}", 1)
                peers.store.add(key, 1)
            peers.wait_until(
                lambda: peers.store.add(key, 0) >= self.world, lambda r: peers.store.add(f"{key}/{r}", 0) == 0
            )

    def broadcast_object(self, value: Any) -> Any:
        """The value of rank 0, returned by all processes; it must be picklable."""
        return self.on_main_process(lambda: value)

    def on_main_process(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0 only and return its result on all processes."""
        if self.world == 1:
            return function()
        key = peers.next_key("tell")
        if self.is_main_process:
            value = function()
            with peer_errors():
                peers.store.set(key, pickle.dumps(value))
            return value
        peers.wait_until(lambda: peers.store.check([key]), lambda r: r == 0)
        with peer_errors():
            return pickle.loads(peers.store.get(key))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, returned by all of them."""
        if self.world == 1:
            return [value]
        key = peers.next_key("gather")
        with peer_errors():
            peers.store.set(f"{key}/{self.rank}", pickle.dumps(value))
        self.barrier()
        with peer_errors():
            return [pickle.loads(peers.store.get(f"{key}/{r}")) for r in range(self.world)]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on one process of each host before the others, which find what it downloaded."""
        if self.local:
            self.barrier()
        yield
        if not self.local:
            self.barrier()

    def distribute(
        self,
        count: int,
        work: Callable[[int], Piece],
        done: Iterable[int] = (),
        everywhere: bool = False,
        tick: Callable[[int, int], None] | None = None,
    ) -> list[Piece | None]:
        """`[work(0), ..., work(count - 1)]`, where each idle process takes the next index.

        Args:
            count: number of pieces.
            work: returns one or more tensors, which depend on the index alone.
            done: indices that `work` of this process has cached; no other process computes them.
            everywhere: return all pieces on all processes; else on rank 0, and on the others their own and None.
            tick: called with (pieces taken, count).

        Raises:
            ProcessLost: where another process dies.
        """
        if self.world == 1:
            pieces: list[Piece | None] = []
            for index in range(count):
                pieces.append(work(index))
                if tick is not None:
                    tick(index + 1, count)
            return pieces
        key, owners = peers.next_key("deal"), self.cached_owners(done)
        mine = {index: work(index) for index, rank in owners.items() if rank == self.rank}
        missing = [index for index in range(count) if index not in owners]
        while True:
            with peer_errors():
                turn = peers.store.add(key, 1) - 1
            if tick is not None:
                tick(min(len(owners) + turn, count), count)
            if turn >= len(missing):
                break
            mine[missing[turn]] = work(missing[turn])
        return self.gather_pieces(count, mine, everywhere)

    def cached_owners(self, cached: Iterable[int]) -> dict[int, int]:
        """The lowest rank that has each index cached.

        Args:
            cached: indices that this process has cached.
        """
        owners: dict[int, int] = {}
        for rank, indices in reversed(list(enumerate(self.gather(sorted(set(cached)))))):
            owners |= dict.fromkeys(indices, rank)
        return owners

    def gather_pieces(self, count: int, mine: dict[int, Piece], everywhere: bool = False) -> list[Piece | None]:
        """The pieces of all processes in order.

        Args:
            count: number of pieces.
            mine: pieces of this process, by index.
            everywhere: see `distribute`.
        """
        shapes = self.gather({index: [(t.shape, t.dtype) for t in piece] for index, piece in mine.items()})
        owners = {index: rank for rank, known in enumerate(shapes) for index in known}
        pieces: list[Piece | None] = []
        with peer_errors():
            for index in range(count):
                rank = owners[index]
                piece = mine.get(index)
                if not everywhere and self.rank not in (0, rank):
                    pieces.append(None)
                    continue
                if everywhere or rank:
                    piece = tuple(
                        self._transfer(rank, shape, dtype, None if piece is None else piece[k], everywhere)
                        for k, (shape, dtype) in enumerate(shapes[rank][index])
                    )
                pieces.append(piece)
        return pieces

    def _transfer(self, owner: int, shape: Any, dtype: torch.dtype, tensor: Tensor | None, everywhere: bool) -> Tensor:
        """Send one tensor, as bytes, from its owner to rank 0 or to all."""
        tensor = torch.empty(shape, dtype=dtype) if tensor is None else tensor.cpu().contiguous()
        raw = tensor.flatten().view(torch.uint8)
        if everywhere:
            distributed.broadcast(raw, owner, group=peers.group)
        elif self.rank == owner:
            distributed.send(raw, 0, group=peers.group)
        else:
            distributed.recv(raw, owner, group=peers.group)
        return tensor

    def check_peers(self) -> None:
        """Check that no other process of this host has died.

        Raises:
            ProcessLost: where one has.
        """
        if dead := peers.find_dead(range(self.world)):
            raise ProcessLost(peers.describe(dead))

    def should_report(self, own: bool) -> bool:
        """Whether this process prints the error that ends the run, so that it is printed once.

        The first process that fails does; of an error in all (a lost process, a stop) the lowest rank alive.

        Args:
            own: the error occurred in this process, not in another.
        """
        if self.world == 1:
            return True
        peers.failed = True
        with contextlib.suppress(Exception):
            if not own:
                end = time.monotonic() + 20
                dead = set(peers.find_dead(range(self.world)))
                before = [r for r in range(self.rank) if r not in dead]
                while before and time.monotonic() < end and not peers.store.add("spoken", 0):
                    time.sleep(0.05)
            return peers.store.add("spoken", 1) == 1
        return own or self.is_main_process  # the store is gone too


def own_device(device: str | None, local: int | None) -> torch.device:
    """The device of this process.

    Args:
        device: a name; None: a GPU where there is one.
        local: of several processes, the local rank, which takes the GPU of the same number; None: a single process.

    Raises:
        BadInput: where there is no such device.
    """
    gpus = torch.cuda.is_available()
    alone = default_device_type() if local is None else "cpu"
    name = device or ("cuda" if gpus else alone)
    if not name.startswith("cuda"):
        return torch.device(name)
    if not gpus:
        raise BadInput(f"device {name} is not available: torch finds no GPU here (choices: cpu)")
    if local is None:
        return torch.device(name)
    if name not in ("cuda", f"cuda:{local}"):
        raise BadInput(f"each of several processes has a GPU of its own: use cuda, not {name}")
    if local >= torch.cuda.device_count():
        raise BadInput(
            f"process {local + 1} of this host finds no GPU of its own, there are {torch.cuda.device_count()}: "
            "start as many processes as GPUs, or use cpu"
        )
    return torch.device("cuda", local)


def _timeout_seconds(timeout: float | None) -> float:
    """The heartbeat time-out: the argument, $HASTEN_TIMEOUT or the default."""
    text = os.environ.get("HASTEN_TIMEOUT", HEARTBEAT_TIMEOUT) if timeout is None else timeout
    try:
        if float(text) > 0:
            return float(text)
    except ValueError:
        pass
    raise BadInput(f"a time-out is a positive number of seconds, found {text!r}")
