"""Read texts aloud into files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..audio.files import encode_audio, write_audio
from ..errors import BadInput, check_int
from ..files import check_writable, write_file
from ..progress import ignore_messages
from ..tasks.speech.speech import PAUSE, Speech, Spoken

__all__ = ["SpeakRequest", "speak_texts"]

SUFFIXES = (".wav", ".flac", ".ogg")


@dataclass(frozen=True)
class SpeakRequest:
    """How to read aloud.

    Args:
        out: a sound file; a folder, for a file each sentence, each written as soon as it is made; or `-`: samples of
            16 bits, little-endian, one channel, on the standard output, as soon as they are made.
        steps: model evaluations; None: those of the model.
        speed: > 1 is faster.
        seed: of the noise.
        speaker: a name; None: the first one.
        options: further ones of `SamplingConfig`, such as `sampler`.
    """

    out: str | Path = "speech.wav"
    steps: int | None = None
    speed: float = 1.0
    seed: int = 0
    speaker: str | None = None
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_int("steps", self.steps, 1)
        if str(self.out) != "-" and Path(self.out).suffix and Path(self.out).suffix.lower() not in SUFFIXES:
            raise BadInput(
                f"cannot write sound as {Path(self.out).suffix!r}: name the file .wav, .flac or .ogg, or name a folder"
            )


def speak_texts(
    speech: Speech,
    texts: str | Iterable[str],
    request: SpeakRequest | None = None,
    log: Callable[[str], None] = ignore_messages,
    stream: BinaryIO | None = None,
) -> dict[str, Any]:
    """Read texts aloud, one sentence after the other.

    Args:
        speech: the model with its vocoder.
        texts: a text, or an iterable of them, such as the lines of an open file; each is read when it is needed.
        request: where to write and how to speak.
        log: called with a line for each sentence of a folder.
        stream: for `-`. Default: the standard output.

    Returns:
        `files`, `sentences`, `seconds_of_sound`, `seconds` of computing (total, and `text`, `acoustic`, `vocoder`),
        `times_real_time` and `first_sound_seconds`, from the call to the first sentence.

    Raises:
        BadInput: where there is nothing to say, and for settings and places that cannot be.
    """
    request = request or SpeakRequest()
    start = time.perf_counter()
    out = Path(request.out)
    raw = str(request.out) == "-"
    single = bool(out.suffix) and not raw
    if raw:
        stream = stream or sys.stdout.buffer
    elif single:
        check_writable(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
    rate = speech.sample_rate
    pieces, files, first = [], [], None
    seconds = dict.fromkeys(("text", "acoustic", "vocoder"), 0.0)
    samples = count = 0
    for spoken in spoken_sentences(speech, [texts] if isinstance(texts, str) else texts, request):
        first = time.perf_counter() - start if first is None else first
        samples, count = samples + len(spoken.audio), count + 1
        seconds = {name: value + spoken.seconds[name] for name, value in seconds.items()}
        if raw:
            assert stream is not None
            pause = torch.zeros(int(PAUSE * rate) if count > 1 else 0)
            words = (torch.cat([pause, spoken.audio]).clamp(-1, 1) * 32767).round().to(torch.int16)
            stream.write(words.numpy().astype("<i2").tobytes())
            stream.flush()
        elif single:
            pieces += [torch.zeros(int(PAUSE * rate)), spoken.audio] if count > 1 else [spoken.audio]
        else:
            files.append(str(out / f"{count:04}.wav"))
            write_file(check_writable(Path(files[-1])), encode_audio(spoken.audio, rate))
            log(f"{files[-1]}: {spoken.text}")
    if not count:
        raise BadInput("nothing to say: a text needs letters or digits")
    if single:
        write_audio(out, torch.cat(pieces), rate)
        files.append(str(out))
    total = time.perf_counter() - start
    return {
        "files": files,
        "sentences": count,
        "seconds_of_sound": round(samples / rate, 3),
        "seconds": {"total": total, **seconds},
        "times_real_time": samples / rate / sum(seconds.values()),
        "first_sound_seconds": first,
    }


def spoken_sentences(speech: Speech, texts: Iterable[str], request: SpeakRequest) -> Iterator[Spoken]:
    """The sentences of all texts; texts without anything to say are left out."""
    how = {"steps": request.steps, "speed": request.speed, "seed": request.seed, "speaker": request.speaker}
    for text in texts:
        yield from speech.sentences(text, allow_empty=True, **how, **(request.options or {}))
