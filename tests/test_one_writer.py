"""Every verb that writes a folder: one at a time, not among the data, and not over something else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hasten
from hasten.adapters._export import export_network
from hasten.cli import main
from hasten.compare.results import ResultStore
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.files import locked
from hasten.metrics import references
from hasten.metrics.references import make_reference, reference, save_reference
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.predictions import V
from hasten.schedules import VPCosine
from hasten.storage.provenance import model_hash, tensor_hash
from hasten.workflows.tune import tune_model

DISTILL = ("--method", "progressive:steps=(4,2)", "--steps", "4", "--batch-size", "4", "--precision", "fp32")
VARIANTS = 'n = 10\nrounds = 1\n[reference]\nsampler = "ddim"\nsteps = 4\n[[variant]]\nname = "few"\nsampler = "ddim"\nsteps = 2\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of two classes, images for it as a folder, and other images of the same number."""
    folder = tmp_path_factory.mktemp("writers")
    torch.manual_seed(0)
    net = UNet(1, widths=(8,), classes=2, embedding=8)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    Model(Denoiser(net, VPCosine(offset=0.0), V()), "tiny", (1, 8, 8), ("a", "b"), steps=4).save(folder / "tiny")
    for name, seed in (("data", 0), ("other", 1)):
        g = np.random.default_rng(seed)
        for k in range(20):
            file = folder / name / "ab"[k % 2] / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(g.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    (folder / "v.toml").write_text(VARIANTS)
    return folder


def command(place: Path, verb: str, out: Path, data: str = "data") -> list[str]:
    """A verb that writes into the folder `out`."""
    tiny, images = str(place / "tiny"), str(place / data)
    words = {
        "train": [images, "--steps", "1", "--widths", "8", "--patch", "1", "--batch-size", "4", "--precision", "fp32"],
        "distill": [tiny, "--data", images, *DISTILL],
        "tune": [tiny, "--method", "moments:times=3", "--n", "4", "--data", images],
        "quantize": [tiny, "--images", "2"],
        "compare": [tiny, "--variants", str(place / "v.toml"), "--precision", "fp32", "--json"],
        "sample": [tiny, "--separate-files", "--n", "2", "--steps", "1", "--precision", "fp32"],
    }
    device = [] if verb == "restyle" else ["--device", "cpu"]
    return [verb, *words[verb], *device, "--out", str(out)]


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is written by somebody else (another thread, which counts as another)."""
    ready, over = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(folder):
            ready.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    ready.wait(10)
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("verb", ["train", "distill", "tune", "quantize", "compare", "sample"])
def test_the_second_writer_is_refused_at_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    out = tmp_path / "out"
    with held(out):
        assert main(command(place, verb, out)) == 1
        _, err = capsys.readouterr()
        assert err.startswith("hasten: another process") and "is writing to" in err and err.count("\n") == 1
        assert [p.name for p in out.iterdir()] == [".lock"]
    assert not out.exists()


def test_what_only_looks_does_not_need_the_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with held(out):
        assert main([*command(place, "distill", out), "--dry-run"]) == 0
        with pytest.raises(BadInput, match="is writing to"):
            export_network(SimpleNamespace(kind="onnx"), hasten.load(place / "tiny"), out, "fp32", 1, 0, print)  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", ["train", "distill", "tune"])
def test_out_inside_the_data_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    before = sorted((place / "data").rglob("*"))
    for out in (place / "data" / "run", place / "data" / "a" / "run", place / "data"):
        assert main(command(place, verb, out)) == 1
        err = capsys.readouterr().err
        assert "lies inside the data folder" in err and err.count("\n") == 1
    assert sorted((place / "data").rglob("*")) == before


def test_pictures_do_not_go_among_the_images_they_begin_from(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = place / "data"
    for asked in (
        ["sample", str(place / "tiny"), "--n", "2", "--start", "ccdf:time=0.3", "--out", str(images / "x.png")],
        ["restyle", str(place / "tiny"), "--to-label", "a", "--n", "2", "--out", str(images / "a" / "x.png")],
    ):
        assert main([*asked, "--images", str(images)]) == 1
        assert "--out" in (err := capsys.readouterr().err) and "lies inside the data folder" in err


@pytest.mark.parametrize("verb", ["train", "distill", "tune", "quantize"])
def test_a_model_of_another_origin_is_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    out = tmp_path / "out"
    made = hasten.load(place / "tiny")
    made.name = "mine"
    with torch.no_grad():
        next(made.denoiser.parameters()).add_(1.0)
    made.save(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(command(place, verb, out)) == 1
    assert "already" in capsys.readouterr().err
    (out / "model.json").rename(out / "model_index.json")  # and so is a pipeline
    assert main(command(place, verb, out)) == 1
    assert "a pipeline of diffusers already" in capsys.readouterr().err
    (out / "model_index.json").rename(out / "model.json")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_an_export_is_not_written_over_another_model(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "tiny", tmp_path / "m")
    kind: Any = SimpleNamespace(kind="onnx")
    with pytest.raises(BadInput, match="holds a model already, and not this export"):
        export_network(kind, hasten.load(place / "tiny"), tmp_path / "m", "fp32", 1, 0, lambda *_: None)


@pytest.mark.parametrize("unfinished", ["checkpoint.pt", "run.json"])
def test_an_unfinished_run_of_something_else_is_kept(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], unfinished: str
) -> None:
    for verb in ("train", "distill", "tune", "quantize"):
        out = tmp_path / verb
        out.mkdir()
        (out / unfinished).write_text('{"method": "other"}')
        assert main(command(place, verb, out)) == 1, verb
        assert capsys.readouterr().err.count("\n") == 1
        assert [p.name for p in out.iterdir()] == [unfinished]


def test_a_distillation_goes_on_with_its_own_data_and_format_only(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "s"
    assert main(command(place, "distill", out)) == 0
    capsys.readouterr()
    for asked, message in (
        (command(place, "distill", out, "other"), "data.pixels"),
        ([*command(place, "distill", out), "--precision", "bf16"], "a run with runtime fp32, got bf16"),
        ([*command(place, "distill", out), "--precision", "fp32+high"], "does not use +high"),
        ([*command(place, "distill", out), "--seed", "1"], "a run with seed 0, requested 1"),
    ):
        words = [
            w
            for k, w in enumerate(asked)
            if asked.index("--precision") not in (k, k - 1) or asked.count("--precision") < 2
        ]
        assert main(words) == 1
        last = capsys.readouterr().err.splitlines()[-1]  # before it, what the data hold
        assert message in last
    assert main(command(place, "distill", out)) == 0


def test_tuning_goes_into_its_own_model_or_the_folder_of_the_same_call(place: Path, tmp_path: Path) -> None:
    def tuned(source: Path, out: Path, **options: Any) -> None:
        asked = {"method": "moments:times=3", "data": place / "data", "n": 16, **options}
        tune_model(hasten.load(source), out, **asked)

    shutil.copytree(place / "tiny", tmp_path / "m")
    stale = hasten.load(tmp_path / "m")
    tuned(tmp_path / "m", tmp_path / "m")  # in place
    tuned(tmp_path / "m", tmp_path / "m", n=18)  # and once more
    assert len(hasten.load(tmp_path / "m").card["tuned"]) == 2
    with pytest.raises(BadInput, match="not tiny as it was loaded"):  # which would lose the two
        tune_model(stale, tmp_path / "m", method="moments:times=3", data=place / "data", n=16)
    tuned(place / "tiny", tmp_path / "out")
    tuned(place / "tiny", tmp_path / "out")  # the same call
    assert len(hasten.load(tmp_path / "out").card["tuned"]) == 1
    for change in ({"n": 18}, {"data": place / "other"}, {"method": "moments:times=4"}, {"seed": 5}):
        with pytest.raises(BadInput, match="already"):
            tuned(place / "tiny", tmp_path / "out", **change)


def test_killed_while_tuning_in_place_the_model_is_whole(place: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / "m"
    shutil.copytree(place / "tiny", folder)
    asked = {"data": place / "data", "n": 16}
    tune_model(hasten.load(folder), folder, "moments:times=3", **asked)  # type: ignore[arg-type]
    pid = os.fork()
    if not pid:
        real = os.replace

        def replace(a: Any, b: Any) -> None:
            real(a, b)
            os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace  # type: ignore[assignment]
        tune_model(hasten.load(folder), folder, "moments:times=4", **asked)  # type: ignore[arg-type]
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert len(hasten.load(folder).card["tuned"]) in (1, 2)
    began = time.monotonic()
    tune_model(hasten.load(folder), folder, "moments:times=4", **asked)  # type: ignore[arg-type]
    assert time.monotonic() - began < 30  # the dead process's lock does not count
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


# ---- rows ----


def test_cut_rows_are_left_out_and_rows_of_something_else_refused(tmp_path: Path) -> None:
    rows = [{"key": k, "protocol": {}} for k in "abc"]
    ResultStore(tmp_path).put(*rows)
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    for tail in (whole[: len(whole) // 2], bytes(40), b"\xff"):
        path.write_bytes(whole + tail)
        assert list(ResultStore(tmp_path).rows) == ["a", "b", "c"]
    path.write_bytes(whole[:20])
    assert not ResultStore(tmp_path).rows
    ResultStore(tmp_path).put({"key": "d", "protocol": {}})
    assert json.loads(path.read_text())["key"] == "d"
    for text in ("some notes\n", '{"a": 1}\n'):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"results\.jsonl.* rows? "):
            ResultStore(tmp_path)


def test_a_reference_is_known_by_its_figures_and_a_model_by_its_meaning(place: Path) -> None:
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    one, two = (make_reference(f, "same", "all", "net") for f in (features, features + 1))
    assert tensor_hash(one.mean, one.covariance, one.sample) != tensor_hash(two.mean, two.covariance, two.sample)
    model = hasten.load(place / "tiny")
    same = model_hash(hasten.load(place / "tiny"))
    assert model_hash(model) == same
    model.denoiser.null_label = None
    assert model_hash(model) != same


def test_stages_without_the_run_they_belong_to_are_not_taken_up(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb, name in (("distill", "stages"), ("quantize", "blocks")):
        (tmp_path / verb / name / "0-steps4").mkdir(parents=True)
        assert main(command(place, verb, tmp_path / verb)) == 1
        assert f"holds {name} of a run of {verb} already" in capsys.readouterr().err


def test_statistics_of_real_images_are_replaced_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    one, two = (make_reference(f, name, "all", "net") for f, name in ((features, "one"), (features + 1, "two")))
    save_reference(one, tmp_path)

    def killed(folder: Path, card: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(references, "write_card", killed)
        save_reference(two, tmp_path)
    assert reference(tmp_path).name == "one" and torch.equal(reference(tmp_path).mean, one.mean)
    for each in (two, two, one):
        save_reference(each, tmp_path)
        assert reference(tmp_path).name == each.name and torch.equal(reference(tmp_path).mean, each.mean)
        assert len(list(tmp_path.iterdir())) == 2
