"""Process groups of `torch.distributed` for the accelerators that share one sampling between processes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from ..errors import BadInput
from .ranks import launched

__all__ = ["ProcessGroup", "all_gather", "check_same_noise", "process_group", "process_rank"]

PROBES = 32  # entries of x_t that processes compare
TOLERANCE = 0.1  # of its mean absolute value: far less than between two noises, far more than rounding


@dataclass(frozen=True)
class ProcessGroup:
    """A group of processes.

    Attributes:
        ranks: their ranks in the world, in order.
        me: the index of this process in `ranks`.
        group: the group of `torch.distributed`, None for one process.
    """

    ranks: tuple[int, ...] = (0,)
    me: int = 0
    group: Any = None

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.ranks)


_cache: dict[tuple[tuple[int, ...], ...], ProcessGroup] = {}
_world: Any = None  # the world that the cached groups belong to


def process_rank() -> tuple[int, int]:
    """This process's rank and the number of processes, `(0, 1)` for a single one.

    Raises:
        BadInput: where torchrun started several processes that did not join: each would do all the work.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        if launched() > 1:
            raise BadInput("the processes that torchrun started must be joined first: hasten.Ranks.start()")
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def process_group(partition: list[tuple[int, ...]]) -> ProcessGroup:
    """The group of this process in a partition of the ranks.

    Args:
        partition: the ranks of every group. All processes call this with the same partition, at the same point.
    """
    global _world
    rank, world = process_rank()
    if world == 1:
        return ProcessGroup()
    if distributed.group.WORLD is not _world:
        _cache.clear()
        _world = distributed.group.WORLD
    key = tuple(partition)
    if key not in _cache:
        for ranks in partition:  # every process creates every group, its own or not
            everyone = len(ranks) == world
            group = distributed.group.WORLD if everyone else distributed.new_group(list(ranks), timeout=_timeout())
            if rank in ranks:
                _cache[key] = ProcessGroup(ranks, ranks.index(rank), group)
    return _cache[key]


def _timeout() -> timedelta | None:
    """The time-out of the world's group, which a new group does not inherit."""
    world: Any = distributed.group.WORLD
    for device in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):
            return world._get_backend(torch.device(device)).options._timeout
    return None


def check_same_noise(members: ProcessGroup, x_t: Tensor, who: str) -> None:
    """Check that all members of a group start a sampling from the same noise; it waits for the device once.

    Args:
        members: the group.
        x_t: (B, *S), the noise of this process.
        who: the accelerator's name, for the message.

    Raises:
        BadInput: on every member alike, where an image would be made of several noises.
    """
    flat = x_t.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, PROBES, dtype=torch.float64).long().to(flat.device)
    own = torch.cat([flat[index].float(), flat.new_full((1,), flat.numel(), dtype=torch.float32)])
    every = own.new_empty(members.size * own.numel())
    all_gather(every, own, members.group)
    rows = every.view(members.size, -1).cpu()
    if bool(((rows - rows[0]).abs() > TOLERANCE * rows[0, :-1].abs().mean()).any()):
        raise BadInput(
            f"{who}: the processes began with different noise, so that each would get an image made of several: give "
            "all the same generator=torch.Generator().manual_seed(...) or latents= (and the same prompts)"
        )


def all_gather(output: Tensor, own: Tensor, group: Any, later: bool = False) -> Any:
    """Concatenate the flat tensors of all members.

    Args:
        output: (members * k,), written.
        own: (k,), of this process.
        group: the group of `torch.distributed`.
        later: return without waiting.

    Returns:
        With `later` a handle to wait for, else None.
    """
    run = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    return run(output, own, group=group, async_op=later)
