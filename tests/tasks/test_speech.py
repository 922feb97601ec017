"""Text to speech as a whole: training, the samplers of the paper, distillation, and reading aloud."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.audio.mel import MelSettings
from hasten.cli import main
from hasten.distillers._targets import ddim_path
from hasten.distillers.prodiff import prodiff_schedule
from hasten.errors import BadInput
from hasten.model.model import Model
from hasten.plan.draw import draw
from hasten.sampling import Count, Noise
from hasten.tasks import Speech
from hasten.tasks.speech.samples import SegmentDenoiser, speech_samples
from hasten.workflows.distill import distill_model
from hasten.workflows.quantize import quantize_model
from hasten.workflows.speak import SpeakRequest, speak_texts
from hasten.workflows.speech import train_speech
from hasten.workflows.tune import tune_model
from tests.tasks.speech_toy import toy_corpus

Folder = Path


class Tone:
    """A vocoder that makes a tone as long as the spectrogram."""

    def __init__(self, settings: MelSettings) -> None:
        self.settings, self.calls = settings, 0

    def __call__(self, mel: Tensor) -> Tensor:
        self.calls += 1
        return 0.1 * torch.sin(torch.arange(mel.shape[-1] * self.settings.hop) * 0.1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    out = tmp_path_factory.mktemp("speech") / "teacher"
    train_speech(toy_corpus(12), out, preset="tiny", steps=6, batch_size=4, lr=3e-3, device="cpu", show=False)
    return out


@pytest.fixture
def speech(teacher: Folder) -> Speech:
    made = Speech.load(teacher)
    made.vocoder = Tone(made.settings)
    return made


def test_a_trained_model_is_opened_by_load(teacher: Folder, speech: Speech) -> None:
    model = hasten.load(teacher)
    assert isinstance(model, Model) and model.shape == (20, 192) and set(model.parts) == {"encoder"}
    assert torch.equal(Speech(model).mel("abc bad"), speech.mel("abc bad"))
    assert torch.isfinite(model.sample(1)).all()  # any speech, without a text
    assert float(speech.encoder.mel_mean.abs().sum()) > 0
    again = train_speech(
        toy_corpus(12), teacher, preset="tiny", steps=6, batch_size=4, lr=3e-3, device="cpu", show=False
    )
    assert torch.equal(again.mel("abc bad"), speech.mel("abc bad"))
    with pytest.raises(BadInput, match="corpus"):
        train_speech(toy_corpus(11), teacher, preset="tiny", steps=6, batch_size=4, lr=3e-3, device="cpu", show=False)


def test_the_teacher_samples_from_the_posterior(speech: Speech) -> None:
    """x_i ~ q(x_{i-1} | x_i, x0) at i = 3, 2, 1, 0 of the 5 entries, from plain noise."""
    ids = speech.front.ids("bad cab")
    v = speech.encoder(torch.tensor([ids]))
    noise = Noise([5], (20, v.frames.shape[1]), torch.float32, torch.device("cpu"))
    abar = torch.tensor(prodiff_schedule().alphas_cumprod, dtype=torch.float64)
    z, net = noise.initial(), speech.model.denoiser.net
    with torch.no_grad():
        for i in (3, 2, 1, 0):
            x0 = net(z.float(), torch.tensor([float(i)]), v.frames, v.mask)
            if i == 0:
                break
            beta = 1 - abar[i] / abar[i - 1]
            mean = abar[i - 1].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - abar[i - 1]) * z
            z = mean / (1 - abar[i]) + (beta * (1 - abar[i - 1]) / (1 - abar[i])).sqrt() * noise()
    assert torch.allclose(speech.encoder.denormalize(x0)[0].clamp(-12, 6), speech.mel("bad cab", seed=5), atol=1e-4)


def test_steps_speed_and_seed(speech: Speech) -> None:
    calls: Any = Count(speech.model.denoiser)
    speech.model.denoiser = calls
    for steps in (1, 2, 4):
        calls.calls = calls.nfe = 0
        assert torch.isfinite(speech.mel("abc", steps=steps)).all()
    a, b = speech.mel("abc bad deaf", seed=1), speech.mel("abc bad deaf", seed=2)
    assert a.shape == b.shape and not torch.equal(a, b)
    assert torch.equal(a, speech.mel("abc bad deaf", seed=1))
    ratio = a.shape[1] / speech.mel("abc bad deaf", speed=2).shape[1]
    assert 1.5 < ratio < 2.5
    for wrong in (0.1, 5, float("nan")):
        with pytest.raises(BadInput, match="speed"):
            speech.mel("abc", speed=wrong)
    with pytest.raises(BadInput, match="no speaker 'Ann'"):
        speech.mel("abc", speaker="Ann")


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_padding_changes_no_sample(speech: Speech, sampler: str) -> None:
    v = speech.encoder(torch.tensor([speech.front.ids("bad cab")]))
    length = v.frames.shape[1]
    x = torch.randn(1, 20, length + 7, generator=torch.Generator().manual_seed(0))
    frames = torch.nn.functional.pad(v.frames, (0, 0, 0, 7), value=3.0)
    mask = torch.arange(length + 7)[None] < length
    times = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)
    results = []
    for start, cond in (
        (x[..., :length], {"frames": v.frames, "mask": v.mask}),
        (x, {"frames": frames, "mask": mask}),
    ):
        noise = Noise([0], start.shape[1:], torch.float32, torch.device("cpu"))
        results.append(draw(speech.model.denoiser, sampler, times, noise, x=start, cond=cond)[..., :length])
    assert torch.allclose(*results, atol=1e-4)


def test_the_target_of_the_student_for_a_single_sample() -> None:
    """If the teacher knows the one sample x*, the student's target is x* (section 6.6 of the method)."""
    schedule, star = prodiff_schedule(), torch.randn(3, 20, 11, dtype=torch.float64)
    z = torch.randn(3, 20, 11, dtype=torch.float64)
    for i in (5, 3):
        times = [torch.full((3,), (i - k) / 5, dtype=torch.float64) for k in range(3)]
        _, target = ddim_path(lambda x, t: star, schedule, z, times)
        assert torch.allclose(target, star, atol=1e-5)


