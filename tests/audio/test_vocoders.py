"""Griffin-Lim, the networks that make sound, and their files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hasten.audio.griffin_lim import GriffinLim, linear_magnitudes
from hasten.audio.mel import MelSettings, mel, spectrogram
from hasten.audio.vocoder import Vocoder, load_vocoder
from hasten.errors import BadInput
from hasten.nets.harmonic_vocos import HarmonicVocos, PitchHead, pulse_train
from hasten.nets.hifigan import HiFiGAN
from hasten.nets.vocos import Vocos
from hasten.utils.stft import inverse_stft, short_time_fourier

from .test_pitch import voice

SMALL = {"dim": 16, "hidden": 24, "layers": 2}


def speech(seconds: float = 0.6) -> Tensor:
    """A voice of gliding pitch, then noise, then silence."""
    n = int(seconds * 16000) // 3
    glide = voice(150 * 2 ** (torch.arange(n) / 16000))
    noise = 0.05 * torch.randn(n, generator=torch.Generator().manual_seed(0))
    return torch.cat([glide, noise, torch.zeros(n)])


def harmonic(**options) -> HarmonicVocos:
    torch.manual_seed(0)
    return HarmonicVocos(**SMALL, **options).eval()


@pytest.mark.parametrize("padding", ["same", "center"])
def test_the_inverse_transform_inverts(padding: str) -> None:
    x = torch.randn(2, 1280, dtype=torch.float64)
    assert torch.allclose(inverse_stft(short_time_fourier(x, 256, 64, padding), 256, 64, padding), x, atol=1e-9)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_griffin_lim_returns_the_spectrogram() -> None:
    x = speech()
    voiced = torch.hann_window(12800) * voice(180 * 2 ** (torch.arange(12800) / 32000))
    made = GriffinLim()(mel(x))
    assert made.shape == (math.ceil(len(x) / 256) * 256,)
    assert correlation(spectrogram(GriffinLim()(mel(voiced))[: len(voiced)]), spectrogram(voiced)) > 0.9
    target = linear_magnitudes(mel(x), MelSettings())
    found = [correlation(spectrogram(GriffinLim(iterations=n)(mel(x))), target) for n in (1, 60)]
    assert found[1] > 0.97 > found[0]  # iterations help
    assert GriffinLim()(torch.stack([mel(x)] * 2)[:, None]).shape == (2, 1, len(made))


def test_pulses_are_the_sum_of_all_harmonics() -> None:
    phase = torch.tensor([[0.3]])
    made = pulse_train(torch.full((1, 4), 210.0), 256, 16000, phase)
    turns = 210 * torch.arange(1, 1025, dtype=torch.float64) / 16000 + phase.double()
    count = 16000 // 420
    expected = (2 / count) ** 0.5 * sum(torch.cos(2 * math.pi * k * turns) for k in range(1, count + 1))
    assert torch.allclose(made.double(), expected, atol=1e-3)


def test_an_untrained_harmonic_vocoder_sounds_like_its_mel() -> None:
    """It begins from the mel itself: trained weights only add to that. A flat source would be 1.5 off."""
    x = speech()
    made = Vocoder(harmonic(), MelSettings())(mel(x))
    inside = slice(2, -2)
    assert (mel(made) - mel(x))[:, inside].abs().mean() < 0.6
    uncorrected = Vocoder(harmonic(corrections=0), MelSettings())(mel(x))
    assert (mel(made) - mel(x)).abs().mean() < 0.8 * (mel(uncorrected) - mel(x)).abs().mean()


def test_the_pitch_is_that_asked_for() -> None:
    net = harmonic(corrections=0)
    with torch.no_grad():
        net.head.out.bias.view(2, 3, -1)[:, 2] = -30  # no noise
        made = net(torch.zeros(1, 80, 40), torch.full((1, 40), 187.5))[0]
    power = torch.fft.rfft(made[1024:-1024] * torch.hann_window(8192)).abs()
    peak = power[: 8192 * 300 // 16000].argmax() * 16000 / 8192
    assert abs(float(peak) - 187.5) < 3


def test_a_batch_is_its_clips_and_draws_repeat() -> None:
    vocoder = Vocoder(harmonic(), MelSettings())
    x = mel(speech())
    both = torch.stack([x, x + 0.5])
    assert torch.allclose(vocoder(both)[1], vocoder(both[1]), atol=1e-3)
    assert torch.equal(vocoder(x), vocoder(x))
    torch.manual_seed(0)
    first = vocoder.net(x[None], seed=None)
    assert not torch.equal(first, vocoder.net(x[None], seed=None))


def test_the_pitch_head_reads_what_it_was_taught() -> None:
    head = PitchHead(129, 60.0, 500.0)
    with torch.no_grad():
        head.out.weight.copy_(10 * torch.eye(129))
        head.out.bias.zero_()
    f0 = torch.tensor([[100.0, 101.0, 102.0, 103.0, 200.0, 300.0, 104.0, 105.0]])
    voiced = torch.tensor([[True, True, True, True, False, False, True, True]])
    step = (math.log(500) - math.log(60)) / 127
    place = ((f0.log() - math.log(60)) / step).round().long()
    features = torch.nn.functional.one_hot(torch.where(voiced, place, 128), 129).float()
    read = head(features)
    assert (read[voiced] / f0[voiced] - 1).abs().max() < 0.03
    assert ((read > 98) & (read < 108)).all()  # unvoiced frames between their neighbours
    assert head.loss(features, f0, voiced) < 0.01 < head.loss(features, f0 * 1.2, voiced)


def test_a_saved_vocoder_loads(tmp_path) -> None:
    vocoder = Vocoder(harmonic(frames=4), MelSettings(), {"steps": 3})
    vocoder.save(tmp_path / "v", half=False)
    again = load_vocoder(tmp_path / "v")
    assert isinstance(again, Vocoder) and again.card == {"steps": 3} and again.settings == vocoder.settings
    x = mel(speech())
    assert torch.equal(again(x), vocoder(x))
    vocoder.save(tmp_path / "h")
    half = load_vocoder(tmp_path / "h")
    assert (half(x) - vocoder(x)).abs().max() < 0.02
    with pytest.raises(BadInput, match="80"):
        again(x[:40])
    with pytest.raises(BadInput, match="f0"):
        again(x, torch.zeros(x.shape[1]))
    (tmp_path / "h" / "vocoder.safetensors").write_bytes(b"no")
    with pytest.raises(BadInput, match="vocoder.safetensors"):
        load_vocoder(tmp_path / "h")
    with pytest.raises(BadInput, match="griffin_lim"):
        load_vocoder(tmp_path / "nothing")
    assert isinstance(load_vocoder("griffin_lim"), GriffinLim)


def hifigan_folder(folder, block: str, parametrised: bool = False) -> HiFiGAN:
    """A made HiFi-GAN as it is published: weights as g and v, in `generator`, beside config.json."""
    torch.manual_seed(1)
    dilations = [[1, 3], [1, 2]]
    net = HiFiGAN(20, 16, (4, 4), (8, 8), (3, 5), dilations, block)
    weights = {}
    for name, w in net.state_dict().items():
        if name.endswith("weight"):
            norm = w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1))
            stem = name.removesuffix("weight")
            first, second = (
                ("weight_g", "weight_v")
                if not parametrised
                else ("parametrizations.weight.original0", "parametrizations.weight.original1")
            )
            weights |= {stem + first: norm, stem + second: 3 * w}
        else:
            weights[name] = w
    folder.mkdir()
    torch.save({"generator": weights}, folder / "g_00000001")
    config = {
        "resblock": block, "upsample_rates": [4, 4], "upsample_kernel_sizes": [8, 8], "upsample_initial_channel": 16,
        "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": dilations, "num_mels": 20, "n_fft": 64,
        "hop_size": 16, "win_size": 64, "sampling_rate": 22050, "fmin": 0, "fmax": 8000, "batch_size": 16,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return net


@pytest.mark.parametrize(("block", "parametrised"), [("1", False), ("2", True)])
def test_a_published_hifigan_loads(tmp_path, block: str, parametrised: bool) -> None:
    net = hifigan_folder(tmp_path / "hifi", block, parametrised)
    loaded = load_vocoder(tmp_path / "hifi")
    assert isinstance(loaded, Vocoder) and loaded.sample_rate == 22050 and loaded.settings.fmax == 8000
    x = torch.randn(20, 9)
    assert loaded(x).shape == (9 * 16,)
    assert torch.allclose(loaded(x), net(x[None])[0].detach(), atol=1e-5)
    loaded.save(tmp_path / "own", half=False)
    assert torch.equal(load_vocoder(tmp_path / "own")(x), loaded(x))


def test_a_published_vocos_loads_and_is_the_published_formula(tmp_path) -> None:
    torch.manual_seed(2)
    net = Vocos(12, 16, 24, 2, 64, 16, "center")
    extra = {
        "feature_extractor.mel_spec.spectrogram.window": torch.hann_window(64),
        "head.istft.window": torch.hann_window(64),
    }
    save_file({**net.state_dict(), **extra}, tmp_path / "model.safetensors")
    loaded = load_vocoder(tmp_path)
    assert isinstance(loaded, Vocoder) and loaded.settings == MelSettings(
        24000, 64, 16, 12, 0, 12000, 1e-7, "htk", "none", "center"
    )
    x = torch.randn(12, 10)
    magnitude, phase = net.head(net.backbone(x[None])).transpose(1, 2).chunk(2, 1)
    spectrum = magnitude.exp().clamp(max=100) * (phase.cos() + 1j * phase.sin())
    expected = torch.istft(spectrum, 64, 16, window=torch.hann_window(64), center=True)
    assert torch.allclose(loaded(x), expected[0].detach(), atol=1e-5)


def test_weights_of_another_kind_are_refused(tmp_path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(BadInput, match="neither a HiFi-GAN"):
        load_vocoder(tmp_path)
    hifigan_folder(tmp_path / "hifi", "1")
    (tmp_path / "hifi" / "config.json").unlink()
    with pytest.raises(BadInput, match=r"config\.json"):
        load_vocoder(tmp_path / "hifi")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no vocoder"):
        load_vocoder(tmp_path / "empty")
