"""The short-time Fourier transform with a Hann window, and its inverse, for two conventions of padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["frame_count", "inverse_stft", "short_time_fourier"]


def frame_count(samples: int, hop: int, padding: str) -> int:
    """Frames of a signal: ceil(n / hop) with the padding `same`, floor(n / hop) + 1 with `center`."""
    return -(-samples // hop) if padding == "same" else samples // hop + 1


def short_time_fourier(x: Tensor, n_fft: int, hop: int, padding: str = "same") -> Tensor:
    """The complex transform (..., n_fft / 2 + 1, L) of a signal (..., n).

    Args:
        x: real, on any device.
        n_fft: samples of the window and of the transform.
        hop: samples between frames.
        padding: `same`, reflected by (n_fft - hop) / 2; `center`, reflected by n_fft / 2.
    """
    lead, n = x.shape[:-1], x.shape[-1]
    frames = frame_count(n, hop, padding)
    total, side = (frames * hop, (n_fft - hop) // 2) if padding == "same" else (n, n_fft // 2)
    # zeros after the end, and as many as a reflection needs where the sound is shorter than that
    x = F.pad(x.reshape(-1, n), (0, max(total, side + 1) - n))
    x = F.pad(x[:, None], (side, side), mode="reflect")[:, 0]
    window = torch.hann_window(n_fft, device=x.device, dtype=x.dtype)
    out = torch.stft(x, n_fft, hop, window=window, center=False, normalized=False, return_complex=True)
    return out[..., :frames].reshape(*lead, n_fft // 2 + 1, frames)


def inverse_stft(spectrum: Tensor, n_fft: int, hop: int, padding: str = "same") -> Tensor:
    """The signal whose transform is nearest to `spectrum` in squares, by windowed overlap-add.

    Args:
        spectrum: complex (..., n_fft / 2 + 1, L).
        n_fft, hop, padding: as in `short_time_fourier`.

    Returns:
        (..., L hop) with `same`, (..., (L - 1) hop) with `center`.
    """
    lead, frames = spectrum.shape[:-2], spectrum.shape[-1]
    spectrum = spectrum.reshape(-1, *spectrum.shape[-2:])
    window = torch.hann_window(n_fft, device=spectrum.device, dtype=spectrum.real.dtype)
    parts = torch.fft.irfft(spectrum, n_fft, dim=1) * window[:, None]
    size = (frames - 1) * hop + n_fft
    stacked = torch.cat([parts, window.square()[None, :, None].expand(1, n_fft, frames)])
    out = F.fold(stacked, (1, size), (1, n_fft), stride=(1, hop))[:, 0, 0]
    side = (n_fft - hop) // 2 if padding == "same" else n_fft // 2
    out = out[:, side : size - side]
    return (out[:-1] / out[-1:].clamp_min(1e-8)).reshape(*lead, -1)