def test_a_student_of_two_steps_speaks(teacher: Folder, tmp_path: Path) -> None:
    model = hasten.load(teacher)
    corpus = toy_corpus(6)
    data = speech_samples(model, corpus)
    x, cond = data.images([0, 3]), data.conditions([0, 3]) if data.conditions else {}
    assert x.shape == (2, 20, 192) and int(cond["mask"][0].sum()) == corpus.clips[0].frames
    assert not x[0, :, corpus.clips[0].frames :].any() and not cond["frames"][0, corpus.clips[0].frames :].any()
    result = distill_model(
        model, tmp_path / "student", "prodiff", corpus, steps=3, batch_size=4, precision="fp32", show=False
    )
    student = Speech.load(result["folder"])
    assert student.model.steps == 2 and "encoder" in student.model.parts
    assert student.front.symbols == Speech(model).front.symbols
    seen: list[float] = []
    inner = student.model.denoiser.net.forward

    def spy(x: Tensor, t: Tensor, frames: Any = None, mask: Any = None) -> Tensor:
        seen.append(float(t[0]))
        return inner(x, t, frames, mask)

    student.model.denoiser.net.forward = spy  # type: ignore[method-assign]
    assert student.mel("bad cab").shape == Speech(model).mel("bad cab").shape
    assert seen == [4.0, 2.0]  # the entries that it was trained at


def test_a_plan_is_tuned_on_texts(teacher: Folder, tmp_path: Path) -> None:
    model = hasten.load(teacher)
    with pytest.raises(BadInput, match="needs data"):
        tune_model(model, tmp_path / "no", "optimized_steps", steps=2)
    tune_model(model, tmp_path / "tuned", "optimized_steps", data=toy_corpus(4), sampler="unipc", steps=2, n=4)
    tuned = Speech.load(tmp_path / "tuned")
    assert tuned.model.plan is not None and tuned.model.plan.nfe == 2
    assert torch.equal(tuned.mel("bad cab"), tuned.mel("bad cab", steps=2))
    assert tuned.mel("bad cab").shape == tuned.mel("bad cab", steps=4).shape
    with pytest.raises(BadInput, match="without a text"):
        quantize_model(model, tmp_path / "q")


