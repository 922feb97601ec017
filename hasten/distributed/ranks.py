"""The processes of one run: which of them this is, its device, what they tell one another, and who does what.

Start several with `torchrun --nproc-per-node K -m -- hasten ...`. Small things (decisions, counts, who is alive) go
through the store that torchrun keeps; tensors go through `torch.distributed`, by gloo on CPUs and NCCL on GPUs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..errors import BadInput
from ..utils.environment import launched
from .heartbeat import SILENCE, ProcessLost, peer_errors, peers, variable

__all__ = ["ProcessLost", "Ranks", "launched", "own_device"]

Piece = tuple[Tensor, ...]


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, and its device. `local` counts the processes of one machine.

    Gradients are averaged after the backward pass, one flat tensor an optimiser. That loses the overlap with the
    backward pass that `DistributedDataParallel` has, and lets a loss reach its modules in any way it likes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def start(cls, device: str | None = None, timeout: float | None = None) -> Ranks:
        """Join the other processes, if torchrun started any (its variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
        and MASTER_PORT are there); in a process that has joined already, the same again.

        device: `cpu`, `cuda`, ...; by default a GPU where there is one. Of several processes each takes the GPU of its
            own number on its machine.
        timeout: seconds after which a process that gives no sign of life counts as dead (None: $HASTEN_TIMEOUT, or
            60). How long a process works on something does not matter.

        Raises BadInput for a device that is not here, HastenError where the others cannot be reached.
        """
        world = launched()
        if distributed.is_available() and distributed.is_initialized():
            world = distributed.get_world_size()
        if world == 1:
            return cls(own_device(device, None))
        here = cls.connect(timeout)
        found = own_device(device, here.local)
        if found.type == "cuda":
            torch.cuda.set_device(found)
        peers.join(found.type == "cuda")
        return replace(here, device=found)

    @classmethod
    def connect(cls, timeout: float | None = None) -> Ranks:
        """The others, found but not joined: enough to know who is alive and to say why a run ends."""
        world = launched()
        if distributed.is_available() and distributed.is_initialized():
            world = distributed.get_world_size()
        if world > 1:
            peers.meet(variable("RANK", 0), world, _seconds(timeout))
        return cls(torch.device("cpu"), peers.rank, peers.world, variable("LOCAL_RANK", peers.rank))

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def broadcast_parameters(self, module: nn.Module) -> None:
        """Give every process the weights and buffers of the first."""
        if self.world > 1:
            with peer_errors():
                for tensor in (*module.parameters(), *module.buffers()):
                    distributed.broadcast(tensor.data, 0)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its mean over the processes, of whom some may have none; the mean of `loss` is
        returned. Where no process has one, there is none afterwards: to an optimiser that is not the same as zero."""
        if self.world == 1:
            return loss
        owners = [p for p in parameters if p.requires_grad]
        mine = [p.grad is not None for p in owners]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in owners]
        has = torch.tensor(mine, dtype=torch.float32, device=loss.device)
        flat = torch.cat([loss.detach().float().view(1), has, *(grad.float().flatten() for grad in grads)])
        with peer_errors():
            distributed.all_reduce(flat)
        flat /= self.world
        loss, has, means = flat.split([1, len(owners), len(flat) - 1 - len(owners)])
        some = mine if all(mine) else has.tolist()  # which waits for a GPU
        for p, grad, mean, there in zip(owners, grads, means.split([p.numel() for p in owners]), some, strict=True):
            p.grad = grad.copy_(mean.view_as(p)) if there else None
        return loss[0]

    def agree(self, seconds: float, stop: bool, due: bool) -> tuple[float, bool, bool]:
        """The first process's clock and wish to save, and whether any process was told to stop."""
        if self.world == 1:
            return seconds, stop, due
        told = torch.zeros(self.world, 3, dtype=torch.float64)
        told[self.rank] = torch.tensor([seconds, float(stop), float(due)], dtype=torch.float64)
        with peer_errors():
            distributed.all_reduce(told, group=peers.group)
        return float(told[0, 0]), bool(told[:, 1].any()), bool(told[0, 2])

    def barrier(self) -> None:
        """Until every process is here.

        Raises ProcessLost where one has died, or has given no sign of life for too long.
        """
        if self.world > 1:
            key = peers.next("wait")
            with peer_errors():
                peers.store.add(f"{key}/{self.rank}", 1)
                peers.store.add(key, 1)
            peers.watch(lambda: peers.store.add(key, 0) >= self.world, lambda r: peers.store.add(f"{key}/{r}", 0) == 0)

    def broadcast_object(self, value: Any) -> Any:
        """The first process's value, at all of them."""
        return self.on_main_process(lambda: value)

    def on_main_process(self, decide: Callable[[], Any]) -> Any:
        """What `decide` gives in the first process, at all of them; only there it is called."""
        if self.world == 1:
            return decide()
        key = peers.next("tell")
        if self.is_main_process:
            value = decide()
            with peer_errors():
                peers.store.set(key, pickle.dumps(value))
            return value
        peers.watch(lambda: peers.store.check([key]), lambda r: r == 0)
        with peer_errors():
            return pickle.loads(peers.store.get(key))

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, at all of them, by rank."""
        if self.world == 1:
            return [value]
        key = peers.next("gather")
        with peer_errors():
            peers.store.set(f"{key}/{self.rank}", pickle.dumps(value))
        self.barrier()
        with peer_errors():
            return [pickle.loads(peers.store.get(f"{key}/{r}")) for r in range(self.world)]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """One process of each machine does what is inside before the others: what it fetches, they find."""
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
        """`[work(0), ..., work(count - 1)]`: whoever is free takes the next number, and each is taken once.

        work: gives one or more tensors, which depend on the number alone. done: numbers that this process need not
        compute, as `work` has them at hand. everywhere: the result is given to all processes; otherwise to the first
        one, and the others get their own pieces, and None for the rest. tick: told of (numbers dealt, of how many).
        """
        if self.world == 1:
            found = []
            for number in range(count):
                found.append(work(number))
                if tick is not None:
                    tick(number + 1, count)
            return found  # type: ignore[return-value]
        key, owners = peers.next("deal"), self.owners(done)
        mine = {number: work(number) for number, rank in owners.items() if rank == self.rank}
        missing = [number for number in range(count) if number not in owners]
        while True:
            with peer_errors():
                turn = peers.store.add(key, 1) - 1
            if tick is not None:
                tick(min(len(owners) + turn, count), count)
            if turn >= len(missing):
                break
            mine[missing[turn]] = work(missing[turn])
        return self.collect(count, mine, everywhere)

    def owners(self, held: Iterable[int]) -> dict[int, int]:
        """By number the first process that has it. held: what this one has."""
        owners: dict[int, int] = {}
        for rank, numbers in reversed(list(enumerate(self.gather(sorted(set(held)))))):
            owners |= dict.fromkeys(numbers, rank)
        return owners

    def collect(self, count: int, mine: dict[int, Piece], everywhere: bool = False) -> list[Piece | None]:
        """The numbered pieces of all processes, at the first one or everywhere, in order."""
        shapes = self.gather({number: [(t.shape, t.dtype) for t in piece] for number, piece in mine.items()})
        owner = {number: rank for rank, known in enumerate(shapes) for number in known}
        found: list[Piece | None] = []
        with peer_errors():
            for number in range(count):
                rank = owner[number]
                piece = mine.get(number)
                if not everywhere and self.rank not in (0, rank):
                    found.append(None)
                    continue
                if everywhere or rank:
                    piece = tuple(self._pass(rank, shape, dtype, None if piece is None else piece[k], everywhere)
                                  for k, (shape, dtype) in enumerate(shapes[rank][number]))  # fmt: skip
                found.append(piece)
        return found

    def _pass(self, owner: int, shape: Any, dtype: torch.dtype, tensor: Tensor | None, everywhere: bool) -> Tensor:
        """One tensor on its way from its owner, as bytes."""
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
        """Raise ProcessLost where another process of this machine has died."""
        if dead := peers.gone(range(self.world)):
            raise ProcessLost(peers.lost(dead))

    def should_report(self, own: bool) -> bool:
        """Whether this process is the one that says why the run ends. own: the cause lies here, not in another.

        The first to fail speaks. Of a loss or a stop that all notice, the first process that is alive does.
        """
        if self.world == 1:
            return True
        peers.failed = True
        with contextlib.suppress(Exception):
            if not own:
                end = time.monotonic() + 20
                dead = set(peers.gone(range(self.world)))
                before = [r for r in range(self.rank) if r not in dead]
                while before and time.monotonic() < end and not peers.store.add("spoken", 0):
                    time.sleep(0.05)
            return peers.store.add("spoken", 1) == 1
        return own or self.is_main_process  # the store is gone too


def own_device(device: str | None, local: int | None) -> torch.device:
    """The device that was asked for; of several processes on a machine, number `local` takes the GPU of its number."""
    gpus = torch.cuda.is_available()
    asked = device or ("cuda" if gpus else "cpu")
    if not asked.startswith("cuda"):
        return torch.device(asked)
    if not gpus:
        raise BadInput(f"device {asked} was asked for, but torch finds no GPU here (choices: cpu)")
    if local is None:
        return torch.device(asked)
    if asked not in ("cuda", f"cuda:{local}"):
        raise BadInput(f"each of several processes has a GPU of its own: ask for cuda, not {asked}")
    if local >= torch.cuda.device_count():
        raise BadInput(
            f"process {local + 1} of this machine finds no GPU of its own, there are {torch.cuda.device_count()}: "
            "start as many processes as GPUs, or ask for cpu"
        )
    return torch.device("cuda", local)


def _seconds(timeout: float | None) -> float:
    """The time-out that was asked for."""
    text = os.environ.get("HASTEN_TIMEOUT", SILENCE) if timeout is None else timeout
    try:
        if float(text) > 0:
            return float(text)
    except ValueError:
        pass
    raise BadInput(f"a time-out is a positive number of seconds, found {text!r}")
