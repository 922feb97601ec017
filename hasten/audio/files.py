"""Sound files: WAV, FLAC and others that `soundfile` reads."""

from __future__ import annotations

import importlib.util
import io
from math import gcd
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import BadInput, check_int
from ..utils.atomic import write_atomic

__all__ = ["encode_audio", "read_audio", "resample", "write_audio"]

FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}


def soundfile() -> Any:
    """The module `soundfile`. Raises BadInput where it is not installed."""
    if importlib.util.find_spec("soundfile") is None:
        raise BadInput("reading and writing sound needs soundfile: pip install hasten[speech]")
    import soundfile

    return soundfile


def read_audio(source: str | Path | bytes | BinaryIO, sample_rate: int | None = None) -> tuple[Tensor, int]:
    """The sound of a file, as one channel (the mean of several).

    Args:
        source: a path, the bytes of a file, or a binary file that is open, such as a member of a zip.
        sample_rate: to resample to, in Hz. Default: the file's.

    Returns:
        The samples (n,), float32 in [-1, 1], and their rate in Hz.

    Raises:
        BadInput: for a file that is missing, empty or no sound.
    """
    sf = soundfile()
    name = str(source) if isinstance(source, (str, Path)) else getattr(source, "name", "the sound")
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise BadInput(f"there is no file {source}")
    file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        samples, rate = sf.read(str(file) if isinstance(file, Path) else file, dtype="float32", always_2d=True)
    except (sf.SoundFileError, RuntimeError, TypeError) as e:
        raise BadInput(f"{name} is no sound that soundfile reads: {e}") from e
    if not len(samples):
        raise BadInput(f"{name} holds no samples")
    audio = torch.from_numpy(samples.mean(1))
    if sample_rate is not None and sample_rate != rate:
        return resample(audio, rate, sample_rate), sample_rate
    return audio, int(rate)


def write_audio(path: str | Path, audio: Tensor, sample_rate: int) -> Path:
    """Write a sound as 16 bits, completely or not at all. The name says the format: .wav, .flac or .ogg.

    Args:
        path: to write.
        audio: (n,) or (channels, n) in [-1, 1]; what is beyond is clipped.
        sample_rate: in Hz.

    Raises:
        BadInput: for another ending, another shape, or samples that are not finite.
    """
    path = Path(path)
    write_atomic(path, encode_audio(audio, sample_rate, path.suffix.lower() or str(path)))
    return path


def encode_audio(audio: Tensor, sample_rate: int, suffix: str = ".wav") -> bytes:
    """The bytes of a sound file; as `write_audio`.

    Args:
        audio: (n,) or (channels, n) in [-1, 1].
        sample_rate: in Hz.
        suffix: .wav, .flac or .ogg.
    """
    if suffix not in FORMATS:
        raise BadInput(f"cannot write sound as {suffix!r}: name the file .wav, .flac or .ogg")
    check_int("sample_rate", sample_rate, 1)
    audio = audio.detach().float().cpu()
    if audio.ndim not in (1, 2):
        raise BadInput(f"audio must be (n,) or (channels, n), got {tuple(audio.shape)}")
    if not torch.isfinite(audio).all():
        raise BadInput("the sound holds NaN or infinity, and is not written")
    file = io.BytesIO()
    soundfile().write(file, audio.clamp(-1, 1).numpy().T, sample_rate, format=FORMATS[suffix])
    return file.getvalue()


def resample(audio: Tensor, rate: int, new_rate: int) -> Tensor:
    """Audio (..., n) of `rate` Hz at `new_rate` Hz, by a polyphase filter: ceil(n new_rate / rate) samples."""
    if rate == new_rate:
        return audio
    import numpy as np
    from scipy.signal import resample_poly

    common = gcd(check_int("rate", rate, 1), check_int("new_rate", new_rate, 1))
    out = resample_poly(audio.detach().cpu().numpy(), new_rate // common, rate // common, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(out)).to(audio)
