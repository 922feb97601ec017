"""The quantize verb: what it writes, a killed run that resumes, and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.cli import main
from hasten.errors import BadInput
from hasten.workflows.quantize import BLOCKS, RUN, quantize_model
from tests.test_model import tiny

LEARNED = ("--weight-bits", "4", "--iterations", "6", "--images", "4", "--learn-step-sizes", "--json")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tiny().save(tmp_path / "float"))


def test_the_saved_model_is_sampled_like_any_other(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", folder, "--out", str(tmp_path / "q"), "--images", "4", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    model, plain = hasten.load(tmp_path / "q"), hasten.load(folder)
    card = model.card["quantized"]
    assert card["model_sha256"] == plain.sha256 and card["weights"] == card["acts"] == 8
    assert card["calibration"]["calls"] == 4 * plain.steps and card["calibration"]["sampler"] == "unipc"
    assert 0 < card["error"] < 0.05 and info["error"] == card["error"] and card["method"] == "quantize:images=4"
    assert model.name == "q" and model.classes == plain.classes and model.steps == plain.steps
    images = model.sample(3)
    assert 0 < (images - plain.sample(3)).square().mean().sqrt() < 0.1
    assert main(["sample", str(tmp_path / "q"), "--n", "2", "--out", str(tmp_path / "x.png")]) == 0
    assert torch.equal(hasten.load(tmp_path / "q").sample(3), images)
    # what is quantised already is refused, and so is a folder that holds a model of something else
    capsys.readouterr()
    assert main(["quantize", str(tmp_path / "q"), "--out", str(tmp_path / "qq")]) == 1
    assert "quantised already" in capsys.readouterr().err
    assert main(["quantize", folder, "--out", folder]) == 1
    assert "holds a model already" in capsys.readouterr().err
    assert main(["quantize", folder, "--out", str(tmp_path / "q"), "--images", "5"]) == 1
    assert "is a run with method quantize:images=4, requested quantize:images=5" in capsys.readouterr().err
    assert main(["quantize", folder, "--out", str(tmp_path / "q"), "--images", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == card["error"]  # done before: read from the model card


def test_groups_and_a_branch_are_saved_too(folder: str, tmp_path: Path) -> None:
    model = hasten.load(folder)
    quantize_model(model, tmp_path / "q", images=4, groups=3, rank=2, keep=("time",))
    again = hasten.load(tmp_path / "q")
    assert len(again.denoiser.net.bounds) == 2 and isinstance(again.denoiser.net.time[1], torch.nn.Linear)
    built = again.sample(2, guidance_scale=2.0)
    assert (built - model.sample(2, guidance_scale=2.0)).abs().max() < 0.2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_resumes_and_ends_the_same(folder: str, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "hasten", "quantize", folder, "--out", str(tmp_path / out), *LEARNED]

    full = subprocess.run(command("whole"), env=env, capture_output=True, text=True)
    assert full.returncode == 0, full.stderr
    with subprocess.Popen(command("killed"), env=env, stdout=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 200
        while len(list((tmp_path / "killed" / BLOCKS).glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
    saved = sorted((tmp_path / "killed" / BLOCKS).glob("*.safetensors"))
    assert 3 <= len(saved) < 26 and not (tmp_path / "killed" / "model.json").exists()
    stamps = [file.stat().st_mtime_ns for file in saved]
    on = subprocess.Popen(command("killed"), env=env, stdout=subprocess.PIPE, text=True)
    assert json.loads(on.communicate()[0])["blocks"] == json.loads(full.stdout)["blocks"]
    assert not (tmp_path / "killed" / BLOCKS).exists() and len(stamps) >= 3
    weights = [(tmp_path / out / "weights.safetensors").read_bytes() for out in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_a_saved_block_is_not_learned_again(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.accelerators._quantization import session

    recorded: list[int] = []
    real = session.learn_rounding

    def once(block: Any, iterations: int, **options: Any) -> Any:
        if len(recorded) == 4:
            raise KeyboardInterrupt
        recorded.append(iterations)
        return real(block, iterations, **options)

    model, message = hasten.load(folder), []
    options: dict[str, Any] = {"weights": 4, "acts": None, "iterations": 2, "images": 2}
    monkeypatch.setattr(session, "learn_rounding", once)
    with pytest.raises(KeyboardInterrupt, match="stopped with 4 blocks done"):
        quantize_model(model, tmp_path / "q", **options)
    assert len(list((tmp_path / "q" / BLOCKS).iterdir())) == 4
    monkeypatch.setattr(session, "learn_rounding", real)
    began = len(recorded)
    result = quantize_model(model, tmp_path / "q", say=message.append, **options)
    assert len(recorded) == began == 4 and result["iterations"]["rounding"] == 2
    assert len(message) == len(result["blocks"]["rounding"]) and "left" in message[4] and "left" not in message[3]


def test_minutes_are_divided_over_the_blocks(folder: str, tmp_path: Path) -> None:
    result = quantize_model(hasten.load(folder), tmp_path / "q", weights=4, minutes=0.1, images=2, keep=("up", "down"))
    assert (
        result["iterations"]["rounding"]
        == json.loads((tmp_path / "q" / RUN).read_text())["iterations"]["rounding"]
        >= 1
    )
    assert {"nearest", "error", "settled"} == set(result["blocks"]["rounding"]["middle.0.attention"])


def test_a_damaged_block_is_one_line(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"weights": 4, "acts": None, "iterations": 1, "images": 1}
    monkeypatch.setattr("hasten.workflows.quantize.shutil.rmtree", lambda *args, **kwargs: None)
    quantize_model(hasten.load(folder), tmp_path / "q", **options)
    (tmp_path / "q" / "model.json").unlink()
    file = next((tmp_path / "q" / BLOCKS).iterdir())
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(BadInput, match="remove it to do this block again"):
        quantize_model(hasten.load(folder), tmp_path / "q", **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight-bits", "3"], "weights must be 8 or 4 bits, found 3"),
        (["--minutes", "0"], "minutes must be positive"),
        (["--minutes", "1", "--iterations", "5"], "give minutes or iterations, not both"),
        (["--rounding", "floor"], "unknown rounding 'floor': "),
        (["--sampler", "unipcc"], "did you mean 'unipc'"),
        (["--exclude", "midle"], "did you mean 'middle'"),
    ],
)
def test_unsupported_options_are_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["quantize", folder, "--out", str(tmp_path / "q"), *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "q" / "model.json").exists()


def test_sampling_calibrates_first() -> None:
    model = tiny()
    plain, quick = model.sample(3), model.sample(3, accelerators=("quantize:images=3",))
    assert 0 < (plain - quick).square().mean().sqrt() < 0.1
    with pytest.raises(BadInput, match="both claim 'arithmetic'"):
        model.sample(1, accelerators=("quantize", "quantize:weights=4"))
