"""What the package bundles: it loads, it is small, and it draws clothes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hasten
from hasten import zoo
from hasten.cli import main
from hasten.metrics import extract, feature_net, reference
from hasten.model import Model
from hasten.sampling import Count


@pytest.fixture(scope="module")
def model() -> Model:
    return hasten.load("fashion")


@pytest.fixture(scope="module")
def fine(model: Model) -> Tensor:
    return model.sample(20, seed=100, steps=32)


def test_every_card_of_the_zoo_has_its_files_and_they_are_small() -> None:
    cards = zoo.cards()
    assert "fashion" in cards
    for card in cards.values():
        assert card.summary and card.licence
        assert card.size <= (12e6 if card.name == "emoji" else 8e6), card.name


def test_the_command_line_prints_the_path_of_a_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--path", "fashion"]) == 0
    assert capsys.readouterr().out.strip() == str(zoo.cards()["fashion"].folder)
    assert main(["models", "--path", "fasion"]) != 0
    assert "did you mean 'fashion'?" in capsys.readouterr().err


def test_the_model_names_statistics_that_are_bundled(model: Model) -> None:
    expected = reference(model.card["reference"])
    assert expected.count == 10_000 and expected.floor_at("frechet", 2000)
    assert model.classes is not None and len(expected.histogram) == len(model.classes)


def test_its_images_are_of_the_requested_class(model: Model, fine: Tensor) -> None:
    _, logits = extract(feature_net("fashion"), fine)
    right = (logits.argmax(1) == model.labels(20)).float().mean()
    assert right >= 0.85
    shuffled = (logits.argmax(1) == model.labels(20).roll(1)).float().mean()
    assert shuffled < 0.3


def test_few_steps_of_a_high_order_come_nearer_to_many_than_first_order_does(model: Model, fine: Tensor) -> None:
    def error(sampler: str, steps: int) -> float:
        return float((model.sample(20, seed=100, sampler=sampler, steps=steps) - fine).square().mean().sqrt())

    assert error("unipc", 8) < 0.75 * error("ddim", 8)
    assert error("unipc", 16) < 0.75 * error("unipc", 8)


def test_guidance_runs_both_branches_as_one_batch(model: Model) -> None:
    count = Count(model.denoiser)
    guided = hasten.CFG(scale=1.5).wrap(count)
    hasten.draw(
        guided,
        hasten.UniPC(),
        hasten.pick("times", "lambda"),
        hasten.Noise(range(4), model.shape),
        steps=3,
        label=model.labels(4),
    )
    assert (count.calls, count.rows) == (3, 24)


def test_the_null_class_is_not_a_class(model: Model) -> None:
    """At pure noise the network must answer with the mean of a class, or of all classes for the null label."""
    z = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0)).expand(11, *model.shape)
    x0 = model.denoiser(z, 1.0, label=torch.arange(11))
    everything = x0[:10].mean(0)
    assert (x0[10] - everything).square().mean() < 0.3 * (x0[:10] - everything).square().mean()


def test_additions_are_found_by_name_and_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = '[net]\nsummary = "a net"\n[fast]\nsummary = "a LoRA"\nkind = "lora"\nof = "net"\n'
    text += '[light]\nsummary = "a decoder"\nkind = "decoder"\n[gone]\nsummary = "gone"\nkind = "lora"\n'
    monkeypatch.setattr("hasten.zoo.HERE", tmp_path / "zoo")
    for name in ("net", "light"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        (tmp_path / "zoo" / name / "model.json").write_text("{}")
    (tmp_path / "zoo" / "zoo.toml").write_text(text)
    (tmp_path / "zoo" / "fast.safetensors").write_bytes(b"12345")
    assert set(zoo.cards()) == {"net"} and set(zoo.additions()) == {"fast", "light"}
    assert zoo.additions()["fast"].size == 5
    for name in ("fast", "fast.safetensors"):
        assert zoo.find_file(name) == tmp_path / "zoo" / "fast.safetensors"
    assert zoo.find_file("other") == Path("other") and zoo.find_file(tmp_path / "own") == tmp_path / "own"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fast").write_bytes(b"own")
    assert zoo.find_file("fast") == Path("fast")  # the user's own file first
    assert main(["models", "--path", "fast"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "zoo" / "fast.safetensors")
