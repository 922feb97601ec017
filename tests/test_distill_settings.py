"""What `distill_model` passes on to its tasks: precision, seed, classes, codec, minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hasten.workflows.distill as module
from hasten.denoiser import Denoiser
from hasten.distillers import _task as tasks
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine
from hasten.workflows.distill import distill_model
from hasten.workflows.distill_data import class_labels_only


class Stop(Exception):
    """What ends a run when its settings are known."""


def tiny(classes: int = 3, null: int | None = None) -> Model:
    torch.manual_seed(0)
    net = UNet(1, widths=(8,), classes=classes, embedding=16)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    names = tuple(f"class {k}" for k in range(classes))
    denoiser = Denoiser(net, VPCosine(offset=0.0), V(), null_label=null)
    return Model(denoiser, "tiny", (1, 8, 8), names)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(60) % 3)
    return tmp_path / "data.npz"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the first stage is trained with; then the run ends."""
    captured: dict[str, Any] = {}

    class Watched(tasks.Fit):
        def __call__(self, modules: Any, batches: Any, out: Any, show: bool = True) -> Any:
            captured.update(vars(self), batches=batches)
            raise Stop

    monkeypatch.setattr(tasks, "Fit", Watched)
    real = module.DistillTask

    def watched(**settings: Any) -> Any:
        captured["task"] = settings
        return real(**settings)

    trial = module.DryRun

    def tried(**settings: Any) -> Any:
        captured["trial"] = settings
        return trial(**settings)

    monkeypatch.setattr(module, "DistillTask", watched)
    monkeypatch.setattr(module, "DryRun", tried)
    return captured


def run(model: Model, data: Path | None, out: Path, **settings: Any) -> None:
    settings = {"method": "progressive:steps=(2,)", "steps": 4, "batch_size": 4, "show": False, **settings}
    with pytest.raises(Stop):
        distill_model(model, out, data=data, **settings)


@pytest.mark.parametrize("runtime", ["fp32", "bf16"])
def test_training_uses_the_requested_precision(
    runtime: str, data: Path, tmp_path: Path, recorded: dict[str, Any]
) -> None:
    run(tiny(), data, tmp_path / "out", precision=runtime)
    assert recorded["precision"] == recorded["task"]["precision"] == recorded["trial"]["precision"] == runtime
    assert json.loads((tmp_path / "out" / "run.json").read_text())["precision"] == runtime


def test_a_run_resumes_in_the_precision_it_began_in(
    data: Path, tmp_path: Path, recorded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a timing finds may differ from day to day."""
    for captured, began in (("bf16", "bf16"), ("fp32", "bf16")):
        monkeypatch.setattr(module, "resolve_precision", lambda *a, captured=captured: captured)
        run(tiny(), data, tmp_path / "out")
        assert recorded["precision"] == began


@pytest.mark.parametrize("seed", [7])
def test_the_seed_orders_the_batches_too(seed: int, data: Path, tmp_path: Path, recorded: dict[str, Any]) -> None:
    run(tiny(), data, tmp_path / "out", precision="fp32", seed=seed)
    assert recorded["batches"].seed == seed and recorded["seed"] == 1009 * seed
    run(tiny(), data, tmp_path / "other", precision="fp32", seed=seed + 1)
    assert recorded["batches"].seed == seed + 1


def test_a_task_has_classes_codec_and_the_minutes_of_its_stages(
    data: Path, tmp_path: Path, recorded: dict[str, Any]
) -> None:
    model = tiny()
    model.codec = "latent"
    run(model, data, tmp_path / "out", precision="fp32", minutes=0.5, steps=None)
    assert (recorded["task"]["classes"], recorded["task"]["codec"]) == (3, "latent")
    assert recorded["task"]["minutes"] == {"steps2": pytest.approx(0.55)} and recorded["minutes"] == pytest.approx(0.55)
    run(model, data, tmp_path / "steps", precision="fp32")
    assert recorded["minutes"] is None


def test_models_that_draw_their_own_images_have_no_null_label_among_their_classes() -> None:
    for null, wanted in ((None, {0, 1, 2}), (0, {1, 2}), (1, {0, 2}), (3, {0, 1, 2})):
        labels = class_labels_only(tiny(null=null)).labels
        assert labels is not None and set(labels.tolist()) == wanted
        assert len(set(torch.bincount(labels)[sorted(wanted)].tolist())) == 1, "in equal parts"
    assert len(set(class_labels_only(tiny(classes=100)).labels.tolist())) == 100  # type: ignore[union-attr]


def test_notices_about_half_precision_and_split_batches(
    data: Path, tmp_path: Path, recorded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny(), data, tmp_path / "out", precision="fp32", method="mmd:steps=1,features=random", grad_accumulation=2)
    captured = capsys.readouterr()
    assert (
        "hasten: mmd compares the samples of a batch" in captured.err
        and "2 of the 4" in captured.err
        and not captured.out
    )
