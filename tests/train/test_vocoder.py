"""Training a vocoder."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.audio.corpus import Clip, open_corpus
from hasten.audio.files import write_audio
from hasten.audio.mel import MelSettings, mel
from hasten.audio.pitch import track_pitch
from hasten.audio.vocoder import load_vocoder
from hasten.cli import main
from hasten.errors import BadInput
from hasten.nets.audio_discriminators import AudioDiscriminators
from hasten.nets.harmonic_vocos import HarmonicVocos
from hasten.train.vocoder import VocoderBatches, VocoderLoss, feature_matching, spectral_distance
from hasten.workflows.vocoder import train_vocoder

TINY = {"dim": 8, "hidden": 8, "layers": 1, "frames": 10, "batch_size": 2, "lr": 3e-3}


def sound(hz: float, n: int = 4000) -> torch.Tensor:
    t = torch.arange(n) / 16000
    return 0.1 * torch.stack([torch.sin(2 * math.pi * k * hz * t) for k in range(1, 8)]).sum(0)


def clips(count: int = 3) -> list[Clip]:
    return [Clip(str(k), "a", read=lambda rate, k=k: sound(150.0 + 40 * k)) for k in range(count)]


def discriminators() -> AudioDiscriminators:
    torch.manual_seed(0)
    return AudioDiscriminators((2, 3), (256,), (4, 4), (4, 4))


def test_distances_are_zero_for_the_same_sound_and_see_another() -> None:
    x, y = sound(150)[None], sound(200)[None]
    assert spectral_distance(x, x) == 0 < spectral_distance(x, y)
    d = discriminators()
    assert feature_matching(d(x), d(x)) == 0 < feature_matching(d(x), d(y))
    assert spectral_distance(x, 0 * x) == pytest.approx(float(spectral_distance(x, 1e-9 * x)), abs=1e-3)


def test_the_adversarial_terms_point_opposite_ways() -> None:
    """Discriminators learn that x is real and the vocoder's sound is not; its gradient leaves them alone."""
    d, net = discriminators(), HarmonicVocos(dim=8, hidden=8, layers=1)
    loss = VocoderLoss(MelSettings(), d, mel=0, spectral=0, pitch=0, gan=1, features=0)
    x = sound(150, 2560)[None]
    f0, voiced = track_pitch(x[0])
    batch = {"x": x, "f0": f0[None], "voiced": voiced[None]}
    assert loss(net, batch) == 0  # before they have been trained at all
    optimiser = torch.optim.Adam(d.parameters(), 0.01)
    for _ in range(12):
        optimiser.zero_grad()
        loss.discriminator_loss(batch).backward()
        optimiser.step()
    d.zero_grad(set_to_none=True)
    real, fake = ([logits.mean() for logits, _ in d(y)] for y in (x, batch["made"]))
    assert all(a > b for a, b in zip(real, fake))
    own = loss(net, batch)
    logits = [logits for logits, _ in d(batch["made"])]
    assert own.item() == pytest.approx(float(sum((1 - one).relu().mean() for one in logits)) / 3, abs=1e-5)
    own.backward()
    assert all(p.grad is None for p in d.parameters()) and any(p.grad is not None for p in net.parameters())


def test_batches_are_pieces_of_the_sounds_with_their_pitch() -> None:
    sounds = [sound(150), sound(220, 1000)]
    pitches = [track_pitch(x) for x in sounds]
    batches = VocoderBatches(sounds, pitches, 256, frames=6, batch_size=5, seed=1)
    one, again = batches[3], batches[3]
    assert all(torch.equal(one[name], again[name]) for name in one) and not torch.equal(one["x"], batches[4]["x"])
    assert one["x"].shape == (5, 1536) and one["f0"].shape == one["voiced"].shape == (5, 6)
    piece = batches.piece(0, 0.5)
    first = next(k for k in range(16) if torch.equal(piece["x"], sounds[0][256 * k :][:1536]))
    assert torch.equal(piece["f0"], pitches[0][0][first : first + 6])
    short = batches.piece(1, 0.9)
    assert torch.equal(short["x"][:1000], sounds[1]) and not short["x"][1000:].any() and not short["voiced"][4:].any()
    with pytest.raises(BadInput, match="gan"):
        VocoderLoss(MelSettings(), gan=-1.0)


def test_a_run_repeats_and_is_resumed_by_the_same_settings_only(tmp_path) -> None:
    options = {**TINY, "gan_start": 0.4, "steps": 4}
    whole = train_vocoder(clips(), tmp_path / "a", show=False, **options)
    train_vocoder(clips(), tmp_path / "b", show=False, **{**options, "steps": 2, "gan_start": 0.4})
    more = train_vocoder(clips(), tmp_path / "b", show=False, **options)  # resumes from step 2
    assert more["last"]["step"] == whole["last"]["step"] == 4 and "discriminators" in whole["last"]
    with pytest.raises(BadInput, match="start"):
        train_vocoder(clips(), tmp_path / "b", show=False, **{**options, "gan_start": 0.8})
    with pytest.raises(BadInput, match="data"):
        train_vocoder(clips(2), tmp_path / "b", show=False, **options)
    train_vocoder(clips(), tmp_path / "c", show=False, **options)
    x = mel(sound(180))
    assert torch.equal(load_vocoder(tmp_path / "a")(x), load_vocoder(tmp_path / "c")(x))
    with pytest.raises(BadInput, match="harmonic_vocos"):
        train_vocoder(clips(), tmp_path / "x", network="wavenet", steps=1)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    net, loss = HarmonicVocos(dim=16, hidden=16, layers=1), VocoderLoss(MelSettings())
    sounds = [clip.read(16000) for clip in clips()]
    batches = VocoderBatches(sounds, [track_pitch(x) for x in sounds], 256, 10, 2)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for k in range(24):
        optimiser.zero_grad()
        value = loss(net, batches[k])
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4]), losses


def test_the_command_trains_on_a_folder(tmp_path, capsys) -> None:
    wavs = tmp_path / "data" / "wavs"
    wavs.mkdir(parents=True)
    for k in range(2):
        write_audio(wavs / f"c{k}.wav", sound(150 + 50 * k), 16000)
    (tmp_path / "data" / "metadata.csv").write_text("c0|one|one\nc1|two 2|two two\n")
    assert [clip.text for clip in open_corpus(tmp_path / "data")] == ["one", "two two"]
    config = tmp_path / "c.toml"
    config.write_text('[vocoder]\ndim = 8\nhidden = 8\nframes = 8\nnetwork = "vocos"\n')
    run = ["train", str(tmp_path / "data"), "--task", "vocoder", "--out", str(tmp_path / "out"), "--steps", "2", "--batch-size", "1", "--blocks", "1", "--gan-weight", "0", "--config", str(config), "--device", "cpu"]  # fmt: skip
    assert main(run) == 0
    assert "load_vocoder" in capsys.readouterr().out
    assert load_vocoder(tmp_path / "out")(mel(sound(150))).shape == (4096,)
    assert main([*run, "--channels", "3"]) == 1
    assert "--channels is not for --task vocoder" in capsys.readouterr().err
