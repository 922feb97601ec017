"""Mel spectrograms and sound files."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from hasten.audio.files import encode_audio, read_audio, resample, write_audio
from hasten.audio.mel import MelSettings, frames_of, mel, mel_filters, spectrogram, stft
from hasten.errors import BadInput
from hasten.utils.mel_scale import slaney_hz, slaney_mel


def tone(hz: float, seconds: float = 0.5, rate: int = 16000) -> torch.Tensor:
    return 0.5 * torch.sin(2 * math.pi * hz * torch.arange(int(seconds * rate)) / rate)


def test_the_scale_has_the_published_frequencies() -> None:
    """The table in the documentation of librosa's mel_frequencies(n_mels=40)."""
    published = [0.0, 85.317, 170.635, 255.952, 938.49, 1024.856, 1119.114, 2071.84, 4994.285, 10096.408, 11025.0]
    places = [0, 1, 2, 3, 11, 12, 13, 20, 30, 38, 39]
    high = slaney_mel(11025.0)
    assert [round(slaney_hz(high * k / 39), 3) for k in places] == pytest.approx(published, abs=2e-3)
    assert slaney_mel(440.0) == pytest.approx(6.6)


def test_filters_have_equal_areas_or_peaks() -> None:
    areas = mel_filters(MelSettings(n_fft=8192)).sum(1) * 16000 / 8192
    assert torch.allclose(areas, torch.ones(80), atol=0.02)  # Slaney's norm: an integral of 1 over Hz
    peaks = mel_filters(MelSettings(n_fft=8192, norm="none", scale="htk")).amax(1)
    assert (peaks > 0.9).all() and (peaks <= 1).all()


def test_the_spectrogram_is_that_of_a_plain_transform() -> None:
    settings = MelSettings(n_fft=64, hop=16, mels=8, padding="center")
    x = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = np.pad(x.numpy(), 32, mode="reflect")
    window = np.hanning(65)[:-1]
    frames = np.stack([np.fft.rfft(window * padded[k * 16 : k * 16 + 64]) for k in range(13)], 1)
    assert frames_of(200, settings) == 13
    assert np.allclose(stft(x, settings).numpy(), frames)
    expected = np.log(np.maximum(mel_filters(settings).numpy() @ np.abs(frames), 1e-5))
    assert np.allclose(mel(x, settings).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("hz", [200.0, 1000.0, 3000.0])
def test_a_tone_is_loudest_in_its_band(hz: float) -> None:
    settings = MelSettings()
    band = mel(tone(hz), settings)[:, 15].argmax().item()
    step = slaney_mel(8000.0) / 81
    assert abs(slaney_hz((band + 1) * step) - hz) < slaney_hz((band + 2) * step) - slaney_hz((band + 1) * step)


def test_frames_of_any_length_and_shape() -> None:
    for padding in ("same", "center"):
        settings = MelSettings(padding=padding)
        for n in (1, 255, 256, 257, 1000, 5000):
            assert mel(torch.zeros(2, 3, n), settings).shape == (2, 3, 80, frames_of(n, settings))
    assert frames_of(256, MelSettings()) == 1 and frames_of(257, MelSettings()) == 2
    x = torch.zeros(2000, requires_grad=True)
    mel(x).sum().backward()  # silence has a gradient
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert torch.equal(spectrogram(tone(300)), spectrogram(torch.stack([tone(300)] * 2))[1])


def test_refused_settings() -> None:
    for values in ({"fmax": 9000.0}, {"fmin": 5000.0, "fmax": 4000.0}, {"hop": 0}, {"scale": "bark"}, {"hop": 255}):
        with pytest.raises(BadInput):
            MelSettings(**values)
    with pytest.raises(BadInput, match="hop"):
        MelSettings.from_dict({"hopp": 1})
    with pytest.raises(BadInput, match="audio"):
        mel(torch.zeros(0))
    assert MelSettings.from_dict(MelSettings(hop=200).to_dict()) == MelSettings(hop=200)
    assert MelSettings(sample_rate=22050, fmax=0).fmax == 11025


def test_files_return_what_was_written(tmp_path) -> None:
    x = tone(440.0, 0.1)
    for name in ("a.wav", "a.flac"):
        back, rate = read_audio(write_audio(tmp_path / name, x, 16000))
        assert rate == 16000 and (back - x).abs().max() < 2 / 32768
    stereo = torch.stack([x, -x / 2])
    back, _ = read_audio(io.BytesIO(encode_audio(stereo, 16000)))
    assert (back - x / 4).abs().max() < 2 / 32768
    assert read_audio(encode_audio(3 * x, 16000))[0].max() <= 1


def test_files_that_are_no_sound_are_refused(tmp_path) -> None:
    (tmp_path / "x.wav").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"x\.wav"):
        read_audio(tmp_path / "x.wav")
    with pytest.raises(BadInput, match="no file"):
        read_audio(tmp_path / "y.wav")
    with pytest.raises(BadInput, match="flac"):
        write_audio(tmp_path / "a.mp3", tone(440.0), 16000)
    with pytest.raises(BadInput, match="NaN"):
        write_audio(tmp_path / "a.wav", torch.full((10,), math.nan), 16000)
    with pytest.raises(BadInput, match="no samples"):
        read_audio(encode_audio(torch.zeros(0), 16000))
    assert not (tmp_path / "a.wav").exists()


def test_resampling_keeps_a_tone() -> None:
    slow = resample(tone(440.0, 0.5), 16000, 22050)
    assert slow.shape == (11025,)
    assert (slow - tone(440.0, 0.5, 22050))[500:-500].abs().max() < 1e-2
