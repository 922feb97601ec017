"""The options of `hasten sample` beyond sampler and times: plans, guides, starts, no label."""

# The fixtures are those of test_cli, so their names come up again as arguments.
# ruff: noqa: F401, F811

from __future__ import annotations

import json
import shlex
from pathlib import Path

import hasten
from hasten.images import read_png_text
from hasten.plan import plan
from hasten.samplers import DDIM
from hasten.times import UniformTime

from .test_cli import Cli, cli, folder, refused


def test_a_plan_by_name_by_file_and_as_the_recommended_one(cli: Cli, folder: Path, tmp_path: Path) -> None:
    model = hasten.load(folder)
    found = plan(DDIM(), model.denoiser.schedule, UniformTime()(model.denoiser.schedule, 3))
    model.plans = {"three": found}
    model.save(folder)
    (tmp_path / "p.json").write_text(found.to_json())
    direct = ("--sampler", "ddim", "--times", "uniform", "--steps", 3)
    files = []
    for k, words in enumerate((direct, ("--plan", "three"), ("--plan", tmp_path / "p.json"))):
        files.append(tmp_path / f"{k}.png")
        cli("sample", folder, "--n", 2, "--precision", "fp32", "--out", files[-1], *words)
    pictures = [file.read_bytes().split(b"IDAT")[1] for file in files]
    assert pictures[0] == pictures[1] == pictures[2]
    command = read_png_text(files[1])["command"]
    assert "--plan three" in command and "--sampler" not in command
    told = json.loads(cli(*shlex.split(command)[1:], "--out", tmp_path / "again.png", "--json"))
    assert (told["plan"], told["steps"]) == ("three", 3)
    assert (tmp_path / "again.png").read_bytes() == files[1].read_bytes()


def test_guides_are_given_one_by_one(cli: Cli, refused: Cli, folder: Path, tmp_path: Path) -> None:
    words = ("sample", folder, "--n", 2, "--guidance-scale", 2, "--out", tmp_path / "a.png")
    both = ("--guide", "interval:low=0.1,high=20", "--guide", "rescale:amount=0.7")
    told = json.loads(cli(*words, *both, "--json"))
    assert told["guides"] == ["interval:low=0.1,high=20", "rescale:amount=0.7"]
    command = read_png_text(tmp_path / "a.png")["command"]
    assert "--guide interval:low=0.1,high=20 --guide rescale:amount=0.7" in command
    assert "did you mean 'rescale'" in refused(1, *words, "--guide", "rescal")
    assert "guidance scale" in refused(1, *words[:4], "--guidance-scale", 1, *words[-2:], "--guide", "interval:low=1")


def test_no_label_is_the_unconditional_model(cli: Cli, folder: Path, tmp_path: Path) -> None:
    told = json.loads(cli("sample", folder, "--n", 2, "--label", "none", "--out", tmp_path / "a.png", "--json"))
    assert told["labels"] == [3, 3]


def test_images_are_for_starts(refused: Cli, folder: Path, tmp_path: Path) -> None:
    words = ("sample", folder, "--n", 2, "--out", tmp_path / "a.png", "--images")
    assert "there is no file" in refused(1, *words, tmp_path / "none")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert "cannot read" in refused(1, *words, tmp_path / "broken.png")
