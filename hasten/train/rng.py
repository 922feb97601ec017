"""Random numbers of a training step, one stream for each micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from ..utils.devices import rng_states, seed_generators, set_rng_states


def step_seed(seed: int, step: int, part: int) -> int:
    """The seed of a step's random numbers for micro-batch `part`: below 2**32, after which a CPU generator repeats."""
    return (seed * 1_000_003 + step + part * 2_654_435_769) % 2**32


class MicroBatchRng:
    """torch's global generators within one training step, forked for each micro-batch.

    Each micro-batch has a stream of its own, from its seed. The trained modules continue it one after another, whatever
    is drawn for the other micro-batches in between.

    Args:
        seeds: one seed for each micro-batch (`step_seed`).
    """

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds
        self.states: list[dict[str, Tensor] | None] = [None] * len(seeds)
        if len(seeds) == 1:
            seed_generators(seeds[0])

    @contextlib.contextmanager
    def fork(self, part: int) -> Iterator[None]:
        """Draw from the stream of micro-batch `part` inside."""
        if len(self.seeds) == 1:
            yield
            return
        state = self.states[part]
        if state is None:
            seed_generators(self.seeds[part])
        else:
            set_rng_states(state)
        yield
        self.states[part] = rng_states()
