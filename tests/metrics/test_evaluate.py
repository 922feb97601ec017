from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.errors import BadInput
from hasten.metrics import (
    Measure,
    evaluate_features,
    evaluate_images,
    feature_net,
    floor_table,
    make_reference,
    reference,
    reference_from_images,
    save_reference,
    spell_seeds,
)
from hasten.metrics.references import Reference, load_tensors


class Means(nn.Module):
    name = "means"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.mean(dim=(2, 3)), x[:, :, 0, 0], x[:, :, 1, 1]], dim=1)


@pytest.fixture
def normal() -> Reference:
    return make_reference(torch.randn(3000, 4), "normal", "test", "means", keep=300)


def test_the_bundled_reference_is_complete() -> None:
    expected = reference("fashion")
    assert expected.features == "fashion" and expected.split == "test" and expected.count == 10_000
    assert expected.mean.dtype == expected.covariance.dtype == torch.float64
    assert expected.sample.shape == (10_000, 128) and expected.histogram == (1000,) * 10
    assert expected.accuracy is not None and expected.accuracy > 0.92
    torch.testing.assert_close(expected.sample.double().mean(0), expected.mean, atol=1e-4, rtol=1e-3)
    table = expected.floor["frechet"]
    assert sorted(table) == [1000, 2000, 5000, 10_000]
    assert table[1000] > table[2000] > table[5000] > table[10_000] > 0
    assert table[2000] < expected.floor_at("frechet", 1500) < table[1000]


def test_images_are_measured_against_it_and_every_figure_says_how() -> None:
    images = torch.rand(200, 1, 28, 28) * 2 - 1
    labels = torch.arange(200) % 10
    result = evaluate_images(images, labels, seeds=range(5, 205), bootstrap=5)
    assert list(result) == [
        "frechet",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "inception_score",
        "accuracy",
    ]
    distance = result["frechet"]
    assert distance.value > 10 * reference("fashion").floor_at("frechet", 1000)  # noise is no garment
    assert distance.interval is not None and distance.interval[0] < distance.value < distance.interval[1]
    assert result["precision"].value < 0.2 and result["accuracy"].value < 0.5
    for measure in result.values():
        assert (measure.features, measure.reference) == ("fashion", "Fashion-MNIST test")
        assert (measure.count, measure.seeds) == (200, "5-204")
    assert result["precision"].reference_count == 200 and distance.reference_count == 10_000
    assert "accuracy" not in evaluate_images(images, bootstrap=0)


def test_a_perfect_generator_sits_at_its_floor_and_a_worse_one_above(normal: Reference) -> None:
    expected = replace(normal, floor=floor_table(torch.randn(2000, 4), normal, counts=(500, 1000), max_runs=2))
    good = evaluate_features(torch.randn(700, 4), expected)["frechet"]
    bad = evaluate_features(torch.randn(700, 4) * 1.3, expected)["frechet"]
    assert good.floor is not None and good.floor == expected.floor_at("frechet", 700)
    assert 0.3 < good.floors < 3
    assert bad.floors > 5
    assert (good.better, bad.features, bad.reference_count) == ("lower", "means", 3000)


def test_floor_is_linear_in_one_over_n(normal: Reference) -> None:
    table = {n: 0.1 + 50 / n for n in (1000, 2000, 5000)}
    expected = replace(normal, floor={"frechet": table, "accuracy": {10: 0.9}})
    for n in (500, 1000, 1300, 2000, 3000, 5000, 10_000):
        assert expected.floor_at("frechet", n) == pytest.approx(0.1 + 50 / n)
    assert expected.floor_at("frechet", 499) is None and expected.floor_at("frechet", 10_001) is None
    assert expected.floor_at("accuracy", 77) == 0.9
    assert expected.floor_at("kid", 1000) is None


def test_a_reference_survives_its_folder(tmp_path: Path, normal: Reference) -> None:
    saved = replace(normal, floor={"frechet": {100: 0.25}}, histogram=(1, 2))
    save_reference(saved, tmp_path / "r", {"note": "mine"})
    back = reference(tmp_path / "r")
    assert torch.equal(back.mean, saved.mean) and torch.equal(back.covariance, saved.covariance)
    assert torch.equal(back.sample, saved.sample)  # rounded when it was made, not when it was stored
    assert (back.name, back.split, back.features, back.count) == ("normal", "test", "means", 3000)
    assert back.floor == {"frechet": {100: 0.25}} and back.histogram == (1, 2) and back.accuracy is None
    assert json.loads((tmp_path / "r" / "features.json").read_text())["note"] == "mine"


def test_damage_is_detected(tmp_path: Path, normal: Reference) -> None:
    with pytest.raises(BadInput, match="did you mean 'fashion'"):
        reference("fashoin")
    with pytest.raises(BadInput, match=r"holds no features\.json"):
        reference(tmp_path)
    save_reference(normal, tmp_path)
    with pytest.raises(BadInput, match=r"weights\.safetensors is missing"):
        load_tensors(tmp_path, "weights")
    path = tmp_path / "reference.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="damaged or was replaced"):
        reference(tmp_path)
    path.unlink()
    with pytest.raises(BadInput, match="missing"):
        reference(tmp_path)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(BadInput, match="not readable JSON"):
        reference(tmp_path)
    (tmp_path / "features.json").write_text("[1]")
    with pytest.raises(BadInput, match="not a feature card"):
        reference(tmp_path)


def test_features_of_different_networks_never_meet(normal: Reference) -> None:
    with pytest.raises(BadInput, match="use features='fashion'"):
        evaluate_images(torch.zeros(20, 1, 28, 28), features=Means())
    with pytest.raises(BadInput, match="width 3 against a reference of width 4"):
        evaluate_features(torch.zeros(20, 3), normal)
    with pytest.raises(BadInput, match="too few"):
        evaluate_features(torch.zeros(9, 4), normal)


def test_own_images_and_own_network() -> None:
    images = torch.rand(1300, 1, 4, 4) * 2 - 1
    expected = reference_from_images(images[:300], "squares", "all", Means(), others=images[300:])
    assert sorted(expected.floor["frechet"]) == [1000]
    measure = evaluate_images(images[300:], features=Means(), reference=expected, bootstrap=0)["frechet"]
    assert measure.reference == "squares all" and measure.floor == pytest.approx(expected.floor["frechet"][1000])
    assert measure.value < 0.05


def test_the_bundled_network_and_reference_belong_together() -> None:
    assert feature_net("fashion").name == reference("fashion").features


def test_measures_travel_as_json_and_read_as_a_sentence() -> None:
    measure = Measure("frechet", 3.21, "fashion", "Fashion-MNIST test", 2000, 10_000, 0.1, "0-1999", (3.0, 3.4))
    assert Measure.from_dict(json.loads(json.dumps(measure.to_dict()))) == measure
    for word in ("3.21", "[3, 3.4]", "fashion features", "2000 samples", "floor 0.1", "seeds 0-1999"):
        assert word in str(measure)
    assert measure.floors == pytest.approx(32.1)
    with pytest.raises(BadInput, match="no field colour"):
        Measure.from_dict({**measure.to_dict(), "colour": 1})
    with pytest.raises(BadInput, match="not a measure"):
        Measure.from_dict({"name": "frechet"})


def test_seeds_are_spelled_as_ranges() -> None:
    assert spell_seeds([3, 1, 2, 9, 7, 8, 20]) == "1-3,7-9,20"
    assert spell_seeds(range(10_000)) == "0-9999"
    assert spell_seeds(None) == "not given" and spell_seeds("0-9") == "0-9"
