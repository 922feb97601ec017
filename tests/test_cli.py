"""The command line: what it makes, and what it says when it was asked for something impossible."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.cli import main
from hasten.cli import verbs as commands
from hasten.denoiser import Denoiser
from hasten.images import read_png_text
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.plan import plan
from hasten.predictions import prediction_from
from hasten.samplers.unipc import UniPC
from hasten.schedules import VPCosine
from hasten.times import UniformLambda

Cli = Callable[..., str]


@pytest.fixture(autouse=True)
def own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model of random weights on 1x8x8 images of three classes."""
    torch.manual_seed(0)
    net = UNet(channels=1, widths=(8, 16), classes=3, embedding=16)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    denoiser = Denoiser(net, VPCosine(), prediction_from("v"), null_label=3)
    model = Model(denoiser, "tiny", (1, 8, 8), ("coat", "bag", "boot"), times="lambda", steps=4)
    return model.save(tmp_path / "model")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command in this process that must succeed; returns its stdout."""

    def run(*words: object) -> str:
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command that must fail with this exit code; returns the one line on stderr that says why, the last one.

    Before it, a command may have said what its data hold."""

    def run(code: int, *words: object) -> str:
        found = main([str(w) for w in words])
        out, err = capsys.readouterr()
        assert found == code, err
        assert out == ""
        *notes, line = err.splitlines()
        assert line.startswith("hasten: ")
        assert all(re.match(r"hasten: .*: [0-9,]+ images? ", note) for note in notes), err
        return line

    return run


