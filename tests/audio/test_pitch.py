"""The pitch tracker on sounds of known pitch."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.audio.mel import MelSettings, frames_of, mel
from hasten.audio.pitch import track_pitch
from hasten.errors import BadInput


def voice(f0: torch.Tensor, rate: int = 16000) -> torch.Tensor:
    """Harmonics 1/k of a frequency (n,) in Hz, below 4 kHz."""
    phase = 2 * math.pi * (f0.double() / rate).cumsum(0)
    parts = [torch.sin(k * phase) / k * (k * f0 < 4000) for k in range(1, 30)]
    return (0.2 * torch.stack(parts).sum(0)).float()


@pytest.mark.parametrize("hz", [75.0, 130.0, 220.0, 410.0])
@pytest.mark.parametrize("padding", ["same", "center"])
def test_a_steady_pitch_is_found_to_one_percent(hz: float, padding: str) -> None:
    settings = MelSettings(padding=padding)
    x = voice(torch.full((8000,), hz)) + 0.01 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    f0, voiced = track_pitch(x, settings)
    assert f0.shape == voiced.shape == (mel(x, settings).shape[-1],)
    inner = slice(3, -3)
    assert voiced[inner].all()
    assert (f0[inner] / hz - 1).abs().max() < 0.01  # no octave errors among them


def test_a_glide_is_followed_in_time() -> None:
    """A frame's pitch is that at its own middle: a frame early or late would be 2 % off."""
    f0 = 100 * 2 ** (torch.arange(12000) / 16000 * 2)
    found, _ = track_pitch(voice(f0), MelSettings())
    centres = torch.arange(frames_of(12000, MelSettings())) * 256 + 128
    expected = f0[centres.clamp_max(11999)]
    assert (found / expected - 1)[4:-4].abs().max() < 0.012


def test_noise_and_silence_are_unvoiced() -> None:
    noise = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(1))
    x = torch.cat([voice(torch.full((8000,), 200.0)), noise, torch.zeros(8000), voice(torch.full((8000,), 150.0))])
    f0, voiced = track_pitch(x)
    seconds = torch.arange(len(f0)) * 0.016

    def inside(a, b):
        return (seconds > a + 0.05) & (seconds < b - 0.05)

    assert voiced[inside(0, 0.5)].all() and voiced[inside(1.5, 2)].all()
    assert voiced[inside(0.5, 1.5)].float().mean() < 0.05
    assert ((f0 > 145) & (f0 < 205)).all()  # what is unvoiced lies between
    silent, nothing = track_pitch(torch.zeros(3000))
    assert not nothing.any() and not silent.any()


def test_refused() -> None:
    with pytest.raises(BadInput, match="low"):
        track_pitch(torch.zeros(1000), low=300, high=200)
    with pytest.raises(BadInput, match="audio"):
        track_pitch(torch.zeros(2, 1000))
