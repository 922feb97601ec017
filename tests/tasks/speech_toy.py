"""A made-up language: each letter has a spectrum of its own, said at a random pitch for a random number of frames."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from hasten.audio.mel import MelSettings
from hasten.tasks.speech.features import ClipFeatures, Corpus, frame_energy
from hasten.tasks.speech.text import SPECIAL

LETTERS = "abcdefgh"
SYMBOLS = (*SPECIAL, *LETTERS)
SETTINGS = MelSettings(sample_rate=8000, n_fft=512, hop=128, mels=20, fmax=4000.0)


def template(letter: int, mels: int) -> Tensor:
    """The spectrum of a letter: two formants, (M,)."""
    m = torch.arange(mels, dtype=torch.float32)
    first, second = 2 + 1.1 * (letter % 4), mels * 0.5 + 1.7 * (letter // 4) + letter % 3
    return -6 + 4 * torch.exp(-((m - first) ** 2) / 4) + 3 * torch.exp(-((m - second) ** 2) / 6)


def toy_clip(seed: int, count: int = 8, mels: int = 20, low: int = 3, high: int = 8) -> ClipFeatures:
    """A clip with the true frames of its tokens."""
    draw = torch.Generator().manual_seed(seed)
    letters = torch.randint(len(LETTERS), (count,), generator=draw)
    for k in range(1, count):  # no letter twice in a row, whose border cannot be heard
        if letters[k] == letters[k - 1]:
            letters[k] = (letters[k] + 1) % len(LETTERS)
    tokens = torch.cat([torch.tensor([1]), letters + len(SPECIAL), torch.tensor([2])])
    durations = torch.randint(low, high + 1, (len(tokens),), generator=draw)
    f0 = 100 + 80 * torch.rand((), generator=draw)
    m = torch.arange(mels, dtype=torch.float32)
    ripple = 0.7 * torch.cos(2 * math.pi * m * f0 / 300)
    columns = []
    for token, frames in zip(tokens.tolist(), durations.tolist()):
        silent = token < len(SPECIAL)
        spectrum = torch.full((mels,), -9.0) if silent else template(token - len(SPECIAL), mels) + ripple
        columns.append(spectrum[:, None].expand(-1, frames))
    mel = torch.cat(columns, 1)
    mel = mel + 0.2 * torch.randn(mel.shape, generator=draw)
    heard = torch.repeat_interleave((tokens >= len(SPECIAL)).float(), durations)
    return ClipFeatures(tokens, mel, heard * f0, frame_energy(mel), durations)


def toy_corpus(clips: int = 24, **options: int) -> Corpus:
    """Some clips."""
    settings = MelSettings(sample_rate=8000, n_fft=512, hop=128, mels=options.get("mels", 20), fmax=4000.0)
    return Corpus([toy_clip(seed, **options) for seed in range(clips)], SYMBOLS, (), settings, "characters")


def write_corpus(folder: Path, clips: int = 4, header: bool = False, rate: int = 16000) -> Path:
    """A folder in the layout of LJSpeech, with sounds of sines."""
    from hasten.audio.files import write_audio

    (folder / "wavs").mkdir(parents=True)
    texts = ["Abba, cab.", "Dad had a bag?", "Beg a bed", "Face the cage!"]
    lines = ["id|text|speaker|split"] if header else []
    for k in range(clips):
        text = texts[k % len(texts)]
        t = torch.arange(int(rate * 0.12 * len(text))) / rate
        pitch = torch.tensor([150.0 + 40 * ord(letter) % 300 for letter in text]).repeat_interleave(int(rate * 0.12))
        write_audio(folder / "wavs" / f"c{k}.wav", 0.3 * torch.sin(2 * math.pi * pitch * t), rate)
        split = "test" if k == clips - 1 else "train"
        lines.append(f"c{k}|{text}|{'ab'[k % 2]}|{split}" if header else f"c{k}|{text}|{text.lower()}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder
