"""`hasten distill`: budget, dry run, resume after a kill, the card of a student."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hasten
from hasten.cli import main
from hasten.denoiser import Denoiser
from hasten.distillers._dry_run import StagePlan, allocate
from hasten.errors import BadInput
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine

METHOD = "guided:steps=(4,2),guidance=(1,3)"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of three classes and images for it."""
    folder = tmp_path_factory.mktemp("distill")
    torch.manual_seed(0)
    net = UNet(1, widths=(8,), classes=3, embedding=16)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    Model(Denoiser(net, VPCosine(offset=0.0), V()), "tiny", (1, 8, 8), ("a", "b", "c")).save(folder / "tiny")
    g = np.random.default_rng(0)
    np.savez(folder / "data.npz", images=g.integers(0, 256, (60, 8, 8), dtype=np.uint8), labels=np.arange(60) % 3)
    return folder


def command_line(place: Path, out: Path, *more: str, method: str = METHOD, model: str = "tiny") -> list[str]:
    return ["distill", str(place / model), "--data", str(place / "data.npz"), "--out", str(out), "--method", method,
            "--batch-size", "8", "--precision", "fp32", "--device", "cpu", *more]  # fmt: skip


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A finished run."""
    assert main(command_line(place, place / "run", "--steps", "60")) == 0
    return place / "run"


def test_every_stage_is_a_model_and_a_picture(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {p.name for p in finished.glob("*.png")} == {"guidance.png", "steps4.png", "steps2.png"}
    for name, steps in (("guidance", 16), ("steps4", 4), ("steps2", 2), (".", 2)):
        model = hasten.load(finished / name)
        assert model.steps == steps and model.denoiser.guidance_range == (1.0, 3.0)
        assert model.sample(2, guidance_scale=2.5).shape == (2, 1, 8, 8)
    report = hasten.load(finished).card["distilled"]
    assert report["teacher"] == "tiny" and report["steps"] == 2 and report["guidance_scale"] == [1.0, 3.0]
    assert report["method"] == "guided:steps=(4,2),guidance=(1,3)" and [s["name"] for s in report["stages"]]
    same = torch.equal(hasten.load(finished).sample(2, seed=3), hasten.load(finished / "steps2").sample(2, seed=3))
    assert same


def test_its_plan_is_what_sample_runs_and_each_step_is_one_evaluation(finished: Path) -> None:
    model = hasten.load(finished / "steps4")
    assert model.plan is not None and model.plan.nfe == 4
    count = 0

    def hook(*_: object) -> None:
        nonlocal count
        count += 1

    model.denoiser.net.register_forward_hook(hook)
    model.sample(3, guidance_scale=3.0)
    assert count == 4


def test_a_scale_out_of_range_is_one_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(finished), "--guidance-scale", "7", "--out", str(tmp_path / "x.png")]) == 1
    assert "distilled for guidance_scale 1 to 3, asked for 7" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


def test_the_same_call_again_changes_nothing(place: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    assert main(command_line(place, finished, "--steps", "60")) == 0
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")} == before
    assert main(command_line(place, finished, "--steps", "61")) == 1
    assert "is a run with budget" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_an_undisturbed_one(place: Path, finished: Path, tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "hasten", *command_line(place, tmp_path / "run", "--steps", "60")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # somewhere in the second stage, at a moment of its own choosing
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "stages" / "1-steps4").exists() and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(number)
    first.wait(60)
    assert first.returncode in (0, -number, 130)
    assert not (tmp_path / "run" / "model.json").exists() or first.returncode == 0
    # the budget was divided by steps alone, so timings that differ from those of `made` do not matter
    assert main(command_line(place, tmp_path / "run", "--steps", "60")) == 0
    full, again = (hasten.load(folder).denoiser.state_dict() for folder in (finished, tmp_path / "run"))
    for key, value in full.items():
        assert torch.allclose(value, again[key], atol=1e-6), key


def test_a_dry_run_reports_the_cost_and_writes_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dry"
    assert main(command_line(place, out, "--evaluations", "1e5", "--dry-run", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert not out.exists()
    costs = {stage["name"]: stage["evaluations"] / 8 for stage in report["stages"]}
    # teacher's branches 2, or its two steps, and forward and backward of the student: 5 each (a little less: the first
    # layer's input needs no gradient)
    assert list(costs) == ["guidance", "steps4", "steps2"]
    assert all(4.5 < cost <= 5.1 for cost in costs.values()), costs
    assert 0.9e5 < report["evaluations"] <= 1e5 and report["memory_bytes"] > 0


def test_a_student_is_distilled_further_from_its_own_steps_only(
    place: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "guided:steps=(2,1)"
    assert main(command_line(place, tmp_path / "x", "--steps", "9", method=method, model="run/steps4")) == 0
    assert (
        main(command_line(place, tmp_path / "y", "--steps", "9", method="guided:steps=(8,4)", model="run/steps4")) == 1
    )
    assert "a student of 4 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (["--steps", "2"], "no step for the stage"),
        (["--minutes", "-1"], "minutes must be positive"),
        (["--method", "gided"], "unknown distiller 'gided'"),
        (["--method", "guided:steps=(8,3)"], "3 steps cannot follow 8"),
        (["--batch-size", "0"], "batch_size"),
        (["--guidance-scale", "nan"], "guidance_scale"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command_line(place, tmp_path / "bad")
    for flag, value in zip(more[::2], more[1::2], strict=True):
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        else:
            arguments += [flag, value]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "bad").exists()


def test_what_trains_on_the_teachers_samples_needs_no_images(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "denoising_student:pairs=64,pair_steps=4"
    arguments = command_line(place, tmp_path / "own", "--steps", "8", method=method)
    del arguments[(k := arguments.index("--data")) : k + 2]
    assert main(arguments) == 0
    assert hasten.load(tmp_path / "own").steps == 1
    capsys.readouterr()
    assert main(["distill", str(place / "tiny"), "--out", str(tmp_path / "no"), "--method", "progressive"]) == 1
    assert "progressive needs real images" in capsys.readouterr().err


def test_the_budget_is_divided_by_share_and_cost() -> None:
    stages = [
        StagePlan("a", 100, 2.0),
        StagePlan("b", 200, 4.0, share=2.0),
        StagePlan("pairs", 10, 0.1, pairs=50),
    ]
    allocate(stages, steps=None, minutes=None, evaluations=10_000)
    assert [s.steps for s in stages] == [31, 31, 50]  # (10000 - 500) / 3 / 100, twice that / 200
    allocate(stages, steps=30, minutes=None, evaluations=None)
    assert [s.steps for s in stages] == [10, 20, 50]
    allocate(stages, steps=1000, minutes=2, evaluations=None)
    assert [s.steps for s in stages] == [19, 19, 50]  # (120 - 5) / 3 / 2
    with pytest.raises(BadInput, match="leaves no step"):
        allocate(stages, steps=None, minutes=None, evaluations=600)


def test_a_method_without_scales_is_given_the_network_for_one(place: Path, finished: Path, tmp_path: Path) -> None:
    arguments = command_line(place, tmp_path / "run", "--steps", "9", "--guidance-scale", "2.5",
                      method="progressive:steps=(2,),start=4", model="run/guidance")  # fmt: skip
    assert main(arguments) == 0
    student = hasten.load(tmp_path / "run")
    assert student.denoiser.guidance_range == (2.5, 2.5) and student.guidance_scale == 2.5
    assert not student.denoiser.net_takes_guidance
    with pytest.raises(BadInput, match="2.5 only"):
        student.sample(1, guidance_scale=2)
