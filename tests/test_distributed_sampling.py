"""`sample`, `evaluate` and `compare` on several processes: the images of one, however many, and whatever happens."""

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

from .processes import children, torchrun, until

WAY = ["--sampler", "ddim", "--times", "uniform", "--steps", "1", "--guidance-scale", "1", "--precision", "fp32",
       "--device", "cpu", "--batch-size", "4"]  # fmt: skip
LONG = ["20" if word == "1" and WAY[k - 1] == "--steps" else word for k, word in enumerate(WAY)]
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


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("hasten:")]


def test_two_processes_make_the_file_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one" / "a.png", tmp_path / "two" / "a.png"
    assert main(["sample", "fashion", "--n", "18", "--out", str(one), *WAY]) == 0
    capsys.readouterr()
    code, out, err = run(2, "sample", "fashion", "--n", "18", "--out", str(two), *WAY)
    assert code == 0, err
    assert one.read_bytes() == two.read_bytes()
    assert out.count("\n") == 1 and "18 images of fashion (ddim, 1 steps, fp32, 2 processes)" in out
    assert [p.name for p in two.parent.iterdir()] == ["a.png"]  # nothing is left beside it


def stopped(tmp_path: Path, number: int, victim: int | None, *more: str) -> tuple[str, Path]:
    """A run of two processes that is disturbed when three batches are done; victim None: torchrun itself, by Ctrl-C."""
    folder = tmp_path / ".a.png.kept"
    with torchrun(2, "sample", "fashion", "--n", "24", "--out", str(tmp_path / "a.png"), *LONG, *more) as process:
        until(lambda: len(list(folder.glob("*/*.npy"))) >= 3 or process.poll() is not None)
        os.kill(process.pid if victim is None else children(process.pid)[victim], number)
        out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and out == "" and not (tmp_path / "a.png").exists()
    (line,) = said(err)
    count = int(re.findall(r"(\d+) of 24 images are saved", line)[0])
    assert 12 <= count < 24 and count == sum(len(np.load(path)) for path in folder.glob("*/*.npy"))
    assert line.endswith("the same command resumes")
    return line, folder


def test_a_killed_process_ends_the_run_and_the_next_one_goes_on(tmp_path: Path) -> None:
    line, folder = stopped(tmp_path, signal.SIGKILL, 1)
    assert "rank 1 of the 2 processes of this run has died" in line
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.npy")}
    # what other settings left there is not taken
    stale = folder / "0123456789abcdef" / next(iter(times)).name
    stale.parent.mkdir()
    np.save(stale, np.ones((4, 1, 28, 28), dtype=np.float32))
    with torchrun(2, "sample", "fashion", "--n", "24", "--out", str(tmp_path / "a.png"), *LONG) as process:
        until(lambda: len(list(folder.glob("*/*.npy"))) > len(times) + 1 or process.poll() is not None)
        assert {path: path.stat().st_mtime_ns for path in times if path.exists()} == times  # none is made again
        assert process.wait(150) == 0
    assert list(folder.rglob("*.npy")) == [stale]
    whole = tmp_path / "whole" / "a.png"
    assert main(["sample", "fashion", "--n", "24", "--out", str(whole), *LONG]) == 0
    assert whole.read_bytes() == (tmp_path / "a.png").read_bytes()
    assert "--n 24" in read_png_text(whole)["command"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGINT, None), (signal.SIGTERM, None), (signal.SIGKILL, 0)])
def test_other_ends(tmp_path: Path, number: int, victim: int | None) -> None:
    line, _ = stopped(tmp_path, number, victim)
    assert ("number 0 has died" if victim == 0 else "stop") in line
    assert main(["sample", "fashion", "--n", "24", "--out", str(tmp_path / "a.png"), *LONG]) == 0  # one goes on too
    assert list(tmp_path.rglob("*.npy")) == []
    whole = tmp_path / "whole" / "a.png"
    assert main(["sample", "fashion", "--n", "24", "--out", str(whole), *LONG]) == 0
    assert whole.read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ["patch_parallel", "cfg_parallel"])
