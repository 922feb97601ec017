"""A run resumes with the same data and settings only, and a damaged image does not end it."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import hasten
from hasten.errors import BadInput
from hasten.train.checkpoint import saved_run
from hasten.train.data import Batches, open_data
from hasten.train.ema import Ema
from hasten.train.fingerprint import describe_data
from hasten.train.fit import Fit
from hasten.train.losses import cast_to_device, stratified
from hasten.train.trained_module import TrainedModule
from hasten.train.transfer import prefetch, to_device
from tests.factories import CLASSES, class_folders, noise_data, noise_images
from tests.test_training import trained


def test_tensors_are_cast_before_moving_to_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    plain = Tensor.to

    def to(self: Tensor, *where: Any, **more: Any) -> Tensor:
        if where and where[0] == torch.device("mps"):
            moved.append(self.dtype)
            return self
        return plain(self, *where, **more)

    monkeypatch.setattr(Tensor, "to", to)
    u = stratified(1000, "mps")  # stays on the CPU, in float64
    assert moved == [] and u.dtype == torch.float64 and u.device.type == "cpu"
    cast_to_device(torch.ones(2, dtype=torch.float64), torch.device("mps"))
    assert moved == [torch.float32]
    assert stratified(4).dtype == torch.float64


# ---- other data and settings raise ----


CHANGES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"source": noise_data(classes=CLASSES, images=noise_images(seed=1))}, "data.pixels"),
    (
        {"source": noise_data(classes=("coat", "bag", "x"))},
        r'data.classes \["coat", "bag", "boot"\], this one has \["coat", "bag", "x"\]',
    ),
    ({"source": replace(noise_data(classes=CLASSES), labels=torch.arange(12).flip(0) % 3)}, "data.labels"),
    ({"source": noise_data(11, classes=CLASSES)}, "images 12, this one has 11"),
    ({"lr": 0.5}, "players.model.lr 0.001, this one has 0.5"),
    ({"label_drop": 0.9}, "label_drop 0.1, this one has 0.9"),
    ({"flip": True}, "flip false, this one has true"),
    ({"seed": 1}, "seed 0, this one has 1"),
    ({"batch_size": 6}, "batch_size 4, this one has 6"),
    ({"precision": "bf16"}, "precision fp32, this one has bf16"),
    ({"precision": "fp32+high"}, "precision fp32, this one has fp32.high"),
    ({"widths": (16,)}, "network.widths"),
)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_of_other_data_or_settings_raises_finished_or_not(tmp_path: Path, steps: int) -> None:
    trained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    for change, message in CHANGES:
        with pytest.raises(BadInput, match=message) as error:
            trained(tmp_path, **{"steps": steps, **change})
        assert "\n" not in str(error.value) and "another folder" in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    model = trained(tmp_path, steps=steps)
    assert model.card["last"]["step"] == steps


def test_auto_takes_the_precision_of_the_run_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.workflows.train.autotune", lambda *_: hasten.performance.autotune.parse_runtime("bf16"))
    trained(tmp_path, precision="fp32")
    assert trained(tmp_path, precision="auto", steps=3).card["precision"] == "fp32"
    assert trained(tmp_path / "other", precision="auto").card["precision"] == "bf16"
    assert saved_run(tmp_path / "checkpoint.pt")["precision"] == "fp32"


def test_the_settings_of_every_trained_module_are_compared(tmp_path: Path) -> None:
    def fit(out: Path, steps: int = 2, ema: Ema | None = None, clip: float | None = 1.0, **options: Any) -> None:
        module = nn.Linear(64, 1)
        p = TrainedModule("net", module, lambda b: module(b["x"].flatten(1)).square().mean(), **options)
        Fit(steps=steps, ema=ema or Ema(), clip=clip, tensorboard=False)([p], Batches(noise_data(), 4), out)

    fit(tmp_path)
    for change, message in (
        ({"weight_decay": 0.5}, "players.net.weight_decay 0.01"), ({"betas": (0.5, 0.9)}, "players.net.betas"),
        ({"every": 2}, "players.net.every"), ({"ema": Ema(gamma=3.0)}, "ema.gamma 12.0"), ({"clip": None}, "clip 1.0"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            fit(tmp_path, **change)
    fit(tmp_path, 3, Ema(decay=0.5))  # which the EMA of kind power does not use


def test_a_finished_run_keeps_what_was_added_to_its_model_since(tmp_path: Path) -> None:
    model = trained(tmp_path)
    model.statistics = {"gamma": torch.ones(3, dtype=torch.float64)}
    model.card = {**model.card, "tuned": [{"method": "x"}]}
    model.save(tmp_path)
    assert trained(tmp_path).statistics.keys() == {"gamma"}
    assert hasten.load(tmp_path).statistics.keys() == {"gamma"}
    with pytest.raises(BadInput, match="a model that was tuned since"):
        trained(tmp_path, steps=5)
    assert hasten.load(tmp_path).statistics.keys() == {"gamma"}


@pytest.mark.parametrize("name", ["model.json", "model_index.json", "run.json"])
def test_a_folder_of_another_kind_raises_before_anything_is_written(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"card": {}}')
    with pytest.raises(BadInput, match=r"holds a .* already: choose another folder"):
        trained(out)
    assert [p.name for p in out.iterdir()] == [name]


# ---- fingerprints ----


@pytest.mark.parametrize("lazy", [False, True])
def test_the_fingerprint_depends_on_pixels_labels_and_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    if lazy:
        monkeypatch.setattr("hasten.train.folders.MEMORY", 0)
    first = describe_data(open_data(class_folders(tmp_path / "one")))
    assert first == describe_data(open_data(class_folders(tmp_path / "two")))  # in any folder
    assert json.loads(json.dumps(first)) == first
    assert first["pixels"] != describe_data(open_data(class_folders(tmp_path / "other", value=1)))["pixels"]
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    assert first["classes"] != describe_data(open_data(tmp_path / "two"))["classes"]
    changed = copy.copy(open_data(tmp_path / "one"))
    assert changed.labels is not None
    assert describe_data(replace(changed, labels=changed.labels.flip(0)))["labels"] != first["labels"]


def test_the_fingerprint_of_large_data_depends_on_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.train.folders.MEMORY", 0)
    monkeypatch.setattr("hasten.train.fingerprint.SAMPLE", 2)  # images that are decoded: the first and the last
    first = describe_data(open_data(class_folders(tmp_path / "a")))
    Image.effect_noise((8, 8), 80).save(tmp_path / "a" / "b" / "3.png")
    assert describe_data(open_data(tmp_path / "a"))["pixels"] != first["pixels"]


def test_a_damaged_image_of_a_large_set_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hasten.train.folders.MEMORY", 0)
    source = class_folders(tmp_path / "d")
    file = source / "b" / "3.png"
    file.write_bytes(file.read_bytes()[:-30])
    model = trained(tmp_path / "m", open_data(source, size=8, channels=1), steps=3)
    assert "3.png" in capsys.readouterr().err
    assert model.card["last"]["unreadable"] == 1
    batches = Batches(open_data(source, size=8, channels=1), 6, seed=0)
    first = batches[0]
    assert torch.equal(batches[0]["x"], first["x"])  # the same each time, so that a resumed run is exact
    gone = open_data(source, size=8, channels=1)
    for k in range(6):
        (source / "ab"[k % 2] / f"{k}.png").write_bytes(b"junk")
    with pytest.raises(BadInput, match=r"cannot (be )?read"):
        Batches(gone, 6)[0]


def test_batches_for_a_gpu_are_prefetched_in_pinned_memory_and_copied_asynchronously(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned, copies = [], []
    plain = Tensor.to

    def pin(self: Tensor) -> Tensor:
        pinned.append(threading.current_thread() is not threading.main_thread())
        return self

    def to(self: Tensor, *where: Any, **more: Any) -> Tensor:
        if where and where[0] == torch.device("cuda"):
            copies.append(more.get("non_blocking"))
            return self
        return plain(self, *where, **more)

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    batches, gpu = Batches(noise_data(classes=CLASSES), 4), torch.device("cuda")
    with prefetch(batches, gpu) as take:
        for step in range(3):
            batch = {key: to_device(value, gpu, False) for key, value in take(step).items()}
            assert torch.equal(batch["x"], batches[step]["x"])
    assert len(pinned) >= 6 and all(pinned) and copies == [True] * 6
    pinned.clear()
    with prefetch(batches, torch.device("cpu")) as take:
        take(0)
    assert not pinned
