"""Log-mel spectrograms in torch, without torchaudio or librosa."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, check_choices, check_field
from ..utils.mel_scale import mel_filter_bank
from ..utils.stft import frame_count, short_time_fourier

__all__ = ["MelSettings", "frames_of", "mel", "mel_filters", "spectrogram"]


@dataclass(frozen=True)
class MelSettings:
    """How a log-mel spectrogram is computed: `log max(floor, filters |STFT|)`, the natural logarithm.

    Args:
        sample_rate: in Hz.
        n_fft: samples of the Hann window and of the transform.
        hop: samples between frames, at most n_fft.
        mels: M, bands.
        fmin, fmax: lowest and highest frequency in Hz, `0 <= fmin < fmax <= sample_rate / 2`. fmax 0: sample_rate / 2.
        floor: smallest value before the logarithm.
        scale: of frequencies: `slaney` (linear below 1 kHz), or `htk`.
        norm: of filters: `slaney`, equal areas, or `none`, equal peaks.
        padding: `same`, reflected by (n_fft - hop) / 2, as HiFi-GAN: ceil(n / hop) frames; `center`, reflected by
            n_fft / 2, as librosa: floor(n / hop) + 1 frames.

    Raises:
        BadInput: for a value out of range.

    References:
        Slaney 1998, Auditory Toolbox (scale and norm); Kong et al. 2020, arXiv:2010.05646 (padding and logarithm).
    """

    sample_rate: int = 16000
    n_fft: int = 1024
    hop: int = 256
    mels: int = 80
    fmin: float = 0.0
    fmax: float = 8000.0
    floor: float = 1e-5
    scale: str = "slaney"
    norm: str = "slaney"
    padding: str = "same"

    def __post_init__(self) -> None:
        check_choices(self, scale=("slaney", "htk"), norm=("slaney", "none"), padding=("same", "center"))
        if self.fmax == 0:
            object.__setattr__(self, "fmax", self.sample_rate / 2)
        if not (self.sample_rate > 0 and self.mels > 0 and 0 < self.hop <= self.n_fft and self.floor > 0):
            raise BadInput(f"sample_rate, mels, hop and floor must be positive and hop at most n_fft, got {self}")
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise BadInput(
                f"fmin and fmax must be 0 <= fmin < fmax <= {self.sample_rate / 2:g}, half the sample rate, "
                f"got {self.fmin:g} and {self.fmax:g}"
            )
        if self.padding == "same" and (self.n_fft - self.hop) % 2:
            raise BadInput(f"padding 'same' needs an even n_fft - hop, got {self.n_fft} - {self.hop}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MelSettings:
        """The inverse of `to_dict`. Raises BadInput for an unknown field."""
        for name in values:
            check_field("MelSettings", name, cls.__dataclass_fields__)
        return cls(**values)


def mel(audio: Tensor, settings: MelSettings = MelSettings()) -> Tensor:
    """The log-mel spectrogram.

    Args:
        audio: (..., n) in [-1, 1].
        settings: see `MelSettings`.

    Returns:
        (..., M, L), with L = `frames_of(n, settings)`, in the dtype and on the device of `audio`.

    Raises:
        BadInput: for audio that is empty or no floating-point tensor.
    """
    filters = mel_filters(settings).to(audio.device, audio.dtype)
    return torch.log((filters @ spectrogram(audio, settings)).clamp_min(settings.floor))


def spectrogram(audio: Tensor, settings: MelSettings = MelSettings()) -> Tensor:
    """`|STFT|` (..., n_fft / 2 + 1, L) of audio (..., n), whose gradient is finite at 0."""
    parts = torch.view_as_real(stft(audio, settings))
    return (parts.square().sum(-1) + 1e-9).sqrt()


def stft(audio: Tensor, settings: MelSettings) -> Tensor:
    """The complex short-time Fourier transform (..., n_fft / 2 + 1, L) of audio (..., n), with a Hann window."""
    if not audio.is_floating_point() or not audio.ndim or not audio.shape[-1]:
        raise BadInput(f"audio must be a floating-point tensor (..., n), got {audio.dtype} {tuple(audio.shape)}")
    return short_time_fourier(audio, settings.n_fft, settings.hop, settings.padding)


def frames_of(samples: int, settings: MelSettings) -> int:
    """L, the number of frames of a signal of so many samples."""
    return frame_count(samples, settings.hop, settings.padding)


@functools.lru_cache(maxsize=8)
def mel_filters(settings: MelSettings) -> Tensor:
    """The filters (M, n_fft / 2 + 1), float32: triangles between M + 2 frequencies at equal distances on the scale."""
    s = settings
    return mel_filter_bank(s.sample_rate, s.n_fft, s.mels, (s.fmin, s.fmax), s.scale, s.norm)
