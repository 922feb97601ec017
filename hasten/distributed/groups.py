"""Which processes share one sampling: the groups of `torch.distributed` that these accelerators talk in."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from ..errors import BadInput
from .ranks import launched

__all__ = ["ProcessGroup", "check_same", "gather", "process_rank", "team"]

PROBES = 32  # entries of x_t that processes compare
CLOSE = 0.1  # of its mean size: far less than between two noises, far more than rounding


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of one group, by their ranks in the world, in order; `me` is this one's place among them."""

    ranks: tuple[int, ...] = (0,)
    me: int = 0
    group: Any = None

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)


_made: dict[tuple[tuple[int, ...], ...], ProcessGroup] = {}
_world: Any = None  # that they were made in


def process_rank() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) where there is but one.

    Raises BadInput where torchrun started several that were not joined: each would do all the work.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        if launched() > 1:
            raise BadInput("the processes that torchrun started must be joined first: hasten.Ranks.start()")
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def team(parts: list[tuple[int, ...]]) -> ProcessGroup:
    """This process's group among `parts`, which every process must name alike and at the same point."""
    global _world
    rank, world = process_rank()
    if world == 1:
        return ProcessGroup()
    if distributed.group.WORLD is not _world:
        _made.clear()
        _world = distributed.group.WORLD
    key = tuple(parts)
    if key not in _made:
        for part in parts:  # every process makes every group, its own or not
            whole = len(part) == world
            group = distributed.group.WORLD if whole else distributed.new_group(list(part), timeout=_patience())
            if rank in part:
                _made[key] = ProcessGroup(part, part.index(rank), group)
    return _made[key]


def _patience() -> timedelta | None:
    """The time-out of the world, which a group of some of it does not take over by itself."""
    for device in ("cpu", "cuda"):
        with contextlib.suppress(RuntimeError, AttributeError):
            return distributed.group.WORLD._get_backend(torch.device(device)).options._timeout  # type: ignore[union-attr]
    return None


def check_same(members: ProcessGroup, x_t: Tensor, who: str) -> None:
    """Refuse, on every process, a sampling that the members of a group began with different x_t (B, *S): each would be
    given an image made of several noises. It waits for the device once.

    Raises BadInput on every member alike.
    """
    flat = x_t.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, PROBES, dtype=torch.float64).long().to(flat.device)
    own = torch.cat([flat[index].float(), flat.new_full((1,), flat.numel(), dtype=torch.float32)])
    every = own.new_empty(members.size * own.numel())
    gather(every, own, members.group)
    rows = every.view(members.size, -1).cpu()
    if bool(((rows - rows[0]).abs() > CLOSE * rows[0, :-1].abs().mean()).any()):
        raise BadInput(
            f"{who}: the processes began with different noise, so that each would get an image made of several: give "
            "all the same generator=torch.Generator().manual_seed(...) or latents= (and the same prompts)"
        )


def gather(into: Tensor, own: Tensor, group: Any, later: bool = False) -> Any:
    """All members' `own` (k,), one after the other, in `into` (members * k,). later: a handle to wait for."""
    run = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    return run(into, own, group=group, async_op=later)
