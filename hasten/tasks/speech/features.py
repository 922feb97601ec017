"""What the acoustic model is trained on: the spectrogram, pitch, energy and tokens of each clip."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...audio.corpus import Clip
from ...audio.mel import MelSettings, mel
from ...audio.pitch import track_pitch
from ...errors import BadInput
from ...nets.aligner import TokenAligner
from ...train.messages import print_once
from .alignment import fit_aligner
from .text import GAP, PAUSES, SPECIAL, FrontEnd, numbers_of, symbols_of

__all__ = ["Corpus", "ClipFeatures", "corpus_features"]


@dataclass(frozen=True)
class ClipFeatures:
    """A clip for training.

    Args:
        tokens: (T,) int64.
        mel: log mel (M, L), not yet standardised.
        f0: Hz, 0 where unvoiced, (L,).
        energy: log energy, not yet standardised, (L,).
        durations: frames of each token, (T,) int64.
        speaker: index.
    """

    tokens: Tensor
    mel: Tensor
    f0: Tensor
    energy: Tensor
    durations: Tensor
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
        aligner: that gave their durations; None: they were known.
    """

    clips: list[ClipFeatures]
    symbols: tuple[str, ...]
    speakers: tuple[str, ...]
    settings: MelSettings
    text: str = "phonemes"
    aligner: TokenAligner | None = None

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


def corpus_features(
    clips: Sequence[Clip],
    settings: MelSettings,
    text: str,
    cache: Path | None = None,
    symbols: tuple[str, ...] = (),
    aligner: TokenAligner | None = None,
) -> Corpus:
    """The features of clips; those that cannot be used are named and left out.

    Args:
        clips: of `open_corpus`.
        settings: of the spectrograms.
        text: kind of the front end, see `FrontEnd`.
        cache: a file to keep them in.
        symbols: the tokens of a model; none: those of the clips.
        aligner: of that model; None: one is trained on the clips.

    Raises:
        BadInput: where no clip can be used.
    """
    what = [settings.to_dict(), text, [(c.name, c.text, c.speaker) for c in clips]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    known = None if cache is None else read_features(cache, key)
    if known is not None and (not symbols or known.symbols == symbols):
        return known
    front = FrontEnd(text)
    read, skipped = [], []
    for clip in clips:
        try:
            read.append((clip, front(clip.text), clip.read(settings.sample_rate)))
        except BadInput as e:
            if "pip install" in str(e):
                raise
            skipped.append(f"{clip.name} ({e})")
    symbols = symbols or symbols_of([tokens for _, tokens, _ in read])
    if aligner is None:
        aligner = TokenAligner(
            len(symbols), settings.mels, len(SPECIAL), [symbols.index(token) for token in (GAP, PAUSES[0])]
        )
        fit: Any = functools.partial(fit_aligner, aligner)
    else:
        fit = aligner
    speakers = tuple(sorted({clip.speaker for clip, _, _ in read} - {""}))
    made = []
    for clip, tokens, audio in read:
        spectrum = mel(audio, settings)
        ids = torch.tensor(numbers_of(tokens, symbols))
        if aligner.minimum_frames(ids) > spectrum.shape[1]:
            skipped.append(f"{clip.name} ({len(tokens)} tokens in {spectrum.shape[1]} frames)")
            continue
        f0, voiced = track_pitch(audio, settings)
        f0 = torch.where(voiced, f0, 0.0).float()
        speaker = speakers.index(clip.speaker) if clip.speaker else 0
        made.append(ClipFeatures(ids, spectrum, f0, frame_energy(spectrum), torch.zeros_like(ids), speaker))
    if skipped:
        some = ", ".join(skipped[:3]) + ", ..." * (len(skipped) > 3)
        print_once(f"{len(skipped)} of {len(clips)} clips are not used: {some}")
    if not made:
        raise BadInput(f"none of the {len(clips)} clips can be used, the first one: {skipped[0]}")
    durations = fit([clip.tokens for clip in made], [clip.mel for clip in made])
    made = [replace(clip, durations=frames) for clip, frames in zip(made, durations)]
    corpus = Corpus(made, symbols, speakers, settings, text, aligner)
    if cache is not None:
        write_features(cache, key, corpus)
    return corpus


def frame_energy(spectrum: Tensor) -> Tensor:
    """The log of the mean of a mel spectrum (..., M, L) -> (..., L)."""
    return spectrum.logsumexp(-2) - math.log(spectrum.shape[-2])


def write_features(path: Path, key: str, corpus: Corpus) -> None:
    """Keep the features of a corpus in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "key": key, "symbols": corpus.symbols, "speakers": corpus.speakers, "settings": corpus.settings.to_dict(),
        "text": corpus.text, "aligner": None if corpus.aligner is None else corpus.aligner.state_dict(),
        "aligner_config": None if corpus.aligner is None else corpus.aligner.config,
        "clips": [vars(clip) for clip in corpus.clips],
    }  # fmt: skip
    scratch = path.with_name(f".{path.name}.part")
    torch.save(content, scratch)
    scratch.replace(path)


def read_features(path: Path, key: str) -> Corpus | None:
    """The features kept in a file, where they are those of this key."""
    try:
        content = torch.load(path, weights_only=True)
    except Exception:  # a file of any kind, or half of one
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    clips = [ClipFeatures(**clip) for clip in content["clips"]]
    settings = MelSettings.from_dict(content["settings"])
    aligner = None
    if content["aligner"] is not None:
        aligner = TokenAligner(**content["aligner_config"])
        aligner.load_state_dict(content["aligner"])
    return Corpus(clips, tuple(content["symbols"]), tuple(content["speakers"]), settings, content["text"], aligner)
