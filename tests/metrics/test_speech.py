"""Metrics of speech: words, distances, quality."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch

from hasten.audio.mel import MelSettings, mel
from hasten.errors import BadInput
from hasten.metrics.speech_distance import align, cepstra, speech_distance
from hasten.metrics.speech_quality import DNSMOS, WINDOW, DistillMOS, without_torchaudio
from hasten.metrics.speech_recognition import Moonshine, joined_pieces, token_pieces
from hasten.metrics.speech_words import normalised_words, number_words, word_error_rate, word_errors


def voice(f0: torch.Tensor) -> torch.Tensor:
    """Harmonics 1/k of a frequency (n,) in Hz."""
    phase = 2 * math.pi * (f0.double() / 16000).cumsum(0)
    return (0.2 * torch.stack([torch.sin(k * phase) / k for k in range(1, 20)]).sum(0)).float()


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("Press 1 for A.M., or 2 for P.M.", "press one for a m or two for p m"),
        (
            "It costs $1,250 - that's 12.5%!",
            "it costs one thousand two hundred fifty dollars that's twelve point five percent",
        ),
        ("Dr. Smith won't e-mail on the 21st", "doctor smith will not email on the twenty first"),
        ("They’ll call at 10:00 am; room 007", "they will call at ten a m room zero zero seven"),
        ("Café naïve — voice-mail", "cafe naive voicemail"),
        ("", ""),
        ("😀 ... !", ""),
    ],
)
def test_texts_are_normalised_to_what_is_said(written: str, spoken: str) -> None:
    assert " ".join(normalised_words(written)) == " ".join(normalised_words(spoken))
    expected = spoken.replace("that's", "thats").split()
    assert normalised_words(written) == expected


def test_numbers_are_spelled() -> None:
    assert " ".join(number_words("1000001")) == "one million one"
    assert " ".join(number_words("342115")) == "three hundred forty two thousand one hundred fifteen"
    assert number_words("2" * 13) == ["two"] * 13
    assert normalised_words("2nd 3rd 12th 30th 21st") == ["second", "third", "twelfth", "thirtieth", "twenty", "first"]


def test_word_errors_are_the_edit_distance() -> None:
    assert word_errors(["a", "b", "c"], ["a", "x", "c", "d"]) == 2
    assert word_errors(["a", "b", "c"], []) == 3 == word_errors([], ["a", "b", "c"])
    assert word_errors(["a", "b", "c"], ["a", "c"]) == 1 == word_errors(["a", "c"], ["a", "b", "c"])
    assert word_errors(["voicemail"], ["voice", "mail"]) == 0 == word_errors(["log", "in"], ["login"])
    assert word_errors(["the", "log", "in", "page"], ["the", "login", "screen"]) == 1


def test_the_interval_is_that_of_the_clips() -> None:
    """Errors in one clip of four: an interval from 0, since a bootstrap misses that clip in 32 % of its draws."""
    same = word_error_rate(["a b c d"] * 4, ["a b c d"] * 3 + ["x y z w"])
    assert (same.rate, same.errors, same.words, same.clips) == (0.25, 4, 16, 4)
    assert same.low == 0 and 0.5 <= same.high <= 0.75
    spread = word_error_rate(["a b c d"] * 40, ["a b c x"] * 40)
    assert spread.rate == spread.low == spread.high == 0.25
    assert "25.0 %" in str(spread) and "40 clips" in str(spread)
    with pytest.raises(BadInput, match="no words"):
        word_error_rate(["..."], ["a"])
    with pytest.raises(BadInput, match="one each"):
        word_error_rate(["a"], [])


def test_the_path_of_least_cost_undoes_a_change_of_speed() -> None:
    a = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11])
    rows, columns = align(a, a[:, times])
    assert torch.equal(times[columns], rows)
    assert rows[0] == columns[0] == 0 and rows[-1] == 11 and columns[-1] == 16


def test_cepstra_are_those_of_a_cosine() -> None:
    """log spectrum 2 c cos(pi k (m + 1/2) / M): the coefficient k is c, and the distortion follows from it."""
    m = torch.arange(80) + 0.5
    spectrum = 0.7 * 2 * torch.cos(math.pi * 3 * m / 80)
    assert torch.allclose(cepstra(spectrum[:, None])[:, 0], 0.7 * (torch.arange(1, 14) == 3).float(), atol=1e-5)


def test_distances_of_a_sound_from_itself_and_from_another() -> None:
    x = voice(torch.full((6400,), 180.0))
    same = speech_distance(x, x)
    assert same.mel_l1 == same.cepstral == same.voicing == 0 and same.length == 1 and same.f0_cents == 0
    higher = voice(torch.full((6400,), 180.0 * 2 ** (1 / 12)))
    other = speech_distance(x, higher)
    assert other.f0_cents == pytest.approx(100, abs=8) and other.cepstral > 0.1
    louder = speech_distance(x, 2 * x, aligned=True)
    assert louder.mel_l1 == pytest.approx(float((mel(2 * x) - mel(x)).abs().mean()), rel=1e-5)
    assert louder.cepstral < 0.5 * other.cepstral  # loudness is coefficient 0; only bands at the floor differ
    slower = torch.cat([x[:3200], x[3200:].repeat(2)])
    assert speech_distance(x, slower).length == 1.5
    assert speech_distance(x, slower).mel_l1 < speech_distance(x, slower, MelSettings(), aligned=True).mel_l1 + 0.3
    with pytest.raises(BadInput, match="sample"):
        speech_distance(x, torch.zeros(0))


def test_tokens_are_read_as_they_are_stored() -> None:
    long = b"\xe2\x96\x81" * 50
    pieces = [b"<unk>", b"", b"\xe2\x96\x81he", b"llo", long]
    content = b"".join(
        (bytes([len(p)]) if len(p) < 128 else bytes([128 + len(p) % 128, len(p) // 128])) + p for p in pieces
    )
    assert token_pieces(content) == pieces
    assert joined_pieces(pieces[2:4]) == "hello"


def test_what_is_missing_is_named(monkeypatch, tmp_path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in ("moonshine_voice", "speechmos", "distillmos") else real(name, *a),
    )
    for make, package in ((Moonshine, "moonshine-voice==0.0.73"), (DNSMOS, "speechmos"), (DistillMOS, "distillmos")):
        with pytest.raises(BadInput, match=f"pip install .*{package}"):
            make()
    with pytest.raises(BadInput, match="encoder_model.ort"):
        Moonshine(tmp_path)
    with without_torchaudio():
        assert "torchaudio" in sys.modules
    assert real("torchaudio") is None or "torchaudio" in sys.modules


def dnsmos_file(path) -> None:
    """A network as that of DNSMOS: (B, 144160) -> (B, 3), here mean square, mean, and 1."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["a"], axes=[1], keepdims=1),
        helper.make_node("ReduceMean", ["x"], ["b"], axes=[1], keepdims=1),
        helper.make_node("Concat", ["a", "b", "a"], ["y"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", WINDOW])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_scores_are_the_published_polynomials_of_the_network(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    dnsmos_file(tmp_path / "m.onnx")
    scores = DNSMOS(tmp_path / "m.onnx", threads=1)(torch.full((16000,), 0.5))
    assert scores["signal"] == pytest.approx(-0.08397278 * 0.25**2 + 1.22083953 * 0.25 + 0.0052439, abs=1e-4)
    assert scores["background"] == pytest.approx(-0.13166888 * 0.5**2 + 1.60915514 * 0.5 - 0.39604546, abs=1e-4)
    assert scores["overall"] == pytest.approx(-0.06766283 * 0.25**2 + 1.11546468 * 0.25 + 0.04602535, abs=1e-4)
    with pytest.raises(BadInput, match="sample"):
        DNSMOS(tmp_path / "m.onnx")(torch.zeros(0))
