"""A model folder holds the old model or the new one at every moment, and other folders are not overwritten."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import hasten
from hasten.errors import BadInput
from hasten.model import Model
from hasten.plan import plan
from hasten.samplers.ddim import DDIM
from hasten.storage.atomic import refuse_other_model
from hasten.times import UniformTime
from hasten.utils.atomic import LEFTOVER

from .factories import constant_model, fill, tiny_unet

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def full_model(value: float) -> Model:
    """A tiny model with files of every kind, all of which depend on `value`."""
    model = constant_model(value)
    schedule = model.denoiser.schedule
    model.plan = plan(DDIM(), schedule, UniformTime()(schedule, 2 + int(value)))
    model.plans = {"few": model.plan}
    model.statistics = {"gamma": torch.full((3,), value, dtype=torch.float64)}
    model.parts = {"helper": fill(tiny_unet(), value)}
    return model


def value_of(folder: Path) -> float:
    """The value of the model in a folder, which must be the same in all files."""
    loaded_model = hasten.load(folder)
    value = float(loaded_model.statistics["gamma"][0])
    assert (
        loaded_model.name == f"m{value:g}" and loaded_model.plan is not None and loaded_model.plan.nfe == 2 + int(value)
    )
    assert loaded_model.plans["few"].nfe == loaded_model.plan.nfe
    for net in (loaded_model.denoiser.net, loaded_model.parts["helper"]):
        assert all(bool((p == value).all()) for p in net.parameters())
    return value


def killed_after(calls: int, folder: Path, saved: Model) -> bool:
    """Save in a process that is killed after so many file operations; returns whether it was."""
    pid = os.fork()
    if not pid:
        remaining = [calls]

        def counted(real: object) -> object:
            def call(*args: object, **options: object) -> object:
                output = real(*args, **options)  # type: ignore[operator]
                remaining[0] -= 1
                if not remaining[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return output

            return call

        os.replace, os.unlink = counted(os.replace), counted(os.unlink)  # type: ignore[assignment]
        os.fsync = counted(os.fsync)  # type: ignore[assignment]
        saved.save(folder)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_killed_at_any_point_the_folder_holds_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    old, new = full_model(1.0), full_model(2.0)
    old.save(tmp_path / "fresh")
    names = {p.relative_to(tmp_path / "fresh").as_posix() for p in (tmp_path / "fresh").rglob("*") if p.is_file()}
    assert names == {
        "model.json",
        "weights.safetensors",
        "plan.json",
        "plans/few.json",
        "statistics.safetensors",
        "parts/helper.safetensors",
    }
    seen, calls = [], 1
    while True:
        folder = tmp_path / str(calls)
        old.save(folder)
        died = killed_after(calls, folder, new)
        seen.append(value_of(folder))
        new.save(folder)  # the same call repairs it
        assert value_of(folder) == 2.0
        assert not [p for p in folder.rglob("*") if LEFTOVER.fullmatch(p.name) or p.name == ".lock"]
        assert len([p for p in folder.rglob("*") if p.is_file()]) == len(names)
        if not died:
            break
        calls += 1
    assert calls > 12 and seen == sorted(seen) and set(seen) == {1.0, 2.0}


def test_a_first_save_that_was_killed_leaves_no_half_model(tmp_path: Path) -> None:
    for calls in (1, 4, 8, 12):
        folder = tmp_path / str(calls)
        assert killed_after(calls, folder, full_model(1.0))
        if (folder / "model.json").exists():
            assert value_of(folder) == 1.0
        else:
            with pytest.raises(BadInput, match="not a model that hasten saved"):
                hasten.load(folder)
        full_model(2.0).save(folder)
        assert value_of(folder) == 2.0


def test_concurrent_reads_get_one_model_or_the_other(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one, two = full_model(1.0), full_model(2.0)
    one.save(tmp_path / "m")
    pid = os.fork()
    if not pid:
        for _ in range(6):
            two.save(tmp_path / "m")
            one.save(tmp_path / "m")
        os._exit(0)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert value_of(tmp_path / "m") in (1.0, 2.0)
    assert value_of(tmp_path / "m") == 1.0


def test_leftovers_of_the_same_pid_are_harmless(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "m"):
        (folder / f".m.{os.getpid()}.tmp").mkdir(parents=True)
        (folder / f".m.{os.getpid()}.tmp" / "weights.safetensors").write_text("half")
    full_model(1.0).save(tmp_path / "m")
    assert value_of(tmp_path / "m") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert not [p for p in (tmp_path / "m").iterdir() if p.name.startswith(".")]


def test_unchanged_files_stay(tmp_path: Path) -> None:
    saved = full_model(1.0)
    saved.save(tmp_path)
    before = (tmp_path / "weights.safetensors").stat()
    saved.statistics = {"gamma": torch.zeros(3, dtype=torch.float64)}
    saved.save(tmp_path)
    after = (tmp_path / "weights.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    description = json.loads((tmp_path / "model.json").read_text())
    assert (
        description["statistics"]["file"] != "statistics.safetensors"
        and not (tmp_path / "statistics.safetensors").exists()
    )
    assert float(hasten.load(tmp_path).statistics["gamma"][0]) == 0


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_model(1.0).save(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match="cannot save the model in .*: No space left on device"):
        full_model(2.0).save(tmp_path)
    monkeypatch.undo()
    assert value_of(tmp_path) == 1.0


def test_another_model_is_not_overwritten(tmp_path: Path) -> None:
    saved = full_model(1.0)
    refuse_other_model(tmp_path / "none", saved)
    saved.save(tmp_path / "m")
    refuse_other_model(tmp_path / "m", hasten.load(tmp_path / "m"))
    for other in (full_model(2.0), Model(saved.denoiser, "x", saved.shape, saved.classes, card={"tuned": []})):
        with pytest.raises(BadInput, match="holds the model m1 already, and not"):
            refuse_other_model(tmp_path / "m", other)
    # changed since it was loaded: the changes would be lost
    loaded = hasten.load(tmp_path / "m")
    saved.card = {"tuned": [{"identity": "abc"}]}
    saved.save(tmp_path / "m")
    with pytest.raises(BadInput, match="as it was loaded"):
        refuse_other_model(tmp_path / "m", loaded)
    refuse_other_model(tmp_path / "m", loaded, "abc")  # the same run again
    with pytest.raises(BadInput):
        refuse_other_model(tmp_path / "m", loaded, "abd")
