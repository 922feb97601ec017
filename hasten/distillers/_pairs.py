"""Pairs of noise and the teacher's samples: stored on disk, shared by the methods that learn from them.

A store is a folder. `pairs.json` holds the settings and lists the blocks with their checksums; `ends-00000.npy`, ...
hold the samples of a block, `states-00000.npy`, ... intermediate states. The noise is not stored: pair k starts from
the noise of its own seed (`hasten.sampling.Noise`). A block is written to a temporary file, renamed, and only then
listed, so a killed run resumes after its last complete block, and the result is the same, byte for byte.

References:
    Luhman, Luhman 2021, arXiv:2101.02388, who made a million such pairs: the probability-flow path is a map, and a pair
    is a sample of it.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from ..sampling import Noise

# Seeds that nobody samples with; a CPU generator has 2^32 in all.
FIRST_SEED, SEED_SPAN, SEED_RANGES = 10_000_000, 10_000_000, 400
NOISE_CACHE_BYTES = 2**28  # bytes of noise that are cached
MAX_OPEN_FILES = 64  # memory-mapped at once


class Pairs:
    """Pairs in memory-mapped files: `len(pairs)`, `pairs[k]`, `pairs[a:b]`, `pairs[indices]`.

    An entry is a dict, with a first dimension unless k is one number:
    `x` the teacher's sample (*S), float32, images in [-1, 1]; `noise` (*S), standard normal, which times
    `schedule.prior_std(t_max)` is what the teacher started from; `label` int64, where there are classes; `states`
    (T, *S), the noisy samples at the times `config["states"]` of the teacher's path, where there are any; and the
    conditions of its caption, of which the store keeps the index alone.

    Args:
        folder: of the store.
        config: its settings.
        start, stop: first pair, and the one after the last.
        conditions: of captions, by index (n,) int64; None: there are none.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        start: int,
        stop: int,
        conditions: Callable[[Tensor], dict[str, Tensor]] | None = None,
    ) -> None:
        self.folder, self.config, self.start, self.stop = folder, config, start, stop
        self.conditions = conditions
        self._maps: OrderedDict[str, Any] = OrderedDict()  # the files used last; each holds a descriptor
        self._noise_blocks: dict[int, Any] = {}
        # generating noise takes as long as a small network: cached, where there is room for all of it
        self._caches_noise = 4 * (stop - start) * math.prod(config["shape"]) <= NOISE_CACHE_BYTES

    def __len__(self) -> int:
        return self.stop - self.start

    def subset(self, start: int, stop: int | None = None) -> Pairs:
        """The pairs start .. stop - 1.

        Args:
            start: first pair.
            stop: the one after the last; None: up to the end.

        Raises:
            BadInput: where that is empty or out of range.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start < stop <= len(self):
            raise BadInput(f"a subset of {len(self)} pairs needs 0 <= start < stop <= {len(self)}, got {start}, {stop}")
        subset = Pairs(self.folder, self.config, self.start + start, self.start + stop, self.conditions)
        subset._maps, subset._noise_blocks, subset._caches_noise = self._maps, self._noise_blocks, self._caches_noise
        return subset

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> dict[str, Tensor]:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range: there are {len(self)} pairs")
            return {key: value[0] for key, value in self[[index % len(self)]].items()}
        if isinstance(index, slice):
            index = list(range(*index.indices(len(self))))
        rows = torch.as_tensor(index, dtype=torch.long) + self.start
        ends = self._read("ends", rows)
        batch = {"x": ends.float() / 127.5 - 1 if ends.dtype == torch.uint8 else ends.float()}
        batch["noise"] = self._read("noise", rows) if self._caches_noise else self._noise(rows)
        if self.config["classes"]:
            batch["label"] = pair_labels(self.config, rows)
        if self.conditions is not None:
            batch |= self.conditions(pair_captions(self.config, rows))
        if self.config["states"]:
            batch["states"] = self._read("states", rows).float()
        return batch

    def _read(self, kind: str, indices: Tensor) -> Tensor:
        """Rows of the files `kind`, in the order of the indices."""
        out: Tensor | None = None
        blocks = indices // self.config["block"]
        for block in blocks.unique().tolist():
            values = self._noise_block(block) if kind == "noise" else self._map(f"{kind}-{block:05d}")
            where = (blocks == block).nonzero()[:, 0]
            rows = torch.from_numpy(values[(indices[where] % self.config["block"]).numpy()])
            out = rows.new_empty(len(indices), *rows.shape[1:]) if out is None else out
            out[where] = rows
        assert out is not None, "no indices"
        return out

    def _map(self, key: str) -> np.ndarray:
        """A memory-mapped file; at most `MAX_OPEN_FILES` stay open, of the about thousand that a process may have."""
        if key not in self._maps:
            while len(self._maps) >= MAX_OPEN_FILES:
                self._maps.popitem(last=False)
            self._maps[key] = np.load(self.folder / f"{key}.npy", mmap_mode="r")
        self._maps.move_to_end(key)
        return self._maps[key]

    def _noise_block(self, block: int) -> np.ndarray:
        """The noise of a block, generated once."""
        if block not in self._noise_blocks:
            self._noise_blocks[block] = self._noise(
                torch.arange(self.config["block"]) + block * self.config["block"]
            ).numpy()
        return self._noise_blocks[block]

    def _noise(self, indices: Tensor) -> Tensor:
        return Noise((indices + self.config["seed"]).tolist(), self.config["shape"]).initial()

    def batches(self, batch_size: int, seed: int = 0) -> PairBatches:
        """Infinite batches, each pair once an epoch, in an order that is a function of (seed, epoch)."""
        return PairBatches(self, batch_size, seed)


class PairBatches:
    """Training batches: `batches[k]`, the batch of step k, is a function of (seed, k) alone.

    Epochs are permutations laid end to end and cut into batches, so that a batch may span two.

    Args:
        pairs: to train on.
        batch_size: pairs in a batch.
        seed: of the permutations.
        part, parts: which of how many equal parts of every batch.

    Raises:
        BadInput: for a batch size below 1 or not a multiple of `parts`.
    """

    def __init__(self, pairs: Pairs, batch_size: int, seed: int = 0, part: int = 0, parts: int = 1) -> None:
        if batch_size < 1:
            raise BadInput(f"batch_size must be at least 1, got {batch_size}")
        if batch_size % parts:
            raise BadInput(
                f"batch_size must be a multiple of the {parts} parts (processes times accumulate), got {batch_size}"
            )
        self.pairs, self.batch_size, self.seed, self.part, self.parts = pairs, batch_size, seed, part, parts
        self._order: tuple[int, Tensor] | None = None

    def indices(self, step: int) -> Tensor:
        """The indices of the pairs in a batch, int64 (batch_size,)."""
        n, parts = len(self.pairs), []
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        while start < stop:
            epoch, offset = divmod(start, n)
            parts.append(self._permutation(epoch)[offset : offset + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._order = epoch, torch.randperm(len(self.pairs), generator=generator)
        return self._order[1]

    def shard(self, part: int, parts: int) -> PairBatches:
        """Part `part` of `parts` of every batch."""
        return PairBatches(self.pairs, self.batch_size, self.seed, part, parts)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        size = self.batch_size // self.parts
        return self.pairs[self.indices(step)[self.part * size : (self.part + 1) * size]]


def pair_labels(config: dict[str, Any], indices: Tensor) -> Tensor:
    """The labels of pairs, int64: pair k has class k % C, or a random one from the seed of its block.

    A null label among the classes is never used: classes above it move up by one.

    Args:
        config: settings of the store.
        indices: of the pairs, int64.
    """
    null, count = config.get("null_label"), int(config["classes"])
    if null is not None:
        if count == 1:
            return torch.full_like(indices, null)
        labels = pair_labels({**config, "classes": count - 1, "null_label": None}, indices)
        return labels + (labels >= null).long()
    if config["labels"] == "turns":
        return indices % count
    out, blocks = torch.empty_like(indices), indices // config["block"]
    for block in blocks.unique().tolist():
        # beyond all seeds of noise
        seed = FIRST_SEED + SEED_RANGES * SEED_SPAN + (config["seed"] // SEED_SPAN) * 500_000 + block
        random_labels = torch.randint(count, (config["block"],), generator=torch.Generator().manual_seed(seed))
        here = blocks == block
        out[here] = random_labels[indices[here] % config["block"]]
    return out


def pair_captions(config: dict[str, Any], indices: Tensor) -> Tensor:
    """The indices of the captions of pairs, int64: all in turns, in a random order, or a random one for each pair.

    Args:
        config: settings of the store.
        indices: of the pairs, int64.
    """
    count = int(config["captions"])
    chosen = pair_labels({**config, "classes": count, "null_label": None}, indices)
    if config["labels"] != "turns":
        return chosen
    seed = FIRST_SEED + SEED_RANGES * SEED_SPAN + SEED_RANGES * 500_000 + config["seed"] // SEED_SPAN
    return permutation(count, seed)[chosen]


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int) -> Tensor:
    """A random order of `count` numbers, int64: of millions of crops it takes longer than a batch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