def test_a_process_killed_while_an_image_is_shared(tmp_path: Path, accelerator: str) -> None:
    more = ["--accelerate", accelerator]
    line, folder = stopped(tmp_path, signal.SIGKILL, 1, *more)
    assert "rank 1 of the 2 processes of this run has died" in line
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.npy")}
    asked = ["sample", "fashion", "--n", "24", *LONG, *more, "--out"]
    with torchrun(2, *asked, str(tmp_path / "a.png")) as process:
        until(lambda: len(list(folder.glob("*/*.npy"))) > len(times) or process.poll() is not None)
        assert {path: path.stat().st_mtime_ns for path in times if path.exists()} == times  # none is made again
        assert process.wait(150) == 0
    assert run(2, *asked, str(tmp_path / "whole" / "a.png"))[0] == 0
    assert (tmp_path / "whole" / "a.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert read_png_text(tmp_path / "a.png")["processes"] == "2"


@pytest.mark.slow
def test_a_mistake_is_told_once() -> None:
    code, out, err = run(2, "evaluate", "fashion", "--n", "12", "--sampler", "nosuch", "--device", "cpu")
    assert code != 0 and out == ""
    (line,) = said(err)
    assert "nosuch" in line


@pytest.mark.slow
def test_evaluations_and_comparisons_are_those_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["evaluate", "fashion", "--n", "18", *WAY, "--json"]
    assert main(asked) == 0
    one = json.loads(capsys.readouterr().out)
    code, out, err = run(2, *asked)
    assert code == 0, err
    assert json.loads(out) == {**one, "processes": 2}

    (tmp_path / "set.toml").write_text(SET)
    asked = ["compare", "fashion", "--variants", str(tmp_path / "set.toml"), "--batch-size", "4", "--timing-batch", "2",
             "--precision", "fp32", "--device", "cpu", "--out"]  # fmt: skip
    assert main([*asked, str(tmp_path / "one")]) == 0
    code, out, err = run(2, *asked, str(tmp_path / "two"))
    assert code == 0 and out.count("Report:") == 1, err
    rows = [[json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
            for name in ("one", "two")]  # fmt: skip
    same = ("key", "name", "nfe", "frechet", "kid", "precision", "recall", "coverage", "accuracy", "psnr", "rms")
    assert [[row[key] for key in same] for row in rows[0]] == [[row[key] for key in same] for row in rows[1]]
    files = [
        sorted(str(p.relative_to(tmp_path / name)) for p in (tmp_path / name).rglob("*")) for name in ("one", "two")
    ]
    assert files[0] == files[1]
    for path in (tmp_path / "one" / "samples").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "two" / "samples" / path.name).read_bytes()


@pytest.mark.slow
def test_a_row_in_which_processes_share_images_belongs_to_their_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = SET.rpartition("[[variant]]")[2].replace('"one"', '"shared"') + 'accelerators = ["patch_parallel"]\n'
    (tmp_path / "set.toml").write_text(SET + "[[variant]]" + shared)
    asked = ["compare", "fashion", "--variants", str(tmp_path / "set.toml"), "--batch-size", "4", "--timing-batch", "2",
             "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    code, _, err = run(2, *asked)
    assert code == 0, err
    assert main(asked) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["best", "one", "shared", "shared"]
    assert [row["protocol"]["processes"] for row in rows[2:]] == [2, 1]
    assert rows[2]["frechet"] == pytest.approx(rows[3]["frechet"], rel=1e-3)  # one step is exact


@pytest.mark.slow
def test_processes_that_share_every_evaluation_make_the_images_of_one(tmp_path: Path) -> None:
    from PIL import Image

    asked = ["sample", "fashion", "--n", "6", "--separate-files", *WAY, "--guidance-scale=2", "--steps=3", "--out"]
    asked = [word for k, word in enumerate(asked) if word not in ("--guidance-scale", "--steps")
             and asked[k - 1] not in ("--guidance-scale", "--steps")]  # fmt: skip
    assert main([*asked, str(tmp_path / "one")]) == 0
    code, out, err = run(2, *asked, str(tmp_path / "two"), "--accelerate", "cfg_parallel")
    assert code == 0 and "6 files" in out, err
    for k in range(6):
        a, b = (np.asarray(Image.open(tmp_path / name / f"{k:06d}.png")).astype(int) for name in ("one", "two"))
        assert np.abs(a - b).max() <= 1
