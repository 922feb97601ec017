"""`hasten evaluate` of models that take prompts: captions as prompts, pictures as the reference, a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten import EvaluateConfig, evaluate_model
from hasten.errors import BadInput
from hasten.metrics import evaluate_features, extract, make_reference
from hasten.metrics.text_judge import BUNDLED_JUDGES, load_judge
from hasten.train.data import open_data, to_float
from hasten.workflows.captioned import bundled_captions, open_captioned, save_captioned

from .factories import run_cli, tiny_model
from .prompt_data import SIDE, OracleJudge, captions, shower, write_captioned


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_captioned(tmp_path / "data")


def measured(model: hasten.Model, data: Path, lines: list[str] | None = None, **options: Any) -> dict[str, Any]:
    config = EvaluateConfig(data=str(data), judge=OracleJudge(), **options)
    return evaluate_model(model, config, warn=(lines if lines is not None else []).append, guidance_scale=1)


def test_a_model_that_shows_its_prompts_and_one_that_does_not(data: Path) -> None:
    lines: list[str] = []
    good = measured(shower(), data, lines)
    assert good["n"] == 24 and sorted(good["prompts"]) == sorted(captions(24, 60))
    match = good["measures"]["prompt_match"]
    assert (match["value"], match["floor"], match["reference_count"]) == (1, 1, 24)
    assert any("24 different captions: prompt match is among 24, not 100" in line for line in lines)
    assert good["judge"]["features"] == "pooled image features before the projection"
    frechet = good["measures"]["frechet"]
    assert frechet["features"].startswith("oracle-") and frechet["reference"] == "data test" and frechet["count"] == 24
    assert any(line.startswith("prompt match 100.0%") for line in good["summary"])
    blind = measured(shower(follow=False), data)
    assert blind["measures"]["prompt_match"]["value"] < 0.3
    assert blind["measures"]["frechet"]["value"] > 2 * frechet["value"]


def test_the_distance_is_that_of_the_features_and_its_baseline_that_of_training_pictures(data: Path) -> None:
    model, judge = shower(), OracleJudge()
    found = measured(model, data, n=40)
    x = model.sample(40, found["prompts"], steps=2, sampler="ddim", guidance_scale=1)
    real = open_data(data, "test", label="none", report=False)
    reference = make_reference(extract(judge, real.images(list(range(24))))[0], "data", "test", judge.name)
    expected = evaluate_features(extract(judge, x)[0], reference, bootstrap=0)
    assert found["measures"]["frechet"]["value"] == pytest.approx(expected["frechet"].value, rel=1e-6)
    train = open_data(data, "train", label="none", report=False)
    features = extract(judge, train.images(list(range(60))))[0]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:40]
    baseline = evaluate_features(features[order], reference, bootstrap=0)["frechet"].value
    assert found["measures"]["frechet"]["floor"] == pytest.approx(baseline, rel=1e-6)


def test_diversity_is_that_of_a_longer_run_and_falls_with_the_noise(data: Path) -> None:
    few, many = measured(shower(0.2), data, n=24), measured(shower(0.2), data, n=96)
    assert few["diversity"]["within"] == pytest.approx(many["diversity"]["within"], rel=1e-5)
    assert (few["diversity"]["prompts"], few["diversity"]["images"]) == (24, 4)
    calm = measured(shower(0.02), data)["diversity"]
    assert calm["within"] < 0.2 * few["diversity"]["within"] and calm["between"] > 10 * calm["within"]
    assert "diversity" not in measured(shower(), data, images_per_prompt=1)["measures"]


def test_copies_of_training_pictures_are_memorised_and_held_out_ones_are_not(data: Path) -> None:
    honest = measured(shower(), data)["nearest"]
    assert honest["pixels"]["share"] < 0.2 and honest["pixels"]["train_number"] < 60
    assert honest["pixels"]["generated"] == pytest.approx(honest["pixels"]["real"], rel=0.3)
    copies = measured(shower(0.01), data, prompts=captions(60), n=60)
    assert copies["nearest"]["pixels"]["share"] > 0.9 and copies["nearest"]["features"]["share"] > 0.9
    assert any(line.endswith(": memorised") for line in copies["summary"])
    assert not honest["features"]["memorised"]
    # prompts that are no captions of the split are candidates beside its captions
    assert (
        copies["measures"]["prompt_match"]["reference_count"] == 84 and copies["measures"]["prompt_match"]["value"] == 1
    )


def test_repeats_and_the_cache(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(shower(), data, repeats=2, n=20)
    assert result["deviation"]["prompt_match"] == 0 and result["repeats"] == 2
    assert len(list((tmp_path / "cache" / "features").glob("*.safetensors"))) == 2
    monkeypatch.setattr("hasten.workflows.captioned.extract", None)  # features are there
    open_captioned(data, OracleJudge(), (3, SIDE, SIDE))
    (data / "test" / "000.png").write_bytes((data / "test" / "001.png").read_bytes())
    with pytest.raises(TypeError):
        open_captioned(data, OracleJudge(), (3, SIDE, SIDE))


def test_statistics_travel_with_a_bundled_judge(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tests.judges import towers_folder

    folder = towers_folder(tmp_path / "judge", half=True)
    assert bundled_captions(folder) is None
    model = shower(card={"judge": "mine"})
    live = evaluate_model(model, EvaluateConfig(data=str(data), judge=folder), guidance_scale=1)
    save_captioned(open_captioned(data, folder, (3, SIDE, SIDE)), folder)
    monkeypatch.setitem(BUNDLED_JUDGES, "mine", folder)
    assert set(bundled_captions("mine").calibration_prompts) == set(captions(60))
    lines: list[str] = []
    stored = evaluate_model(model, guidance_scale=1, warn=lines.append)
    assert any("nearest training pictures" in line for line in lines)
    assert stored["prompts"] == live["prompts"]
    for name in ("frechet", "prompt_match", "diversity"):
        assert stored["measures"][name]["value"] == pytest.approx(live["measures"][name]["value"], rel=1e-5)
    assert stored["prompt_match"]["real"] == live["prompt_match"]["real"] and stored["nearest"] == {}
    assert len(stored["measures"]["frechet"]["features"]) > 10
    towers_folder(tmp_path / "other", seed=3)
    (folder / "towers.safetensors").write_bytes((tmp_path / "other" / "towers.safetensors").read_bytes())
    with pytest.raises(BadInput, match="the statistics are of"):
        evaluate_model(model)


def test_what_cannot_be_measured_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    model, judge = shower(), OracleJudge()
    with pytest.raises(BadInput, match="shower names no judge"):
        evaluate_model(model, EvaluateConfig(data=str(data)))
    with pytest.raises(BadInput, match="leave out --reference"):
        evaluate_model(model, EvaluateConfig(data=str(data), judge=judge, reference="fashion"))
    with pytest.raises(BadInput, match="tiny takes no prompts"):
        evaluate_model(tiny_model(), EvaluateConfig(data=str(data), judge=judge))
    with pytest.raises(BadInput, match="split"):
        evaluate_model(model, EvaluateConfig(data=str(data), judge=judge, split="nosuch"))
    few = write_captioned(tmp_path / "few", {"train": 30, "test": 10})
    with pytest.raises(BadInput, match="holds 10 captioned pictures: a reference needs at least 20"):
        evaluate_model(model, EvaluateConfig(data=str(few), judge=judge))
    (data / "test" / "metadata.jsonl").unlink()
    with pytest.raises(BadInput, match="caption"):
        evaluate_model(model, EvaluateConfig(data=str(data), judge=judge))


def test_without_training_pictures_what_is_missing_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    found = measured(shower(), write_captioned(tmp_path / "only", {"test": 24}), lines)
    assert found["nearest"] == {} and found["measures"]["frechet"]["floor"] is None
    assert any("has no training pictures" in line for line in lines)


def test_long_and_empty_prompts(data: Path) -> None:
    texts = ["", "fox " * 2500, "red fox 0"]
    found = measured(shower(), data, prompts=texts, n=12)
    assert (
        found["measures"]["prompt_match"]["reference_count"] == 27 and found["measures"]["prompt_match"]["value"] == 1
    )


def test_the_command_measures_a_pipeline_of_diffusers(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from tests.adapters import tiny
    from tests.judges import clip_folder

    tiny.sd_pipeline().save_pretrained(tmp_path / "pipe")
    judge = clip_folder(tmp_path / "clip")
    words = ["--data", data, "--judge", judge, "--steps", 2, "--n", 12, "--precision", "fp32", "--images-per-prompt", 2]
    code, out, err = run_cli("evaluate", tmp_path / "pipe", *words, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert set(result["measures"]) >= {"frechet", "kid", "prompt_match", "diversity"}
    assert result["judge"]["name"] == load_judge(judge).name and result["nearest"]["pixels"]["real"] > 0
    code, out, err = run_cli("evaluate", tmp_path / "pipe", *words)
    assert code == 0 and "prompt match" in out and "nearest of 60 training pictures in pixels" in out
    with torch.no_grad():
        assert to_float(torch.zeros(1, dtype=torch.uint8)) == -1