def test_the_conditions_of_a_segment_are_given_by_its_number(teacher: Folder) -> None:
    model = hasten.load(teacher)
    data = speech_samples(model, toy_corpus(4))
    numbered = SegmentDenoiser(model.denoiser, data)
    x, rows = numbered.images(3)
    t = torch.full((3,), 0.6, dtype=torch.float64)
    assert data.conditions is not None
    given = model.denoiser(x, t, **data.conditions(rows.tolist()))
    assert torch.equal(numbered(x, t, label=rows), given) and torch.equal(numbered.raw(x, t, label=rows), given)
    assert not torch.equal(numbered(x, t, label=rows.flip(0)), given)


def test_long_clips_become_segments(teacher: Folder) -> None:
    corpus = toy_corpus(3, count=60)
    data = speech_samples(hasten.load(teacher), corpus)
    assert len(data) > 3 and data.conditions is not None
    frames = sum(int(data.conditions([row])["mask"].sum()) for row in range(len(data)))
    assert frames == sum(clip.frames for clip in corpus.clips)


def test_sentences_are_made_one_by_one(speech: Speech, tmp_path: Path) -> None:
    tone: Any = speech.vocoder
    pieces = speech.stream("Abba. Cab! \n\n 😀\n\nDad?")
    assert tone.calls == 0
    first = next(pieces)
    assert tone.calls == 1 and len(first) and first.abs().max() <= 1
    assert len(list(pieces)) == 2 and tone.calls == 3
    assert len(speech("Abba. Cab!")) > len(first)
    with pytest.raises(BadInput, match="nothing to say"):
        speech("😀 ...")
    seen: list[int] = []
    result = speak_texts(
        speech, ["Abba. Cab!", "", "Dad?"], SpeakRequest(tmp_path / "out"),
        log=lambda line: seen.append(len(list((tmp_path / "out").glob("*.wav")))),
    )  # fmt: skip
    assert seen == [1, 2, 3] and result["sentences"] == 3 and result["first_sound_seconds"] < result["seconds"]["total"]
    stream = io.BytesIO()
    raw = speak_texts(speech, "Abba. Cab!", SpeakRequest("-"), stream=stream)
    assert len(stream.getvalue()) == 2 * round((raw["seconds_of_sound"] + 0.25) * speech.sample_rate)


def test_models_that_do_not_fit(teacher: Folder) -> None:
    with pytest.raises(BadInput, match="does not speak"):
        Speech.load("fashion")
    with pytest.raises(BadInput, match="other spectrograms"):
        Speech(hasten.load(teacher), Tone(MelSettings()))
    with pytest.raises(BadInput, match="eps"):
        train_speech(toy_corpus(2), "x", prediction="noise")


def test_the_command_line(teacher: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hello.wav"
    assert main(["speak", "Abba cab.", "--model", str(teacher), "--steps", "2", "--out", str(out)]) == 0
    assert out.is_file() and "times real time" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("Abba\ncab.\n\n\nDad had a bag. 😀\n")
    assert main(["speak", "--file", str(text), "--model", str(teacher), "--out", str(tmp_path / "many")]) == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0001.wav", "0002.wav"]
    capsys.readouterr()
    for wrong, said in (
        (["speak"], "give a text"),
        (["speak", "", "--model", str(teacher)], "nothing to say"),
        (["speak", "abc", "--model", str(teacher), "--out", "x.mp3"], ".wav, .flac or .ogg"),
        (["speak", "abc", "--model", str(teacher), "--speed", "9"], "speed"),
        (["train", str(tmp_path), "--out", "x", "--task", "speech"], "metadata.csv"),
        (["train", str(tmp_path), "--out", "x", "--preset", "tiny"], "--preset is for --task speech"),
    ):
        assert main(wrong) != 0
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, (wrong, error)


KILLED = """
import functools, sys
from hasten.train.fit import Fit
from hasten.workflows import speech
from tests.tasks.speech_toy import toy_corpus
speech.Fit = functools.partial(Fit, save_seconds=0.01)
speech.train_speech(toy_corpus(8), sys.argv[1], preset="tiny", steps=int(sys.argv[2]), batch_size=2, show=False, device="cpu")
"""


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path: Path) -> None:
    steps = "60"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "run"), steps])
    while not (tmp_path / "run" / "checkpoint.pt").is_file() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "model.json").is_file()
    for name in ("run", "whole"):
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name), steps], check=True)
    resumed, whole = Speech.load(tmp_path / "run"), Speech.load(tmp_path / "whole")
    assert torch.equal(resumed.mel("bad cab"), whole.mel("bad cab"))
