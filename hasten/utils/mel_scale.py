"""Mel scales and filters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["htk_hz", "htk_mel", "mel_filter_bank", "slaney_hz", "slaney_mel"]


def mel_filter_bank(
    sample_rate: int, n_fft: int, mels: int, limits: tuple[float, float], scale: str = "slaney", norm: str = "slaney"
) -> Tensor:
    """The filters (M, n_fft / 2 + 1), float32: triangles between M + 2 frequencies at equal distances on the scale.

    Args:
        sample_rate: in Hz.
        n_fft: size of the transform.
        mels: M.
        limits: lowest and highest frequency in Hz.
        scale: `slaney` (linear below 1 kHz), or `htk`.
        norm: `slaney`, equal areas, or `none`, equal peaks.

    References:
        Slaney 1998, Auditory Toolbox.
    """
    to_mel, to_hz = SCALES[scale]
    low, high = to_mel(limits[0]), to_mel(limits[1])
    edges = [to_hz(low + (high - low) * k / (mels + 1)) for k in range(mels + 2)]
    hz = torch.tensor(edges, dtype=torch.float64)
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    rising = (bins[None] - hz[:-2, None]) / (hz[1:-1] - hz[:-2])[:, None]
    falling = (hz[2:, None] - bins[None]) / (hz[2:] - hz[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp_min(0)
    if norm == "slaney":
        filters = filters * (2 / (hz[2:] - hz[:-2]))[:, None]
    return filters.float()


def slaney_mel(hz: float) -> float:
    """Slaney's scale: `3 f / 200` below 1 kHz, `15 + 27 log(f / 1000) / log 6.4` above."""
    return 3 * hz / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def slaney_hz(value: float) -> float:
    """The inverse of `slaney_mel`."""
    return 200 * value / 3 if value < 15 else 1000 * 6.4 ** ((value - 15) / 27)


def htk_mel(hz: float) -> float:
    """The HTK scale: `2595 log10(1 + f / 700)`."""
    return 2595 * math.log10(1 + hz / 700)


def htk_hz(value: float) -> float:
    """The inverse of `htk_mel`."""
    return 700 * (10 ** (value / 2595) - 1)


SCALES = {"slaney": (slaney_mel, slaney_hz), "htk": (htk_mel, htk_hz)}
