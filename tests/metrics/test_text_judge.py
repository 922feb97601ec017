"""Judges of text-to-image samples: towers, CLIP folders, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hasten.errors import BadInput
from hasten.metrics import evaluate_features, evaluate_images, extract, make_reference, reference_from_images
from hasten.metrics.text_judge import BUNDLED_JUDGES, ClipJudge, TowersJudge, load_judge
from hasten.nets.contrastive import ContrastiveTowers
from tests.judges import clip_folder, towers_folder

TEXTS = ["a red cat", "a blue dog", "the big dog"]


def images(n: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_features_are_those_of_the_tower_before_its_projection(tmp_path: Path) -> None:
    judge = load_judge(towers_folder(tmp_path / "judge"))
    assert isinstance(judge, TowersJudge) and judge.size == 64 and judge.length == 12
    towers = ContrastiveTowers.load(tmp_path / "judge")
    x = images(3, 64)
    features, logits = extract(judge, x, quantize=False)
    assert logits is None and features.shape == (3, 16)
    torch.testing.assert_close(features, towers.image_tower(x).detach())
    torch.testing.assert_close(judge.image_vectors(features), towers.image(x).detach())
    tokens = judge.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    torch.testing.assert_close(judge.texts(TEXTS), towers.text(tokens).detach())


def test_the_distance_in_its_features_is_the_frechet_distance_of_these_features(tmp_path: Path) -> None:
    judge = load_judge(towers_folder(tmp_path / "judge"))
    real, fake = images(40, 64), images(30, 64, 1) * 0.5
    known = reference_from_images(real, "noise", "test", judge)
    measured = evaluate_images(fake, features=judge, reference=known, bootstrap=0)
    features = extract(judge, fake)[0]
    expected = evaluate_features(features, make_reference(extract(judge, real)[0], "x", "y", judge.name), bootstrap=0)
    assert (
        measured["frechet"].value == pytest.approx(expected["frechet"].value, rel=1e-12)
        and known.features == judge.name
    )
    assert measured["frechet"].features.startswith("contrastive-")
    assert load_judge(judge) is judge


def test_clip_is_scaled_as_its_processor_says_and_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import CLIPModel

    judge = load_judge(clip_folder(tmp_path / "clip"))
    assert isinstance(judge, ClipJudge) and judge.size == 16
    x = images(2, 16)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    clip = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    encoded = judge.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip(**encoded, pixel_values=((x + 1) / 2 - mean) / std)
    features = extract(judge, x, quantize=False)[0]
    torch.testing.assert_close(
        features, clip.vision_model(((x + 1) / 2 - mean) / std).pooler_output.detach(), atol=1e-5, rtol=1e-4
    )
    products = judge.image_vectors(features) @ judge.texts(TEXTS).T
    torch.testing.assert_close(products * clip.logit_scale.exp(), output.logits_per_image, atol=1e-4, rtol=1e-4)


def test_sizes_greys_and_long_texts(tmp_path: Path) -> None:
    judge = load_judge(towers_folder(tmp_path / "judge"))
    x = images(2, 64)
    large = F.interpolate(x, scale_factor=2, mode="nearest")
    assert (judge(large) - judge(x)).abs().max() < 0.5 * judge(x).std()
    wide = F.pad(x, (10, 10, 0, 0))
    assert torch.equal(judge(wide), judge(x))
    assert judge(x[:, :1]).shape == (2, 16)
    long = judge.texts(["cat " * 2500, "cat " * 2600, ""])
    assert torch.equal(long[0], long[1]) and bool(long.isfinite().all())
    assert torch.allclose(judge.texts(TEXTS[:1] * 300), judge.texts(TEXTS[:1]).expand(300, -1), atol=1e-6)


def test_a_judge_in_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    judge = load_judge(towers_folder(tmp_path / "judge", half=True))
    assert {p.dtype for p in judge.parameters()} == {torch.float32} and not any(
        p.requires_grad for p in judge.parameters()
    )
    other = load_judge(towers_folder(tmp_path / "other", seed=1))
    assert other.name != judge.name


def test_a_bundled_judge_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED_JUDGES, "mine", towers_folder(tmp_path / "judge"))
    assert load_judge("mine").name == load_judge(tmp_path / "judge").name


@pytest.mark.parametrize("what", ["missing", "empty", "network", "damaged", "untokenized"])
def test_what_is_no_judge_is_one_clear_line(tmp_path: Path, what: str) -> None:
    folder, said = tmp_path / what, "is no judge"
    if what == "missing":
        said = "no judge"
    else:
        folder.mkdir()
    if what == "network":
        (folder / "config.json").write_text('{"model_type": "bert"}')
    if what == "damaged":
        towers_folder(folder)
        (folder / "towers.safetensors").write_bytes(b"1234")
        said = "cannot read the towers"
    if what == "untokenized":
        towers_folder(folder)
        for file in (folder / "tokenizer").iterdir():
            file.unlink()
        said = "has no tokenizer"
    with pytest.raises(BadInput, match=said) as error:
        load_judge(folder)
    assert "\n" not in str(error.value)


def test_the_bundled_judge_of_emoji_comes_with_captions_and_statistics() -> None:
    """Its statistics are those of its own features, and it finds most captions of real pictures."""
    from hasten.workflows.captioned import bundled_captions

    found = bundled_captions("emoji")
    assert found is not None and found.reference.features == found.judge.name and found.match is not None
    assert len(found.captions) == len(found.distinct) == found.reference.count == found.match.count == 200
    assert found.match.value > 0.7 and found.match.candidates == 100 and len(found.calibration_prompts) >= 16
    baseline = found.reference.floor_at("frechet", 200)
    assert baseline is not None and 0.5 < baseline < 5 and found.judge.size == 64
    assert not found.judge.truncated(found.captions)
