"""Random numbers: `Noise`, with one generator per sample, and the state of global generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput, HastenError, check_int
from .devices import rng_states, set_rng_states, upload

__all__ = ["MAX_SEED", "Noise", "global_seed", "preserve_rng_state", "make_generator", "no_noise"]

MAX_SEED = 2**64 - 1


class Noise:
    """Standard normal noise with one generator per sample: draw k of sample i depends on `seeds[i]` and k alone.

    So image 7 is the same image in a batch of 1, 7 or 64, in any order and on any device: the numbers are always drawn
    in float32 on the CPU, then moved and cast. The initial noise is `torch.randn(shape, generator=g)` for a CPU
    generator `g` with that seed; later draws continue from there.

    Args:
        seeds: one integer per sample, B of them, from 0 to 2^64 - 1.
        shape: shape S of one sample.
        dtype, device: of the results.

    Raises:
        BadInput: for an invalid seed, and for none.
    """

    def __init__(
        self,
        seeds: Iterable[int],
        shape: Iterable[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(seeds, str) or not isinstance(seeds, Iterable):
            raise BadInput(f"Noise needs a list of seeds, one a sample, found {seeds!r}")
        self.seeds = tuple(check_int("a seed", seed, 0, MAX_SEED) for seed in seeds)
        if isinstance(shape, str) or not isinstance(shape, Iterable):
            raise BadInput(f"Noise needs the shape of one sample, such as (3, 32, 32), found {shape!r}")
        self.shape = tuple(check_int("a size of the noise's shape", size, 0) for size in shape)
        self.dtype = dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise BadInput(f"the dtype of noise must be a floating one, such as torch.float32, found {dtype!r}")
        self.device = torch.device(device)
        self._generators: list[torch.Generator] | None = None
        if not self.seeds:
            raise BadInput("Noise needs at least one seed")

    def __len__(self) -> int:
        return len(self.seeds)

    def initial(self) -> Tensor:
        """The initial noise, (B, *S); the same at every call."""
        return self._draw(self._fresh())

    def draw(self) -> Tensor:
        """The next noise, (B, *S). `noise()` is the same."""
        if self._generators is None:
            self._generators = self._fresh()
            self._draw(self._generators)  # the initial noise comes first, whether or not it was used
        return self._draw(self._generators)

    __call__ = draw

    def rows(self, part: slice) -> Noise:
        """The noise of these samples alone, from its beginning: `noise.rows(slice(0, 8))`."""
        return Noise(self.seeds[part], self.shape, self.dtype, self.device)

    def _fresh(self) -> list[torch.Generator]:
        """New generators of the seeds."""
        return [make_generator(seed) for seed in self.seeds]

    def _draw(self, generators: list[torch.Generator]) -> Tensor:
        """The next draw of each generator."""
        drawn = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators])
        return upload(drawn, self.device, self.dtype)


def make_generator(seed: int) -> torch.Generator:
    """A CPU generator of this seed; different seeds from 0 to 2^64 - 1 have different numbers.

    Up to 2^32 - 1 it is `torch.Generator().manual_seed(seed)`, which uses the last 32 bits only. Above that its state
    is the Mersenne Twister's for the two halves of the seed.

    Args:
        seed: from 0 to 2^64 - 1.

    References:
        Matsumoto, Nishimura 2002 (`init_by_array`).
    """
    seed = check_int("a seed", seed, 0, MAX_SEED)
    generator = torch.Generator().manual_seed(seed % 2**32)
    if seed >= 2**32:
        twister: Any = np.random.RandomState([seed % 2**32, seed // 2**32]).get_state()
        words = twister[1]
        state = generator.get_state()
        state[24 : 24 + 8 * 624] = torch.from_numpy(np.asarray(words, dtype=np.uint64).view(np.uint8))
        generator.set_state(state)
    return generator


@contextlib.contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the CPU's global generator inside the block, and restore its state afterwards.

    Generators of other devices are not changed.

    Args:
        seed: of the block.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**64)
        yield


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the state of torch's global generators, that of the current GPU too, after the block. Also a decorator,
    `@preserve_rng_state()`.
    """
    states = rng_states()
    try:
        yield
    finally:
        set_rng_states(states)


def no_noise() -> Tensor:
    """The noise of a deterministic sampler. Raises HastenError when it is drawn after all."""
    raise HastenError("this sampler draws noise as it goes: pass noise=Noise(seeds, shape)")
