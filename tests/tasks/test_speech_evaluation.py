"""The evaluation of models that speak."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hasten.audio.corpus import Clip
from hasten.audio.griffin_lim import GriffinLim
from hasten.audio.vocoder import Vocoder
from hasten.cli import main
from hasten.compare.speech import SpeechRequest, evaluate_speech, speech_table
from hasten.compare.speech_report import write_speech_report
from hasten.errors import BadInput
from hasten.nets.harmonic_vocos import HarmonicVocos
from hasten.tasks import Speech
from hasten.workflows.speech import train_speech
from tests.tasks.speech_toy import toy_corpus, write_corpus

TEXTS = ("abba cab dad", "bag bed", "face the cage a bad bed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("speech") / "teacher"
    train_speech(toy_corpus(6), out, preset="tiny", steps=2, batch_size=2, device="cpu", show=False)
    return out


def clips() -> list[Clip]:
    def read(rate: int) -> torch.Tensor:
        return 0.1 * torch.sin(torch.arange(rate) * 0.2)

    return [Clip(str(k), text, read=read) for k, text in enumerate(TEXTS)]


def listener(audio: torch.Tensor, rate: int) -> str:
    return "abba cab dad"


def test_rows_are_measured_beside_the_recordings(folder: Path) -> None:
    speech = Speech.load(folder)
    speech.vocoder = Vocoder(
        HarmonicVocos(20, 8, 8, 1, n_fft=512, hop=128, sample_rate=8000, fmax=4000.0), speech.settings
    )
    request = SpeechRequest(
        clips(), words=3, recogniser=listener, opinion=lambda x, rate: {"overall": float(len(x) / rate)}
    )
    calls = []
    result = evaluate_speech({"two": (speech, 2), "one": (speech, 1)}, request, lambda *done: calls.append(done))
    names = [row["name"] for row in result["rows"]]
    assert names == ["recordings", "vocoder of recordings", "Griffin-Lim of recordings", "two", "one"]
    recordings, copied, griffin, two, one = result["rows"]
    assert recordings["clips"] == 2 and calls == [(1, 2), (2, 2)]  # "bag bed" has two words
    assert recordings["word_error_rate"] == pytest.approx(6 / 9) and recordings["words"] == 9
    assert recordings["dnsmos_overall"] == 1 and "mel_l1" not in recordings and "real_time" not in copied
    assert 0 < griffin["mel_l1"] < 1 and 0 < copied["mel_l1"] < 1 and copied["length"] == 1
    for row in (two, one):
        speeds = row["real_time"]
        assert speeds["total"] == pytest.approx(1 / sum(1 / speeds[name] for name in ("text", "acoustic", "vocoder")))
    table = speech_table(result)
    assert table[0][1] == "word errors" and "DistillMOS" not in table[0] and len(table) == 6
    assert table[1][-1] == "–" and "[" in table[1][1]


def test_the_report_holds_every_sound_and_picture(folder: Path, tmp_path: Path) -> None:
    speech = Speech.load(folder, "griffin_lim")
    result = evaluate_speech({"<b>": (speech, 1)}, SpeechRequest(clips(), words=1, recogniser=lambda x, r: "<i>&"))
    assert [row["name"] for row in result["rows"]] == ["recordings", "vocoder of recordings", "<b>"]
    text = write_speech_report(result, tmp_path / "r.html", "A & B", clips=2).read_text()
    assert text.count("<audio") == text.count("<img") == 6 and "A &amp; B" in text
    assert "&lt;b&gt;" in text and "&lt;i&gt;&amp;" in text and "<b><b>" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # nothing is loaded from elsewhere


def test_requests_that_cannot_be(folder: Path) -> None:
    with pytest.raises(BadInput, match="9 words"):
        SpeechRequest(clips(), words=9).clips()
    assert [clip.name for clip in SpeechRequest(clips(), words=1, n=2).clips()] == ["0", "1"]
    with pytest.raises(BadInput, match="a model"):
        evaluate_speech({}, SpeechRequest(clips()))


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("hasten.compare.speech.Moonshine", lambda: listener)
    data = write_corpus(tmp_path / "data", header=True)
    (data / "metadata.csv").write_text("id|text|speaker|split\nc0|Abba cab dad had a bag|a|test\n")
    words = ["evaluate", str(folder), str(data), "--steps", "1", "--out", str(tmp_path / "r.html")]
    assert main([*words, "--json"]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out)
    assert result["rows"][0]["word_error_rate"] == 0.5 and (tmp_path / "r.html").is_file()
    assert result["clips"][0]["understood"]["recordings"] == "abba cab dad" and result["vocoder"] == "griffin_lim"
    assert main(["evaluate", str(folder), "--task", "speech"]) == 1
    assert "recordings" in capsys.readouterr().err
    assert isinstance(Speech.load(folder, "griffin_lim").vocoder, GriffinLim)
    assert main(["evaluate", "fashion", "--out", str(tmp_path / "x.html")]) == 1
    assert "--out is for models that speak" in capsys.readouterr().err
