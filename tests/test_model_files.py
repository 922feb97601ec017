"""A model's folder is the old model or the new one at every moment, and nothing else is written over."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.plan import plan
from hasten.predictions import V
from hasten.samplers.ddim import DDIM
from hasten.schedules import VPCosine
from hasten.storage.atomic import refuse_other_model
from hasten.times import UniformTime
from hasten.utils.atomic import LEFTOVER

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def model(value: float) -> Model:
    """A tiny model all of whose files depend on `value`."""
    torch.manual_seed(0)
    net = UNet(1, widths=(8,), classes=2, embedding=8)
    for p in net.parameters():
        nn.init.constant_(p, value)
    made = Model(Denoiser(net, VPCosine(), V()), f"m{value:g}", (1, 8, 8), ("a", "b"))
    schedule = made.denoiser.schedule
    made.plan = plan(DDIM(), schedule, UniformTime()(schedule, 2 + int(value)))
    made.plans = {"few": made.plan}
    made.statistics = {"gamma": torch.full((3,), value, dtype=torch.float64)}
    made.parts = {"helper": UNet(1, widths=(8,), embedding=8)}
    for p in made.parts["helper"].parameters():
        nn.init.constant_(p, value)
    return made


def value_of(folder: Path) -> float:
    """The value of the model in a folder, in all of whose files it must be the same."""
    found = hasten.load(folder)
    value = float(found.statistics["gamma"][0])
    assert found.name == f"m{value:g}" and found.plan is not None and found.plan.nfe == 2 + int(value)
    assert found.plans["few"].nfe == found.plan.nfe
    for net in (found.denoiser.net, found.parts["helper"]):
        assert all(bool((p == value).all()) for p in net.parameters())
    return value


def killed_after(calls: int, folder: Path, made: Model) -> bool:
    """Save in a process that is killed after so many renames and removals of files; whether it was."""
    pid = os.fork()
    if not pid:
        left = [calls]

        def counted(real: object) -> object:
            def call(*args: object, **options: object) -> object:
                found = real(*args, **options)  # type: ignore[operator]
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            return call

        os.replace, os.unlink = counted(os.replace), counted(os.unlink)  # type: ignore[assignment]
        os.fsync = counted(os.fsync)  # type: ignore[assignment]
        made.save(folder)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_killed_at_any_point_the_folder_holds_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    old, new = model(1.0), model(2.0)
    old.save(tmp_path / "fresh")
    names = {p.relative_to(tmp_path / "fresh").as_posix() for p in (tmp_path / "fresh").rglob("*") if p.is_file()}
    assert names == {"model.json", "weights.safetensors", "plan.json", "plans/few.json", "statistics.safetensors",
                     "parts/helper.safetensors"}  # fmt: skip
    seen, calls = [], 1
    while True:
        folder = tmp_path / str(calls)
        old.save(folder)
        died = killed_after(calls, folder, new)
        seen.append(value_of(folder))
        new.save(folder)  # the same command mends it
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
        assert killed_after(calls, folder, model(1.0))
        if (folder / "model.json").exists():
            assert value_of(folder) == 1.0
        else:
            with pytest.raises(BadInput, match="not a model that hasten saved"):
                hasten.load(folder)
        model(2.0).save(folder)
        assert value_of(folder) == 2.0


def test_whoever_reads_meanwhile_gets_one_model_or_the_other(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one, two = model(1.0), model(2.0)
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


def test_leftovers_of_the_same_process_number_do_no_harm(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "m"):
        (folder / f".m.{os.getpid()}.tmp").mkdir(parents=True)
        (folder / f".m.{os.getpid()}.tmp" / "weights.safetensors").write_text("half")
    model(1.0).save(tmp_path / "m")
    assert value_of(tmp_path / "m") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert not [p for p in (tmp_path / "m").iterdir() if p.name.startswith(".")]


def test_what_did_not_change_stays_as_it_is(tmp_path: Path) -> None:
    made = model(1.0)
    made.save(tmp_path)
    before = (tmp_path / "weights.safetensors").stat()
    made.statistics = {"gamma": torch.zeros(3, dtype=torch.float64)}
    made.save(tmp_path)
    after = (tmp_path / "weights.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    told = json.loads((tmp_path / "model.json").read_text())
    assert told["statistics"]["file"] != "statistics.safetensors" and not (tmp_path / "statistics.safetensors").exists()
    assert float(hasten.load(tmp_path).statistics["gamma"][0]) == 0


def test_a_full_disk_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(1.0).save(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match="cannot save the model in .*: No space left on device"):
        model(2.0).save(tmp_path)
    monkeypatch.undo()
    assert value_of(tmp_path) == 1.0


def test_another_model_is_not_written_over(tmp_path: Path) -> None:
    made = model(1.0)
    refuse_other_model(tmp_path / "none", made)
    made.save(tmp_path / "m")
    refuse_other_model(tmp_path / "m", hasten.load(tmp_path / "m"))
    for other in (model(2.0), Model(made.denoiser, "x", made.shape, made.classes, card={"tuned": []})):
        with pytest.raises(BadInput, match="holds the model m1 already, and not"):
            refuse_other_model(tmp_path / "m", other)
    # changed since it was loaded: what was found meanwhile would be lost
    loaded = hasten.load(tmp_path / "m")
    made.card = {"tuned": [{"identity": "abc"}]}
    made.save(tmp_path / "m")
    with pytest.raises(BadInput, match="as it was loaded"):
        refuse_other_model(tmp_path / "m", loaded)
    refuse_other_model(tmp_path / "m", loaded, "abc")  # the same run again
    with pytest.raises(BadInput):
        refuse_other_model(tmp_path / "m", loaded, "abd")
