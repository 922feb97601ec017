"""Batches of clips of similar length, in an order that a resumed run repeats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .features import Corpus

__all__ = ["SpeechBatches"]

POOL = 8  # batches that are sorted by length together


class SpeechBatches:
    """An endless sequence of batches; batch k is a function of `(seed, k)` only.

    Each epoch is a random order, of which every 8 batches are sorted by length, so that little is padding.

    A batch holds `x` standardised mels (B, M, L), `frames` (B,), `tokens` and `durations` (B, T), `f0` and `energy`
    (B, L), and
    `speaker` (B,).

    Args:
        corpus: the clips.
        batch_size: clips in a batch.
        seed: of the order.
    """

    def __init__(self, corpus: Corpus, batch_size: int, seed: int = 0) -> None:
        self.batch_size, self.seed = batch_size, seed
        known = corpus.statistics()
        mean, std = known["mel_mean"][:, None], known["mel_std"][:, None]
        center, scale = known["energy_stats"]
        self.rows: list[dict[str, Any]] = [
            {
                "x": ((clip.mel - mean) / std).T.contiguous(),
                "tokens": clip.tokens,
                "durations": clip.durations,
                "f0": clip.f0,
                "energy": (clip.energy - center) / scale,
                "speaker": clip.speaker,
            }
            for clip in corpus.clips
        ]
        self._order: tuple[int, list[list[int]]] | None = None

    def epoch(self, number: int) -> list[list[int]]:
        """The rows of each batch of an epoch."""
        if self._order is None or self._order[0] != number:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            order = torch.randperm(len(self.rows), generator=generator).tolist()
            size = self.batch_size
            order += (order * (size // len(order) + 1))[: -len(order) % size]
            batches = []
            for first in range(0, len(order), POOL * size):
                pool = sorted(order[first : first + POOL * size], key=lambda row: len(self.rows[row]["x"]))
                batches += [pool[k : k + size] for k in range(0, len(pool), size)]
            shuffled = torch.randperm(len(batches), generator=generator).tolist()
            self._order = number, [batches[k] for k in shuffled]
        return self._order[1]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Batch `step`."""
        if step < 0:
            raise IndexError(f"batches are counted from 0, got {step}")
        number, place = divmod(step, -(-len(self.rows) // self.batch_size))
        return collate([self.rows[row] for row in self.epoch(number)[place]])


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of different lengths as one batch."""
    return {
        "x": pad_sequence([row["x"] for row in rows], batch_first=True).transpose(1, 2).contiguous(),
        "frames": torch.tensor([len(row["x"]) for row in rows]),
        "tokens": pad_sequence([row["tokens"] for row in rows], batch_first=True),
        "durations": pad_sequence([row["durations"] for row in rows], batch_first=True),
        "f0": pad_sequence([row["f0"] for row in rows], batch_first=True),
        "energy": pad_sequence([row["energy"] for row in rows], batch_first=True),
        "speaker": torch.tensor([row["speaker"] for row in rows]),
    }
