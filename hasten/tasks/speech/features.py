"""What the acoustic model is trained on: the spectrogram, pitch, energy and tokens of each clip."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...audio.mel import MelSettings, mel
from ...audio.pitch import track_pitch
from ...errors import BadInput
from ...train.messages import print_once
from .corpus import Clip
from .text import FrontEnd, symbols_of

__all__ = ["Corpus", "Features", "corpus_features"]


@dataclass(frozen=True)
class Features:
    """A clip for training.

    Args:
        tokens: (T,) int64.
        mel: log mel (M, L), not yet standardised.
        f0: Hz, 0 where unvoiced, (L,).
        energy: log energy, not yet standardised, (L,).
        speaker: index.
    """

    tokens: Tensor
    mel: Tensor
    f0: Tensor
    energy: Tensor
    speaker: int = 0

    @property
    def frames(self) -> int:
        """L."""
        return self.mel.shape[1]


@dataclass(frozen=True)
class Corpus:
    """The features of all clips with what they have in common.

    Args:
        clips: one entry a clip.
        symbols: the tokens by number.
        speakers: names by index; none for one without a name.
        settings: of the spectrograms.
        text: kind of the front end.
    """

    clips: list[Features]
    symbols: tuple[str, ...]
    speakers: tuple[str, ...]
    settings: MelSettings
    text: str = "phonemes"

    @property
    def seconds(self) -> float:
        """Length of all clips."""
        return sum(clip.frames for clip in self.clips) * self.settings.hop / self.settings.sample_rate

    def statistics(self) -> dict[str, Tensor]:
        """Mean and deviation of each band (M,), and of log f0 (2,) and log energy (2,) over all frames."""
        mels = torch.cat([clip.mel for clip in self.clips], 1)
        f0 = torch.cat([clip.f0 for clip in self.clips])
        voiced = f0[f0 > 0].log() if int((f0 > 0).sum()) > 1 else torch.tensor([5.0, 5.5])
        energy = torch.cat([clip.energy for clip in self.clips])
        return {
            "mel_mean": mels.mean(1),
            "mel_std": mels.std(1).clamp_min(1e-3),
            "f0_stats": torch.stack([voiced.mean(), voiced.std().clamp_min(1e-2)]),
            "energy_stats": torch.stack([energy.mean(), energy.std().clamp_min(1e-2)]),
        }

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the tokens and of some numbers of each spectrogram."""
        digest = hashlib.sha256("".join(self.symbols).encode())
        for clip in self.clips:
            digest.update(clip.tokens.numpy().tobytes() + f"{clip.frames} {float(clip.mel.mean()):.4f}".encode())
        return digest.hexdigest()[:16]


def corpus_features(clips: Sequence[Clip], settings: MelSettings, text: str, cache: Path | None = None) -> Corpus:
    """The features of clips; those that cannot be used are named and left out.

    Args:
        clips: of `open_corpus`.
        settings: of the spectrograms.
        text: kind of the front end, see `FrontEnd`.
        cache: a file to keep them in.

    Raises:
        BadInput: where no clip can be used.
    """
    key = hashlib.sha256(json.dumps([settings.to_dict(), text, [(c.name, c.text, c.speaker) for c in clips]]).encode())
    if cache is not None and cache.is_file() and (known := read_cache(cache, key.hexdigest())) is not None:
        return known
    front = FrontEnd(text)
    made, skipped = [], []
    for clip in clips:
        try:
            tokens = front(clip.text)
            audio = clip.read(settings.sample_rate)
            made.append((clip, tokens, audio))
        except BadInput as e:
            if "gruut" in str(e) or "soundfile" in str(e):
                raise
            skipped.append(f"{clip.name} ({e})")
    symbols = symbols_of([tokens for _, tokens, _ in made])
    number = {symbol: k for k, symbol in enumerate(symbols)}
    speakers = tuple(sorted({clip.speaker for clip, _, _ in made} - {""}))
    features = []
    for clip, tokens, audio in made:
        spectrum = mel(audio, settings)
        if len(tokens) > spectrum.shape[1]:
            skipped.append(f"{clip.name} ({len(tokens)} tokens in {spectrum.shape[1]} frames)")
            continue
        ids = torch.tensor([number[token] for token in tokens])
        f0, voiced = track_pitch(audio, settings)
        speaker = speakers.index(clip.speaker) if clip.speaker else 0
        features.append(Features(ids, spectrum, torch.where(voiced, f0, 0.0).float(), frame_energy(spectrum), speaker))
    if skipped:
        print_once(
            f"{len(skipped)} of {len(clips)} clips are not used: {', '.join(skipped[:3])}{', ...' * (len(skipped) > 3)}"
        )
    if not features:
        raise BadInput(f"none of the {len(clips)} clips can be used, the first one: {skipped[0]}")
    corpus = Corpus(features, symbols, speakers, settings, text)
    if cache is not None:
        write_cache(cache, key.hexdigest(), corpus)
    return corpus


def frame_energy(spectrum: Tensor) -> Tensor:
    """The log of the mean of a mel spectrum (..., M, L) -> (..., L)."""
    return spectrum.logsumexp(-2) - math.log(spectrum.shape[-2])


def write_cache(path: Path, key: str, corpus: Corpus) -> None:
    """Keep the features of a corpus in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "key": key, "symbols": corpus.symbols, "speakers": corpus.speakers, "settings": corpus.settings.to_dict(),
        "text": corpus.text, "clips": [vars(clip) for clip in corpus.clips],
    }  # fmt: skip
    scratch = path.with_name(f".{path.name}.part")
    torch.save(content, scratch)
    scratch.replace(path)


def read_cache(path: Path, key: str) -> Corpus | None:
    """The features kept in a file, where they are those of this key."""
    try:
        content = torch.load(path, weights_only=True)
    except Exception:  # a file of any kind, or half of one
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    clips = [Features(**clip) for clip in content["clips"]]
    settings = MelSettings.from_dict(content["settings"])
    return Corpus(clips, tuple(content["symbols"]), tuple(content["speakers"]), settings, content["text"])
