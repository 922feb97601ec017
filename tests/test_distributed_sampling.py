"""`sample`, `evaluate` and `compare` on several processes give the images of one, also after a failure."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.cli import main
from hasten.images import read_png_text

from .process_groups import children, torchrun, until

CONFIG = [
    "--sampler",
    "ddim",
    "--times",
    "uniform",
    "--steps",
    "1",
    "--guidance-scale",
    "1",
    "--precision",
    "fp32",
    "--device",
    "cpu",
    "--batch-size",
    "4",
]
COMPARE = ["--batch-size", "4", "--timing-batch", "2", "--precision", "fp32", "--device", "cpu"]
LONG = ["20" if word == "1" and CONFIG[k - 1] == "--steps" else word for k, word in enumerate(CONFIG)]
SET = """
n = 12
rounds = 1
[reference]
name = "best"
sampler = "ddim"
times = "uniform"
steps = 2
guidance_scale = 1
[[variant]]
name = "one"
sampler = "ddim"
times = "uniform"
steps = 1
guidance_scale = 1
"""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the processes has
    yield
    torch.set_num_threads(before)


def run(world: int, *arguments: str) -> tuple[int, str, str]:
    with torchrun(world, *arguments) as process:
        out, err = process.communicate(timeout=240)
        return process.returncode, out, err


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("hasten:")]


@pytest.mark.slow  # what follows sees it too, after an interruption
def test_two_processes_write_the_file_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one" / "a.png", tmp_path / "two" / "a.png"
    assert main(["sample", "fashion", "--n", "18", "--out", str(one), *CONFIG]) == 0
    capsys.readouterr()
    code, out, err = run(2, "sample", "fashion", "--n", "18", "--out", str(two), *CONFIG)
    assert code == 0, err
    assert one.read_bytes() == two.read_bytes()
    assert out.count("\n") == 1 and "18 images of fashion (ddim, 1 steps, fp32, 2 processes)" in out
    assert [p.name for p in two.parent.iterdir()] == ["a.png"]  # no other files


def interrupted_run(tmp_path: Path, number: int, victim: int | None, *more: str) -> tuple[str, Path]:
    """Interrupt a run of two processes after three batches; victim None: torchrun itself, by Ctrl-C."""
    folder = tmp_path / ".a.png.kept"
    with torchrun(2, "sample", "fashion", "--n", "24", "--out", str(tmp_path / "a.png"), *LONG, *more) as process:
        until(lambda: len(list(folder.glob("*/*.npy"))) >= 3 or process.poll() is not None)
        os.kill(process.pid if victim is None else children(process.pid)[victim], number)
        out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and out == "" and not (tmp_path / "a.png").exists()
    (line,) = errors(err)
    count = int(re.findall(r"(\d+) of 24 images are saved", line)[0])
    assert 12 <= count < 24 and count == sum(len(np.load(path)) for path in folder.glob("*/*.npy"))
    assert line.endswith("the same command resumes")
    return line, folder


def test_a_killed_process_ends_the_run_and_the_next_run_resumes(tmp_path: Path) -> None:
    line, folder = interrupted_run(tmp_path, signal.SIGKILL, 1)
    assert "rank 1 of the 2 processes of this run has died" in line
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.npy")}
    # batches of other settings are not used
    stale = folder / "0123456789abcdef" / next(iter(times)).name
    stale.parent.mkdir()
    np.save(stale, np.ones((4, 1, 28, 28), dtype=np.float32))
    with torchrun(2, "sample", "fashion", "--n", "24", "--out", str(tmp_path / "a.png"), *LONG) as process:
        until(lambda: len(list(folder.glob("*/*.npy"))) > len(times) + 1 or process.poll() is not None)
        assert {path: path.stat().st_mtime_ns for path in times if path.exists()} == times  # none is sampled again
        out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert out.count("\n") == 1 and "24 images of fashion (ddim, 20 steps, fp32, 2 processes)" in out
    assert list(folder.rglob("*.npy")) == [stale]
    whole_file = tmp_path / "whole" / "a.png"
    assert main(["sample", "fashion", "--n", "24", "--out", str(whole_file), *LONG]) == 0
    assert whole_file.read_bytes() == (tmp_path / "a.png").read_bytes()
    assert "--n 24" in read_png_text(whole_file)["command"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGKILL, 0)])
def test_other_signals(tmp_path: Path, number: int, victim: int | None) -> None:
    line, _ = interrupted_run(tmp_path, number, victim)
    assert ("rank 0 of the 2 processes of this run has died" if victim == 0 else "stop") in line
    assert (
        main(["sample", "fashion", "--n", "24", "--out", str(tmp_path / "a.png"), *LONG]) == 0
    )  # one process resumes too
    assert list(tmp_path.rglob("*.npy")) == []
    whole_file = tmp_path / "whole" / "a.png"
    assert main(["sample", "fashion", "--n", "24", "--out", str(whole_file), *LONG]) == 0
    assert whole_file.read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ["patch_parallel", "cfg_parallel"])
def test_a_process_killed_while_an_image_is_shared(tmp_path: Path, accelerator: str) -> None:
    more = ["--accelerate", accelerator]
    line, folder = interrupted_run(tmp_path, signal.SIGKILL, 1, *more)
    assert "rank 1 of the 2 processes of this run has died" in line
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.npy")}
    words = ["sample", "fashion", "--n", "24", *LONG, *more, "--out"]
    with torchrun(2, *words, str(tmp_path / "a.png")) as process:
        until(lambda: len(list(folder.glob("*/*.npy"))) > len(times) or process.poll() is not None)
        assert {path: path.stat().st_mtime_ns for path in times if path.exists()} == times  # none is sampled again
        assert process.wait(150) == 0
    assert run(2, *words, str(tmp_path / "whole" / "a.png"))[0] == 0
    assert (tmp_path / "whole" / "a.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert read_png_text(tmp_path / "a.png")["processes"] == "2"


@pytest.mark.slow
def test_an_error_is_reported_once() -> None:
    code, out, err = run(2, "evaluate", "fashion", "--n", "12", "--sampler", "nosuch", "--device", "cpu")
    assert code != 0 and out == ""
    (line,) = errors(err)
    assert "nosuch" in line


@pytest.mark.slow
def test_evaluate_and_compare_equal_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "fashion", "--n", "18", *CONFIG, "--json"]
    assert main(words) == 0
    one = json.loads(capsys.readouterr().out)
    code, out, err = run(2, *words)
    assert code == 0, err
    assert json.loads(out) == {**one, "processes": 2}

    (tmp_path / "set.toml").write_text(SET)
    words = ["compare", "fashion", "--variants", str(tmp_path / "set.toml"), *COMPARE, "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    code, out, err = run(2, *words, str(tmp_path / "two"))
    assert code == 0 and out.count("Report:") == 1, err
    rows = [
        [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    same = ("key", "name", "nfe", "frechet", "kid", "precision", "recall", "coverage", "accuracy", "psnr", "rms")
    assert [[row[key] for key in same] for row in rows[0]] == [[row[key] for key in same] for row in rows[1]]
    files = [
        sorted(str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*")) for name in ("one", "two")
    ]
    assert files[0] == files[1]
    for path in (tmp_path / "one" / "samples").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "two" / "samples" / path.name).read_bytes()


@pytest.mark.slow
def test_rows_of_shared_images_depend_on_the_number_of_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = SET.rpartition("[[variant]]")[2].replace('"one"', '"shared"') + 'accelerators = ["patch_parallel"]\n'
    (tmp_path / "set.toml").write_text(SET + "[[variant]]" + shared)
    words = ["compare", "fashion", "--variants", str(tmp_path / "set.toml"), *COMPARE, "--out", str(tmp_path / "out")]
    code, _, err = run(2, *words)
    assert code == 0, err
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["best", "one", "shared", "shared"]
    assert [row["protocol"]["processes"] for row in rows[2:]] == [2, 1]
    assert rows[2]["frechet"] == pytest.approx(rows[3]["frechet"], rel=1e-3)  # one step is exact


@pytest.mark.slow
def test_processes_that_share_every_evaluation_write_the_images_of_one(tmp_path: Path) -> None:
    from PIL import Image

    words = ["sample", "fashion", "--n", "6", "--single", *CONFIG, "--guidance-scale=2", "--steps=3", "--out"]
    replaced = ("--guidance-scale", "--steps")
    words = [word for k, word in enumerate(words) if word not in replaced and words[k - 1] not in replaced]
    assert main([*words, str(tmp_path / "one")]) == 0
    code, out, err = run(2, *words, str(tmp_path / "two"), "--accelerate", "cfg_parallel")
    assert code == 0 and "6 files" in out, err
    for k in range(6):
        a, b = (np.asarray(Image.open(tmp_path / name / f"{k:06d}.png")).astype(int) for name in ("one", "two"))
        assert np.abs(a - b).max() <= 1
