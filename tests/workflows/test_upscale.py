"""`hasten upscale` on files and folders: names, bad files, resuming."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.images import read_png_text
from hasten.model import Model
from hasten.nets.lwtdm import LWTDM
from hasten.progress import ProgressReporter
from hasten.schedules import VPCosine
from hasten.tasks import SuperResolution
from hasten.tasks.super_resolution import UpscaleRequest
from hasten.workflows.upscale import upscale_files

from ..factories import run_cli, tiny_model
from ..process_groups import torchrun
from ..tasks.super_resolution.tiny import local_model, scene


def image(path: Path, height: int = 12, width: int = 20, **options: Any) -> Path:
    """An image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(height, width, **options)).save(path)
    return path


def pixels(path: str | Path) -> np.ndarray:
    """Its pixels."""
    with Image.open(path) as opened:
        return np.asarray(opened)


class Killer(ProgressReporter):
    """Ends the process, or raises, after so many tiles."""

    def __init__(self, after: float, error: type[BaseException] | None = None) -> None:
        super().__init__(0, show=False)
        self.after, self.error = after, error

    def advance(self, count: float) -> None:
        super().advance(count)
        if self.done >= self.after:
            if self.error is not None:
                raise self.error
            os.kill(os.getpid(), signal.SIGKILL)


def evaluations(model: Model) -> list[int]:
    """The batch sizes of the network's evaluations, as they happen."""
    seen: list[int] = []
    model.denoiser.net.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    return seen


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
@pytest.mark.parametrize("consistent", [False, True])
def test_resumes_after_sigkill(tmp_path: Path, consistent: bool) -> None:
    """The same pixels as without an end, and no tile is enlarged twice."""
    source = image(tmp_path / "a.png", 90, 70)
    request = UpscaleRequest(seed=3, batch_size=2, consistent=consistent)
    whole = upscale_files(local_model(), [source], tmp_path / "whole.png", request)["images"][0]
    assert whole["tiles"] == 5 * 4
    for after in (4, 11, 16):  # rows of four tiles
        pid = os.fork()
        if not pid:
            upscale_files(local_model(), [source], tmp_path / "b.png", request, reporter=Killer(after))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert not (tmp_path / "b.png").exists() and (tmp_path / ".b.png.tiles").is_dir()
    model = local_model()
    seen = evaluations(model)
    result = upscale_files(model, [source], tmp_path / "b.png", request)["images"][0]
    assert sum(seen) == 2 * (20 - 14)  # two steps; the batch in which it died is done again
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "whole.png"))
    assert result["consistency_error"] == whole["consistency_error"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "whole.png"]


def test_other_settings_begin_from_the_beginning(tmp_path: Path) -> None:
    source, lines, out = image(tmp_path / "a.png", 60, 30), [], tmp_path / "b.png"
    with pytest.raises(KeyboardInterrupt, match="0 of 1 images are done, and the finished tiles of"):
        upscale_files(local_model(), [source], out, reporter=Killer(4, KeyboardInterrupt))
    upscale_files(local_model(), [source], out, UpscaleRequest(seed=1), warn=lines.append)
    assert len(lines) == 1 and "seed was 0 and is now 1" in lines[0]
    expected = SuperResolution(local_model()).upscale(pixels(source), seed=1)
    assert np.array_equal(pixels(out), expected)
    # a result is kept as long as it is of the same image and settings
    assert upscale_files(local_model(), [source], out, UpscaleRequest(seed=1))["kept"] == [str(out)]
    assert not upscale_files(local_model(), [source], out)["kept"]
    image(source, 60, 30, seed=5)
    assert len(upscale_files(local_model(), [source], out)["images"]) == 1


def test_finished_images_of_a_folder_are_kept(tmp_path: Path) -> None:
    for name in ("a.png", "b.tif", "c.png"):
        image(tmp_path / "in" / name)
    with pytest.raises(KeyboardInterrupt, match="2 of 3 images are done"):
        upscale_files(local_model(), [tmp_path / "in"], tmp_path / "out", reporter=Killer(3, KeyboardInterrupt))
    result = upscale_files(local_model(), [tmp_path / "in"], tmp_path / "out")
    assert [Path(name).name for name in result["kept"]] == ["a.png", "b.tif"]
    assert [Path(row["image"]).name for row in result["images"]] == ["c.png"]


