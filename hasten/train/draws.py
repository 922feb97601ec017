"""Random numbers of a step of training, by the part of its batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def drawn(seed: int, step: int, part: int) -> int:
    """The seed of a step's random numbers for a part of its batch: below 2**32, after which a CPU's repeat."""
    return (seed * 1_000_003 + step + part * 2_654_435_769) % 2**32


class Draws:
    """torch's global generators in one step: each part of the batch has a stream of its own, from its seed, in which
    the players come one after another, whatever is drawn for the other parts in between."""

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds
        self.states: list[Any] = [None] * len(seeds)
        if len(seeds) == 1:
            torch.manual_seed(seeds[0])

    @contextlib.contextmanager
    def of(self, part: int) -> Iterator[None]:
        """What is drawn inside is drawn for this part."""
        if len(self.seeds) == 1:
            yield
            return
        if self.states[part] is None:
            torch.manual_seed(self.seeds[part])
        else:
            torch.set_rng_state(self.states[part][0])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(self.states[part][1])
        yield
        self.states[part] = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
