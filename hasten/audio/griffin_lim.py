"""Sound from a mel spectrogram without a network."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import BadInput, check_int, check_number
from ..utils.stft import inverse_stft, short_time_fourier
from .mel import MelSettings, mel_filters

__all__ = ["GriffinLim", "linear_magnitudes"]


@dataclass(frozen=True)
class GriffinLim:
    """The fast Griffin-Lim algorithm on magnitudes from the pseudo-inverse of the mel filters.

    Phases alternate between what the magnitudes ask for and what is the transform of a signal:
    `t_k = P(c_{k-1})`, `c_k = t_k + momentum (t_k - t_{k-1})`, where P sets the magnitudes and then takes the transform
    of the inverse transform.

    Args:
        settings: of the mel spectrogram.
        iterations: at least 1.
        momentum: in [0, 1); 0 is the original algorithm.
        seed: of the first phases.

    Raises:
        BadInput: for a value out of range.

    References:
        Griffin, Lim 1984, IEEE Trans. ASSP 32; Perraudin, Balazs, Sondergaard 2013, WASPAA (momentum).
    """

    settings: MelSettings = field(default_factory=MelSettings)
    iterations: int = 60
    momentum: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("iterations", self.iterations, 1)
        if not 0 <= check_number("momentum", self.momentum) < 1:
            raise BadInput(f"momentum must be in [0, 1), got {self.momentum}")

    @torch.no_grad()
    def __call__(self, mel: Tensor, f0: Tensor | None = None) -> Tensor:
        """Audio (..., n) of log mel (..., M, L): n = L hop with the padding `same`. `f0` is not used."""
        check_mel(mel, self.settings)
        lead = mel.shape[:-2]
        target = linear_magnitudes(mel.float().reshape(-1, *mel.shape[-2:]), self.settings)
        n_fft, hop, padding = self.settings.n_fft, self.settings.hop, self.settings.padding
        frames = target.shape[-1]
        if padding == "center" and frames < 2:
            raise BadInput(f"Griffin-Lim with the padding 'center' needs two frames or more, got {frames}")
        phases = torch.rand(target.shape, generator=torch.Generator().manual_seed(self.seed)).to(target)
        spectrum = torch.polar(target, 2 * torch.pi * phases)
        before = torch.zeros_like(spectrum)
        for _ in range(self.iterations):
            audio = inverse_stft(spectrum, n_fft, hop, padding)
            now = short_time_fourier(audio, n_fft, hop, padding)
            ahead = now + self.momentum * (now - before)
            spectrum, before = target * ahead / ahead.abs().clamp_min(1e-12), now
        return inverse_stft(spectrum, n_fft, hop, padding).reshape(*lead, -1)


def linear_magnitudes(mel: Tensor, settings: MelSettings, iterations: int = 30) -> Tensor:
    """Magnitudes (..., n_fft / 2 + 1, L) of log mel (..., M, L): the pseudo-inverse, then multiplicative updates to
    the least squares of magnitudes that are not negative.

    References:
        Lee, Seung 2001, Algorithms for non-negative matrix factorization, NIPS.
    """
    power, filters = mel.exp(), mel_filters(settings).to(mel)
    x = (inverse_filters(settings).to(mel) @ power).clamp_min(1e-7)
    x = x * (filters.sum(0) > 0)[:, None]
    above = filters.T @ power
    for _ in range(iterations):
        x = x * above / (filters.T @ (filters @ x)).clamp_min(1e-12)
    return x


@functools.lru_cache(maxsize=8)
def inverse_filters(settings: MelSettings) -> Tensor:
    """The pseudo-inverse (n_fft / 2 + 1, M) of the mel filters, float32."""
    return torch.linalg.pinv(mel_filters(settings).double()).float()


def check_mel(mel: Tensor, settings: MelSettings) -> None:
    """Raise BadInput unless `mel` is (..., M, L) with L > 0."""
    if mel.ndim < 2 or mel.shape[-2] != settings.mels or not mel.shape[-1]:
        raise BadInput(f"the vocoder needs a log mel (..., {settings.mels}, L), got {tuple(mel.shape)}")