def test_names(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/a.jpg", "x/deep/b.tiff", "c.png", "x/.hidden.png"):
        image(tmp_path / name)
    (tmp_path / "x" / "notes.txt").write_text("no image")
    result = upscale_files(local_model(), [tmp_path / "x", tmp_path / "c.png"], tmp_path / "out", steps=1)
    files = [str(Path(row["file"]).relative_to(tmp_path / "out")) for row in result["images"]]
    assert sorted(files) == ["a.jpg.png", "a.png.png", "c.png", str(Path("deep", "b.tif"))]
    for images, out, message in (
        ([tmp_path / "x"], tmp_path / "x" / "out", "lies inside"),
        ([tmp_path / "x"], tmp_path / "one.png", "is one file, and there are 3"),
        ([tmp_path / "c.png"], tmp_path / "c.png", "is the image itself"),
        ([tmp_path / "c.png"], tmp_path, "would overwrite"),
        ([tmp_path / "none"], tmp_path / "out", "no file or folder"),
        ([tmp_path / "x" / "notes.txt", tmp_path / "c.png"], tmp_path / "one.png", "2 images"),
        ([], tmp_path / "out", "name an image"),
    ):
        with pytest.raises(BadInput, match=message):
            upscale_files(local_model(), images, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty holds no images"):
        upscale_files(local_model(), [tmp_path / "empty"], tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_bad_files_among_good_ones(tmp_path: Path) -> None:
    image(tmp_path / "in" / "a.png"), image(tmp_path / "in" / "z.png")
    cut = (tmp_path / "in" / "a.png").read_bytes()[:200]
    (tmp_path / "in" / "m.png").write_bytes(cut)
    (tmp_path / "in" / "n.png").write_text("hello")
    lines: list[str] = []
    result = upscale_files(local_model(), [tmp_path / "in"], tmp_path / "out", warn=lines.append)
    assert len(result["images"]) == 2 and len(lines) == len(result["failed"]) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "z.png"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of factor 4 and sources of 8 x 8."""
    import torch

    torch.manual_seed(0)
    denoiser = Denoiser(LWTDM(width=128, inner=8, factor=4, middle=1), VPCosine(offset=0.0), "v").eval()
    model = Model(denoiser, "tiny", (3, 32, 32), codec="residual", residual_std=0.1, sampler="ddim", steps=1)
    return model.save(tmp_path_factory.mktemp("models") / "tiny")


def test_the_command(tmp_path: Path, folder: Path) -> None:
    image(tmp_path / "in" / "a.png", 12, 9)
    (tmp_path / "in" / "b.png").write_text("hello")
    words = ["upscale", tmp_path / "in", "--model", folder, "--out", tmp_path / "out", "--precision", "fp32"]
    code, out, err = run_cli(*words, "--seed", 2, "--consistent")
    assert code == 1 and "b.png: not an image, or truncated: skipped" in err and "1 of 2 images could not" in err
    assert "a.png: 36x48 of 4 tiles" in out and "consistency error" in out and "by tiny (ddim, 1 steps)" in out
    text = read_png_text(tmp_path / "out" / "a.png")
    assert "--consistent" in text["command"] and json.loads(text["hasten upscale"])["seed"] == 2
    code, out, err = run_cli(*words, "--seed", 2, "--consistent", "--json")
    assert code == 1 and json.loads(out)["kept"] == [str(tmp_path / "out" / "a.png")]
    good = [tmp_path / "in" / "a.png", "--model", folder, "--out", tmp_path / "b.png"]
    for more, message in (
        (["--factor", 2], "enlarges images 4 times, not 2"),
        (["--tile", 6], "must be a multiple of 4"),
        (["--overlap", 3], "at most a third of the tile of 8, 2, got 3"),
        (["--steps", 0], "at least 1"),
        (["--start", "noise", "--temperature", 1], "not both"),
    ):
        code, out, err = run_cli("upscale", *good, *more)
        assert code in (1, 2) and message in err and err.count("\n") == 1 and not (tmp_path / "b.png").exists()
    results = []
    for words in (["--temperature", 0], ["--temperature", 0, "--seed", 1], ["--start", "temperature:value=0.5"], []):
        code, out, err = run_cli("upscale", *good, *words, "--precision", "fp32")
        assert code == 0, err
        results.append(pixels(tmp_path / "b.png"))
    assert np.array_equal(*results[:2]) and not np.array_equal(results[0], results[2])
    assert not np.array_equal(results[2], results[3])
    (tmp_path / "b.png").unlink()
    other = image(tmp_path / "other.png", 4, 4)
    code, out, err = run_cli("upscale", good[0], other, "--model", folder, "--out", tmp_path / "both", "--steps", 1)
    assert code == 0 and sorted(p.name for p in (tmp_path / "both").iterdir()) == ["a.png", "other.png"]
    plain = tiny_model(shape=(3, 8, 8)).save(tmp_path / "plain")
    code, out, err = run_cli("upscale", good[0], "--model", plain, "--out", tmp_path / "b.png")
    assert code == 1 and "no model of super-resolution" in err


@pytest.mark.slow
def test_two_processes_give_the_pixels_of_one(tmp_path: Path, folder: Path) -> None:
    image(tmp_path / "in" / "a.png", 20, 40)
    (tmp_path / "in" / "b.png").write_text("hello")
    words = ["upscale", str(tmp_path / "in"), "--model", str(folder), "--batch-size", "2", "--precision", "fp32"]
    run_cli(*words, "--device", "cpu", "--out", tmp_path / "one")
    with torchrun(2, *words, "--device", "cpu", "--out", str(tmp_path / "two"), "--json") as process:
        out, err = process.communicate(timeout=240)
    assert process.returncode == 1 and err.count("b.png: not an image") == 1
    assert len(json.loads(out)["images"]) == 1 and "1 of 2 images could not" in err
    assert np.array_equal(pixels(tmp_path / "one" / "a.png"), pixels(tmp_path / "two" / "a.png"))
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["a.png"]
