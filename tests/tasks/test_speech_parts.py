"""The parts of text to speech: text, corpus, alignment, length regulator, networks, losses."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import pytest
import torch

from hasten.audio.corpus import open_corpus
from hasten.errors import BadInput
from hasten.nets.acoustic import AcousticEncoder, expand_frames, f0_bins, frame_tokens
from hasten.nets.aligner import TokenAligner, monotonic_durations
from hasten.nets.mel_denoiser import MelDenoiser
from hasten.tasks.speech.acoustic_model import make_acoustic_model
from hasten.tasks.speech.alignment import fit_aligner
from hasten.tasks.speech.batches import SpeechBatches, collate
from hasten.tasks.speech.features import corpus_features
from hasten.tasks.speech.losses import mel_loss, ssim_map
from hasten.tasks.speech.text import SPECIAL, FrontEnd, numbers_of, plain, split_sentences
from tests.tasks.speech_toy import SETTINGS, SYMBOLS, toy_clip, toy_corpus, write_corpus


def test_the_length_regulator() -> None:
    durations = torch.tensor([[2, 2, 3], [1, 0, 2]])
    assert frame_tokens(durations).tolist() == [[1, 1, 2, 2, 3, 3, 3], [1, 3, 3, 0, 0, 0, 0]]
    x = torch.randn(2, 3, 5)
    frames, _ = expand_frames(x, durations)
    assert torch.equal(frames[0], torch.repeat_interleave(x[0], durations[0], 0))
    assert torch.equal(frames[1, 3:], torch.zeros(4, 5))


@pytest.mark.parametrize("optional", [False, True])
def test_the_search_finds_the_best_of_all_paths(optional: bool) -> None:
    scores = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(int(optional)))
    tokens, frames = torch.tensor([4, 3, 2]), torch.tensor([7, 5, 2])
    skip = torch.zeros(3, 4, dtype=torch.bool)
    skip[:, 1] = optional
    skip[2, 1] = False
    found = monotonic_durations(scores, tokens, frames, skip)
    for b in range(3):
        T, L = int(tokens[b]), int(frames[b])
        best = max(
            (
                sum(float(scores[b, t, ends[t] : ends[t + 1]].sum()) for t in range(T)),
                [ends[t + 1] - ends[t] for t in range(T)],
            )
            for cuts in itertools.combinations_with_replacement(range(L + 1), T - 1)
            for ends in [(0, *cuts, L)]
            if all(ends[t + 1] > ends[t] or bool(skip[b, t]) for t in range(T))
        )
        assert found[b].tolist()[:T] == best[1]


def test_an_alignment_is_learned_from_the_clips_alone() -> None:
    clips = [toy_clip(seed) for seed in range(40)]
    aligner = TokenAligner(len(SYMBOLS), 20, len(SPECIAL))
    found = fit_aligner(aligner, [clip.tokens for clip in clips], [clip.mel for clip in clips])
    wrong = torch.cat([(a.cumsum(0) - clip.durations.cumsum(0)).abs() for a, clip in zip(found, clips)]).float().mean()
    even = [torch.full_like(clip.tokens, 1).double() * clip.frames / len(clip.tokens) for clip in clips]
    start = torch.cat([(a.cumsum(0) - c.durations.cumsum(0)).abs() for a, c in zip(even, clips)]).mean()
    assert wrong < 0.2 < 1.5 < start  # frames; from equal durations
    assert all(int(a.sum()) == clip.frames for a, clip in zip(found, clips))


def test_the_denoiser_of_the_paper_has_its_size_and_padding_changes_nothing() -> None:
    assert sum(p.numel() for p in MelDenoiser().parameters()) == 15_086_416
    net = MelDenoiser(6, 8, 3, 5, dilation_cycle=2)
    torch.nn.init.normal_(net.output.weight)
    x, time, cond = torch.randn(1, 6, 9), torch.tensor([2.0]), torch.randn(1, 9, 5)
    alone = net(x, time, cond)
    padded = torch.cat([x, torch.randn(1, 6, 4)], 2), torch.cat([cond, torch.randn(1, 4, 5)], 1)
    mask = torch.arange(13)[None] < 9
    together = net(padded[0], time, padded[1], mask)
    assert torch.allclose(together[..., :9], alone, atol=1e-5) and not together[..., 9:].any()
    assert not torch.allclose(net(*(padded[0], time, padded[1]))[..., :9], alone, atol=1e-3)
    assert net(x, time).shape == x.shape  # without a condition


def test_padding_does_not_change_the_encoder() -> None:
    encoder = AcousticEncoder(12, 6, 16, 1, 2, 16, 3, speakers=2).eval()
    tokens = torch.tensor([[1, 9, 3, 8, 2, 0, 0], [1, 8, 9, 10, 11, 8, 2]])
    both = encoder(tokens, speaker=torch.tensor([1, 0]))
    alone = encoder(tokens[:1, :5], speaker=torch.tensor([1]))
    length = int(alone.durations.sum())
    assert torch.equal(both.durations[0, :5], alone.durations[0])
    assert torch.allclose(both.frames[0, :length], alone.frames[0], atol=1e-5)
    assert not both.frames[0, length:].any()
    slow = encoder(tokens, speed=0.5)
    assert slow.durations.sum() > 1.7 * both.durations.sum()
    assert not torch.equal(encoder(tokens[:1], speaker=torch.tensor([0])).frames, both.frames[:1, :length])


def test_bins_of_pitch() -> None:
    assert f0_bins(torch.tensor([0.0, 10.0, 50.0, 1100.0, 9999.0])).tolist() == [0, 1, 1, 255, 255]
    assert (f0_bins(torch.linspace(60, 500, 50)).diff() > 0).all()


def test_padding_changes_no_loss() -> None:
    x, y = torch.randn(2, 2, 7, 20, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(20) < torch.tensor([[20], [12]])
    a = mel_loss(x, y, mask)
    more = torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)], 1)
    junk = torch.randn(2, 7, 5)
    assert torch.allclose(mel_loss(torch.cat([x, junk], 2), torch.cat([y, junk * 3], 2), more), a, atol=1e-6)
    inside = torch.where(mask[:, None], x, torch.full_like(x, 9.0))
    assert torch.allclose(mel_loss(inside, y, mask), a, atol=1e-6)
    assert torch.allclose(ssim_map(x, x, mask), torch.ones(2, 7, 20), atol=1e-4)
    assert float(mel_loss(x, x, mask)) == pytest.approx(0, abs=1e-4)


def test_padding_does_not_change_the_loss_of_the_model() -> None:
    batches = SpeechBatches(toy_corpus(4), 3)
    model = make_acoustic_model(len(SYMBOLS), 20, "tiny").eval()
    torch.nn.init.normal_(model.denoiser.net.output.weight, std=0.1)
    batch = batches[0]
    more = {key: torch.nn.functional.pad(value, (0, 6)) if value.ndim > 1 else value for key, value in batch.items()}
    losses = []
    for one in (batch, more):
        torch.manual_seed(0)
        parts = vars(model.loss(one))
        losses.append({name: float(value.detach()) for name, value in parts.items() if name != "mel"})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    frames, cond = batch["frames"], torch.randn(3, batch["x"].shape[-1], 64)
    torch.manual_seed(1)
    a = model.diffusion_loss(batch["x"], cond, frames)
    torch.manual_seed(1)
    broken = torch.where(torch.arange(cond.shape[1])[None, :, None] < frames[:, None, None], cond, 7.0)
    assert float(model.diffusion_loss(batch["x"], broken, frames).detach()) == pytest.approx(
        float(a.detach()), abs=1e-6
    )


def test_batches_repeat_and_hold_clips_of_similar_length() -> None:
    corpus = toy_corpus(20)
    a, b = SpeechBatches(corpus, 4, seed=3), SpeechBatches(corpus, 4, seed=3)
    for k in (7, 0, 3):
        assert all(torch.equal(a[k][name], b[k][name]) for name in a[k])
    seen = sorted(row for batch in a.epoch(0) for row in batch)
    assert seen == list(range(20)) and a.epoch(1) != a.epoch(0)
    spans = [max(a[k]["frames"]) - min(a[k]["frames"]) for k in range(5)]
    assert max(spans) < max(c.frames for c in corpus.clips) - min(c.frames for c in corpus.clips)
    assert len(SpeechBatches(toy_corpus(2), 5)[0]["x"]) == 5  # fewer clips than a batch holds
    one = collate(a.rows[:2])
    assert one["x"].shape[-1] == int(one["frames"].max()) and one["durations"].sum() == one["frames"].sum()


def test_a_corpus_in_the_layout_of_ljspeech(tmp_path: Path) -> None:
    clips = open_corpus(write_corpus(tmp_path / "plain"))
    assert [clip.name for clip in clips] == ["c0", "c1", "c2", "c3"] and clips[1].text == "dad had a bag?"
    named = open_corpus(write_corpus(tmp_path / "named", header=True))
    assert [(clip.speaker, clip.split) for clip in named] == [("a", "train"), ("b", "train"), ("a", "train")]
    corpus = corpus_features(named, SETTINGS, "characters", tmp_path / "f.pt")
    assert corpus.speakers == ("a", "b") and len(corpus.clips) == 3
    assert all(int(clip.durations.sum()) == clip.frames for clip in corpus.clips)
    again = corpus_features(named, SETTINGS, "characters", tmp_path / "f.pt")
    assert again.fingerprint() == corpus.fingerprint() and torch.equal(again.clips[0].f0, corpus.clips[0].f0)
    assert again.aligner is not None and corpus.aligner is not None
    assert torch.equal(again.aligner.mean, corpus.aligner.mean)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"metadata\.csv"):
        open_corpus(tmp_path / "empty")


def test_sentences() -> None:
    text = "Dr. Smith left at 5 p.m. on time. He paid No. 5!\nIs it\nso?\n\nNew paragraph without an end"
    assert list(split_sentences(text)) == [
        "Dr. Smith left at 5 p.m. on time.", "He paid No. 5!", "Is it so?", "New paragraph without an end",
    ]  # fmt: skip
    long = list(split_sentences("word " * 200 + "a" * 900))
    assert all(len(piece) <= 400 for piece in long) and "".join(long).count("word") == 200
    assert "".join(long).count("a") == 900 and list(split_sentences(" \n\n ")) == []


def test_characters_need_no_library() -> None:
    front = FrontEnd("characters")
    assert "".join(front("Naïve, Straße... ok")) == "^naive,strasse.ok$"
    assert "".join(front("Why?")) == "^why?"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert "".join(front("hi 😀 你好")) == "^hi$"
    assert "😀" in str(seen[0].message)
    for nothing in ("", "😀", " ... ", "你好"):
        with pytest.raises(BadInput, match=r"empty|nothing to say"):
            front(nothing)
    assert plain("5 & 6 (c)")[0] == "5 and 6 , c"
    with pytest.raises(BadInput, match="did you mean 'phonemes'"):
        FrontEnd("phonems")


def test_unknown_sounds_are_replaced_by_similar_ones() -> None:
    symbols = (*SPECIAL, "ɑ", "ʃ", "ˈu")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert numbers_of(["^", "ˈɑ", "ʒ", "u", "x", "$"], symbols) == [1, 8, 9, 10, 2]
    assert "x" in str(seen[0].message)


def test_phonemes() -> None:
    pytest.importorskip("gruut")
    front = FrontEnd()
    assert "".join(front("Dr. Smith paid $10.50.")) == "^dˈɑktɚ smˈɪθ pˈeɪd tˈɛn dˈɑlɚz fˈɪfti sˈɛnts."
    assert "".join(front("Press 1 for A.M, or 2.")).startswith("^pɹˈɛs wˈʌn fɚ ˈeɪ ˈɛm,")
    for odd in ("(c) A.M. 3.14 1-800-555", "1e400 " + "9" * 60, "a" * 400, "<b>&amp; [x] £5 €3", "don't 'quote'"):
        assert len(front(odd)) > 3
