"""`hasten train --from` and `--structure`: a saved model is trained further, with its own schedule and prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.errors import BadInput
from hasten.loading import load
from hasten.model import Model
from hasten.schedules import VPLinear
from hasten.train import Data
from hasten.workflows.train import train_model

from .factories import noise_data, pipeline, run_cli, tiny_model, weights

CLASSES = ("a", "b")


def saved(folder: Path, **options: Any) -> Model:
    model = tiny_model(CLASSES, **{"guidance_scale": 2.0, **options})
    model.save(folder)
    return model


def trained(origin: Path, out: Path, data: Any = None, **options: Any) -> Model:
    data = noise_data(12, classes=("b", "a")) if data is None else data
    settings = {"steps": 2, "batch_size": 4, "precision": "fp32", "show": False, "device": "cpu", **options}
    return train_model(data, out, init_from=str(origin), **settings)


@pytest.mark.parametrize(("schedule", "prediction"), [(None, "v"), (VPLinear(), "eps")])
def test_a_model_is_trained_further(tmp_path: Path, schedule: Any, prediction: str) -> None:
    origin = saved(tmp_path / "one", schedule=schedule, prediction=prediction)
    result = trained(tmp_path / "one", tmp_path / "two")
    assert result.denoiser.prediction.name == prediction
    assert result.denoiser.schedule.to_dict() == origin.denoiser.schedule.to_dict()
    assert result.classes == CLASSES and result.guidance_scale == 2.0 and result.card["from"] == "tiny"
    moved = float((weights(result.denoiser) - weights(origin.denoiser)).abs().max())
    assert 0 < moved < 1e-3  # a warm-up of 1e-4
    again = load(tmp_path / "two")
    assert torch.equal(weights(again.denoiser), weights(result.denoiser)) and again.denoiser.null_label == 2


def test_labels_are_matched_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    data = noise_data(12, classes=CLASSES)
    swapped = replace(data, labels=1 - data.labels, classes=("b", "a"))
    one, two = (trained(tmp_path / "one", tmp_path / name, each) for name, each in (("x", data), ("y", swapped)))
    assert torch.equal(weights(one.denoiser), weights(two.denoiser))


def test_weight_zero_is_the_plain_run_and_resumes_exactly(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    plain = weights(trained(tmp_path / "one", tmp_path / "plain").denoiser)
    zero = weights(trained(tmp_path / "one", tmp_path / "zero", structure=0.0).denoiser)
    term = trained(tmp_path / "one", tmp_path / "term", structure="weight=0.5,width=8")
    assert torch.equal(plain, zero) and not torch.equal(plain, weights(term.denoiser))
    assert term.card["structure"]["weight"] == 0.5 and term.card["structure"]["start"] == 0
    with pytest.raises(BadInput, match="structure"):
        trained(tmp_path / "one", tmp_path / "term", structure=0.2)
    line = (tmp_path / "term" / "log.jsonl").read_text()
    assert '"structure"' in line


def test_a_new_model_with_the_term_from_the_command_line(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", noise_data(8).images(list(range(8))).numpy()[:, 0])
    common = ("--steps", "3", "--batch-size", "4", "--widths", "8", "--device", "cpu", "--precision", "fp32")
    out = run_cli("train", tmp_path / "x.npy", "--out", tmp_path / "m", *common, "--structure", "weight=0.1,width=8")
    assert "3 steps" in out[1]
    out = run_cli("train", tmp_path / "x.npy", "--out", tmp_path / "n", "--from", tmp_path / "m", *common[:4])
    assert out[0] == 0, out


def test_pipelines_of_pixels(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    pipeline("ddpm").save_pretrained(tmp_path / "ddpm")
    model = load(tmp_path / "ddpm")
    data = noise_data(6, side=model.shape[-1])
    data = Data.of(data.images(list(range(6))).expand(-1, model.shape[0], -1, -1).contiguous())
    result = trained(tmp_path / "ddpm", tmp_path / "out", data, structure="weight=.1,width=8", steps=1)
    assert result.denoiser.prediction.name == "eps" and (tmp_path / "out" / "model_index.json").exists()
    again = load(tmp_path / "out")
    assert torch.equal(weights(again.denoiser), weights(result.denoiser))
    assert not torch.equal(weights(again.denoiser), weights(model.denoiser))


def test_refusals_are_one_line(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (noise_data(6, side=12, classes=CLASSES), {}, "shape"),
        (noise_data(6), {}, "labels"),
        (noise_data(6, classes=("a", "c")), {}, "c"),
        (None, {"widths": (8, 16)}, "widths"),
        (None, {"process": "i2sb"}, "process"),
        (None, {"size": 12}, "8x8"),
        (None, {"structure": 0.1, "fsdp": True}, "fsdp"),
        (None, {"structure": "0.1,foo=3"}, "foo|read"),
    ]
    for data, options, match in cases:
        with pytest.raises(BadInput, match=match) as error:
            trained(tmp_path / "one", tmp_path / "no", data, **options)
        assert "\n" not in str(error.value)
    student = tiny_model(CLASSES, card={"distilled": {"steps": 4}})
    student.save(tmp_path / "student")
    with pytest.raises(BadInput, match="distilled student"):
        trained(tmp_path / "student", tmp_path / "no")
    with pytest.raises(BadInput, match="trains in another way"):
        train_model(noise_data(6), tmp_path / "no", process="vdm", structure=0.1, steps=1, show=False, widths=(8,))
