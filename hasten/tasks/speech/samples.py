"""Spectrograms with the condition of each frame, on which a model that speaks is distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...audio.corpus import open_corpus
from ...denoiser import Wrapper
from ...model.model import Model
from ...train.sources import Data
from .features import Corpus, corpus_features
from .speech import ALIGNER, Speech

__all__ = ["SegmentDenoiser", "speech_samples"]

FEATURES = "features.pt"  # in the folder of a run


def speech_samples(
    model: Model, data: str | Path | Corpus, out: Path | None = None, split: str | None = "train"
) -> Data:
    """A corpus as samples of a model: segments of at most L frames, standardised, with their conditions.

    The conditions are `frames` (B, L, H), by the model's encoder from the true durations, pitch and energy, and `mask`
    (B, L), 1 for frames and 0 for padding.

    Args:
        model: that speaks, with samples of shape (M, L).
        data: what `open_corpus` reads, or a `Corpus` with the model's tokens.
        out: a folder in which the features are kept; None: nowhere.
        split: of the corpus, where it has splits.

    Raises:
        BadInput: for data that cannot be used.
    """
    speech = Speech(model)
    if isinstance(data, Corpus):
        corpus, source = data, "the corpus"
    else:
        aligner: Any = model.parts.get(ALIGNER)
        cache = None if out is None else out / FEATURES
        clips = open_corpus(data, split)
        front = speech.front
        corpus = corpus_features(clips, speech.settings, front.kind, cache, front.symbols, aligner)
        source = str(data)
    segments = Segments(speech, corpus, int(model.shape[-1]))
    shape: Any = tuple(model.shape)
    return Data(len(segments.place), shape, segments.spectra, source=source, conditions=segments.conditions)


class SegmentDenoiser(Wrapper):
    """A denoiser that gets the number of a segment as its label, and its conditions from a set of samples.

    With it, what is made for models with classes, such as tuning, runs on a model that speaks.

    Args:
        denoiser: of a model that speaks.
        samples: of `speech_samples`.
    """

    def __init__(self, denoiser: torch.nn.Module, samples: Data) -> None:
        super().__init__(denoiser)
        self.samples = samples

    def forward(self, x_t: Tensor, t: Tensor | float, label: Tensor | None = None, **cond: Any) -> Tensor:
        """The inner denoiser's x0 (B, *S); label: (B,)."""
        x0: Tensor = self.denoiser(x_t, t, **cond, **self.conditions(x_t, label))
        return x0

    def raw(self, x_t: Tensor, t: Tensor | float, label: Tensor | None = None, **cond: Any) -> Tensor:
        """The inner denoiser's `raw`."""
        raw: Tensor = self.denoiser.raw(x_t, t, **cond, **self.conditions(x_t, label))
        return raw

    def conditions(self, x_t: Tensor, label: Tensor | None) -> dict[str, Tensor]:
        """`frames` and `mask` of the segments."""
        if label is None:
            return {}
        assert self.samples.conditions is not None
        found = self.samples.conditions([int(row) for row in label.tolist()])
        return {name: value.to(x_t.device) for name, value in found.items()}

    def labels(self, n: int) -> Tensor:
        """The segments of n samples, in a fixed random order, (n,) int64."""
        order = torch.randperm(len(self.samples), generator=torch.Generator().manual_seed(0))
        return order[torch.arange(n) % len(order)]

    def images(self, n: int) -> tuple[Tensor, Tensor]:
        """n samples (n, M, L) and their segments (n,)."""
        rows = self.labels(n)
        return self.samples.images(rows), rows


class Segments:
    """The segments of a corpus, by index.

    Args:
        speech: with the encoder.
        corpus: of the same tokens.
        size: L, largest number of frames.
    """

    def __init__(self, speech: Speech, corpus: Corpus, size: int) -> None:
        self.speech, self.corpus, self.size = speech, corpus, size
        self.center, self.scale = speech.model.card["speech"]["energy"]
        self.place: list[tuple[int, int, int]] = []  # clip, first frame, end
        for row, clip in enumerate(corpus.clips):
            parts = -(-clip.frames // size)
            edges = [clip.frames * k // parts for k in range(parts + 1)]
            self.place += [(row, first, end) for first, end in zip(edges, edges[1:])]
        self._known: dict[int, Tensor] = {}

    def spectra(self, rows: list[int]) -> Tensor:
        """Standardised mels (n, M, L), zero where padded."""
        encoder = self.speech.encoder
        out = torch.zeros(len(rows), self.corpus.settings.mels, self.size)
        for k, row in enumerate(rows):
            clip, first, end = self.place[row]
            out[k, :, : end - first] = encoder.normalize(self.corpus.clips[clip].mel.to(encoder.mel_mean)).cpu()[
                :, first:end
            ]
        return out

    def conditions(self, rows: list[int]) -> dict[str, Tensor]:
        """`frames` (n, L, H) and `mask` (n, L)."""
        frames = torch.zeros(len(rows), self.size, self.speech.encoder.config["hidden"])
        mask = torch.zeros(len(rows), self.size)
        self.encode(sorted({self.place[row][0] for row in rows} - self._known.keys()))
        for k, row in enumerate(rows):
            clip, first, end = self.place[row]
            frames[k, : end - first] = self._known[clip][first:end]
            mask[k, : end - first] = 1
        return {"frames": frames, "mask": mask}

    @torch.no_grad()
    def encode(self, clips: list[int]) -> None:
        """Compute the conditions of whole clips, and keep them."""
        encoder = self.speech.encoder.eval()
        device = encoder.mel_mean.device
        for row in clips:
            clip = self.corpus.clips[row]
            tokens, durations, f0, energy = (
                one[None].to(device)
                for one in (clip.tokens, clip.durations, clip.f0, (clip.energy - self.center) / self.scale)
            )
            speaker = torch.tensor([clip.speaker], device=device)
            self._known[row] = encoder(tokens, durations, f0, energy, speaker).frames[0].float().cpu()