def spawn(*words: object, **more: object) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "hasten", *map(str, words)],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def test_the_same_command_gives_the_same_file(cli: Cli, folder: Path, tmp_path: Path) -> None:
    asked = ("sample", folder, "--n", 5, "--seed", 3, "--guidance-scale", 1.5, "--precision", "auto")
    cli(*asked, "--out", tmp_path / "a.png")
    cli(*asked, "--out", tmp_path / "b.png", "--batch-size", 5)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    cli(*asked[:-4], "--out", tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_the_command_in_a_file_makes_that_file(cli: Cli, folder: Path, tmp_path: Path) -> None:
    cli("sample", folder, "--n", 4, "--label", "boot,0", "--sampler", "dpm:order=2", "--out", tmp_path / "a.png")
    text = read_png_text(tmp_path / "a.png")
    assert text["seeds"] == "0-3"
    assert text["labels"] == "2,0,2,0"
    assert torch.__version__ in text["versions"]
    words = shlex.split(text["command"])
    assert words[0] == "hasten"
    cli(*words[1:], "--out", tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_grid_of_all_classes_has_a_column_for_each(cli: Cli, folder: Path, tmp_path: Path) -> None:
    for words, columns in ((), 3), (("--label", "bag"), 4), (("--columns", 5), 5):
        cli("sample", folder, "--n", 12, *words, "--out", tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").width == 10 * columns - 2


def test_single_files_are_the_tiles_of_the_grid(cli: Cli, folder: Path, tmp_path: Path) -> None:
    asked = ("sample", folder, "--n", 5, "--seed", 10, "--precision", "fp32")
    cli(*asked, "--out", tmp_path / "grid.png", "--columns", 3)
    told = json.loads(cli(*asked, "--out", tmp_path / "single", "--separate-files", "--json"))
    assert [Path(f).name for f in told["files"]] == [f"{seed:06d}.png" for seed in range(10, 15)]
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (18, 28)
    for k, file in enumerate(told["files"]):
        row, column = divmod(k, 3)
        tile = sheet[10 * row : 10 * row + 8, 10 * column : 10 * column + 8]
        assert np.array_equal(tile, np.asarray(Image.open(file)))
        assert read_png_text(file)["seeds"] == str(10 + k)


def test_json_is_what_the_function_returns(cli: Cli, folder: Path, tmp_path: Path) -> None:
    asked = {"n": 3, "steps": 2, "sampler": "ddim", "precision": "fp32", "out": tmp_path / "a.png"}
    told = json.loads(cli("sample", folder, "--json", *(w for k, v in asked.items() for w in (f"--{k}", v))))
    made = commands.sample(str(folder), **asked)
    for result in (told, made):
        assert result.pop("seconds") > 0
        assert result.pop("images_per_second") > 0
    assert told == made
    assert told["labels"] == [0, 1, 2]
    assert (told["sampler"], told["steps"], told["times"], told["guidance_scale"]) == ("ddim", 2, "lambda", 1.0)


def test_show_prints_the_plan_and_reads_it_back(cli: Cli, folder: Path, tmp_path: Path) -> None:
    assert "tiny" in cli("show", folder)
    told = json.loads(cli("show", folder, "--json", "--sampler", "unipc", "--steps", 3))
    expected = plan(UniPC(), VPCosine(), UniformLambda()(VPCosine(), 3))
    assert told["plan"] == json.loads(expected.to_json())
    (tmp_path / "plan.json").write_text(expected.to_json())
    text = cli("show", tmp_path / "plan.json")
    for t in expected.times[:-1].tolist():
        assert f"{t:.6f}" in text


def test_models_lists_what_is_bundled(cli: Cli) -> None:
    from hasten import zoo

    assert [m["name"] for m in json.loads(cli("models", "--json"))] == list(zoo.cards() | zoo.additions())


def test_help_names_every_argument(cli: Cli) -> None:
    text = cli("--help")
    for verb in commands.VERBS:
        word = verb.__name__.replace("_", "-")
        assert word in text
        own = cli(word, "--help")
        for name in verb.__annotations__.keys() - {"return"}:
            assert f"--{name.strip('_').replace('_', '-')}" in own, (verb.__name__, name)  # `from` is a Python keyword


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "unipcc"], "did you mean 'unipc'"),
        (["--sampler", "unipc:ordr=2"], "order"),
        (["--times", "karas"], "did you mean 'karras'"),
        (["--label", "boots"], "did you mean 'boot'"),
        (["--label", "7"], "unknown label 7"),
        (["--steps", "0"], "steps must be a whole number of at least 1, got 0"),
        (["--n", "0"], "n must be a whole number of at least 1, got 0"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--precision", "fp16"], "unknown precision 'fp16'"),
        (["--device", "gpu"], "no device 'gpu'"),
        (["--out", "grid.jpg"], "must end in .png"),
    ],
)
def test_bad_arguments(refused: Cli, folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    out = [] if "--out" in words else ["--out", tmp_path / "a.png"]
    assert message in refused(1, "sample", folder, *words, *out)
    assert not list(tmp_path.glob("*.png"))


def test_unknown_model(refused: Cli, tmp_path: Path) -> None:
    assert "unknown model 'fashoin'" in refused(1, "sample", "fashoin", "--out", tmp_path / "a.png")


def test_missing_folder(refused: Cli, tmp_path: Path) -> None:
    assert "no folder" in refused(1, "sample", tmp_path / "gone" / "model", "--out", tmp_path / "a.png")
    assert "there is no file or folder" in refused(1, "train", tmp_path / "gone", "--out", tmp_path / "run")


def test_unwritable_output(refused: Cli, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot write" in refused(1, "sample", folder, "--out", tmp_path / "file" / "a.png")
    assert "cannot write" in refused(1, "sample", folder, "--separate-files", "--out", tmp_path / "file")


def test_a_model_with_a_wrong_hash(refused: Cli, folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    assert "sha256" in refused(1, "sample", folder, "--out", tmp_path / "a.png")


def test_a_model_with_a_wrong_shape(refused: Cli, folder: Path, tmp_path: Path) -> None:
    told = json.loads((folder / "model.json").read_text())
    told["net"]["config"]["widths"] = [8, 24]
    (folder / "model.json").write_text(json.dumps(told))
    assert "shape" in refused(1, "sample", folder, "--out", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smaple", "x"], "Did you mean"),
        (["sample"], "requires an argument"),
        (["sample", "x", "--stpes", "3"], "--steps"),
        (["sample", "x", "--steps", "three"], "three"),
        (["sample", "x", "y"], "y"),
    ],
)
def test_usage_errors(refused: Cli, words: list[str], message: str) -> None:
    assert message in refused(2, *words)


def test_an_unforeseen_error_is_one_line_too(
    refused: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError("a\nbug")

    monkeypatch.setattr("hasten.loading.find_model_folder", broken)
    assert "unexpected ZeroDivisionError: a bug" in refused(1, "show", "x")
    monkeypatch.setenv("HASTEN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["show", "x"])


def test_a_full_disk_is_one_line(refused: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    asked = ("sample", folder, "--precision", "fp32", "--out", tmp_path / "a.png")
    assert "cannot write" in (line := refused(1, *asked))
    assert "No space left on device" in line
    assert not list(tmp_path.glob("*a.png*"))


def test_ctrl_c_is_one_line(refused: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hasten.model.sample_batches.draw", stopped)
    asked = ("sample", folder, "--precision", "fp32", "--out", tmp_path / "a.png")
    assert "stopped; nothing was written" in refused(130, *asked)
    assert not list(tmp_path.glob("*.png"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two classes of 8x8 images."""
    generator = np.random.default_rng(0)
    for k in range(8):
        file = tmp_path / "pictures" / ("dark", "light")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 100, (8, 8), dtype=np.uint8) + 150 * (k % 2)).save(file)
    return tmp_path / "pictures"


TINY = ("--widths", "8,8", "--batch-size", 4, "--precision", "fp32", "--device", "cpu")


def test_train_makes_a_model_that_samples(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    told = json.loads(cli("train", pictures, "--out", tmp_path / "run", "--steps", 3, *TINY, "--json"))
    assert told["classes"] == ["dark", "light"]
    assert told["last"]["step"] == 3
    cli("sample", tmp_path / "run", "--label", "light", "--n", 2, "--steps", 2, "--out", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (18, 8)


def test_train_on_a_truncated_image(refused: Cli, pictures: Path, tmp_path: Path) -> None:
    file = pictures / "dark" / "2.png"
    file.write_bytes(file.read_bytes()[:-30])
    line = refused(1, "train", pictures, "--out", tmp_path / "run", "--steps", 3, *TINY)
    assert str(file) in line


def test_train_refuses_what_does_not_fit(refused: Cli, pictures: Path, tmp_path: Path) -> None:
    asked = ("train", pictures, "--out", tmp_path / "run", "--steps", 1)
    assert "--size 8" in refused(1, *asked, *TINY, "--size", 7)
    assert "widths are whole numbers" in refused(1, *asked, "--widths", "8,x")
    assert "steps must be" in refused(1, "train", pictures, "--out", tmp_path / "run", "--steps", 0, *TINY)
    (tmp_path / "file").touch()
    assert "cannot write" in refused(1, "train", pictures, "--out", tmp_path / "file", "--steps", 1, *TINY)


def test_ctrl_c_in_training_keeps_a_checkpoint(cli: Cli, pictures: Path, tmp_path: Path) -> None:
    asked = ("train", pictures, "--out", tmp_path / "run", *TINY)
    process = spawn(*asked, "--steps", 1_000_000)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 1) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    found, stopped = err.splitlines()
    assert found.endswith(": 8 images 8 x 8 grey, 2 classes from folders (dark, light)")
    assert stopped.startswith("hasten: stopped after ")
    steps = int(stopped.split()[3])
    assert steps >= 50
    told = json.loads(cli(*asked, "--steps", steps + 5, "--json"))
    assert told["last"]["step"] == steps + 5


def test_evaluate_against_a_folder_of_images(
    cli: Cli, refused: Cli, folder: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pixels(torch.nn.Module):
        name = "pixels"

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            return images.flatten(1)[:, :4], None

    assert "names no reference" in refused(1, "evaluate", folder, "--n", 12)
    assert "give --features" in refused(1, "evaluate", folder, "--n", 12, "--reference", pictures)
    refused(1, "evaluate", folder, "--n", 12, "--reference", pictures, "--features", "fashion")  # 8 images are too few
    for k in range(8, 24):
        pixels = np.random.default_rng(k).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / "dark" / f"{k}.png")
    monkeypatch.setattr("hasten.workflows.reference_images.feature_net", lambda *_: Pixels())
    monkeypatch.setattr("hasten.metrics.evaluate.feature_net", lambda *_: Pixels())
    asked = ("evaluate", folder, "--n", 12, "--seed", 5, "--reference", pictures, "--features", "pixels")
    told = json.loads(cli(*asked, "--precision", "fp32", "--json"))
    frechet = told["measures"]["frechet"]
    assert frechet["count"] == 12
    assert frechet["reference_count"] == 24
    assert frechet["features"] == "pixels"
    assert frechet["seeds"] == "5-16"
    assert frechet["value"] > 0


def test_a_reader_that_went_away_is_no_error() -> None:
    process = spawn("models")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_evaluate_reads_its_labels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "fashion", "--label", "nosuch", "--n", "10"]) == 1
    assert "nosuch" in capsys.readouterr().err
