"""Networks run by OpenVINO: the same outputs behind the same interface, in a folder as any model's."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import hasten
from hasten.accelerators.compile import Compile
from hasten.adapters import openvino
from hasten.errors import BadInput
from hasten.loading import load
from hasten.model import Model

from ._tiny import relative_error, tiny

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def source() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def exported(source: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return openvino.export(source, tmp_path_factory.mktemp("openvino") / "fp32")


def test_the_outputs_are_those_of_the_network(source: Model, exported: Model) -> None:
    """Any batch, with conditions and without, beyond the batch sizes with graphs of their own."""
    for rows in (1, 2, 3, 5, 6, 7):
        generator = torch.Generator().manual_seed(rows)
        x, label = torch.randn(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 4
        for t in (0.95, 0.4):
            assert relative_error(exported.denoiser(x, t, label=label), source.denoiser(x, t, label=label)) < 1e-5
        assert relative_error(exported.denoiser(x, 0.4), source.denoiser(x, 0.4)) < 1e-5  # no label: the null label
        times = torch.linspace(0.1, 0.9, rows, dtype=torch.float64)
        assert relative_error(exported.denoiser(x, times, label=label), source.denoiser(x, times, label=label)) < 1e-5
    assert len(exported.denoiser.net.sessions) == openvino.GRAPHS + 1
    assert exported.card["exported"]["error"] < 1e-5 and exported.name == "tiny-openvino-fp32"


def test_it_samples_as_the_model_does(source: Model, exported: Model) -> None:
    """The last batch is smaller; guidance doubles them."""
    config = {"n": 5, "seed": 3, "batch_size": 4, "guidance_scale": 2.0, "steps": 4}
    assert relative_error(exported.sample(**config), source.sample(**config)) < 1e-4
    assert exported.classes == source.classes and exported.denoiser.null_label == 3


def test_bfloat16_is_computed_where_autocast_says_so(source: Model, exported: Model) -> None:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = exported.denoiser(x, 0.5)
    assert half.dtype == torch.float32 and relative_error(half, source.denoiser(x, 0.5)) < 0.03
    assert {key[0] for key in exported.denoiser.net.sessions} >= {"bf16"}


def test_the_folder_is_checked_and_can_be_saved_again(exported: Model, tmp_path: Path) -> None:
    folder = exported.save(tmp_path / "again")
    assert sorted(file.name for file in folder.iterdir()) == [
        "model.json",
        "network.bin",
        "network.xml",
        "weights.safetensors",
    ]
    assert json.loads((folder / "model.json").read_text())["net"]["class"] == "OpenVinoNet"
    x = torch.ones(2, 1, 8, 8)
    again = load(folder)
    assert torch.equal(again.denoiser(x, 0.5), exported.denoiser(x, 0.5))
    assert torch.equal(copy.deepcopy(again).denoiser(x, 0.5), exported.denoiser(x, 0.5))
    data = bytearray((folder / "network.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "network.bin").write_bytes(data)
    with pytest.raises(BadInput, match="network.bin is not the file that was saved: sha256"):
        load(folder)
    (folder / "network.bin").unlink()
    with pytest.raises(BadInput, match="network.bin is missing: model.json names it"):
        load(folder)


def test_bad_inputs_are_refused(source: Model, exported: Model, tmp_path: Path) -> None:
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(BadInput, match=r"exported for samples \[1, 8, 8\], found \[1, 16, 16\]"):
        exported.denoiser(torch.zeros(2, 1, 16, 16), 0.5)
    with pytest.raises(BadInput, match="exported with label, found steps, label"):
        exported.denoiser(x, 0.5, steps=torch.ones(2))
    with pytest.raises(BadInput, match="has no gradient"):
        exported.denoiser(x.requires_grad_(True), 0.5)
    with pytest.raises(BadInput, match="exported already"):
        openvino.export(exported, tmp_path / "twice")
    with pytest.raises(BadInput, match="cannot export in 'int4': did you mean 'int8'"):
        openvino.export(source, tmp_path / "x", "int4")
    with pytest.raises(BadInput, match="must be a folder"):
        openvino.export(source, tmp_path / "net.xml")
    with pytest.raises(BadInput, match="nothing to do on a OpenVinoNet"):
        exported.sample(1, steps=2, accelerators=(Compile(),))
    with pytest.raises(hasten.HastenError, match="no middle features"):
        exported.denoiser.features(x.detach(), 0.5)


def test_a_missing_package_is_named(source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BadInput, match=r"openvino networks need openvino: pip install 'hasten\[openvino\]'"):
        openvino.export(source, tmp_path / "x")


@pytest.mark.slow
def test_int8_is_close_and_small(source: Model, exported: Model, tmp_path: Path) -> None:
    """Within 6 % of the outputs along samplings other than those of the calibration, in about a third of the bytes."""
    pytest.importorskip("nncf")
    small = openvino.export(source, tmp_path / "int8", "int8", n=4)
    assert 1e-4 < small.card["exported"]["error"] < 0.06
    x, label = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9)), torch.tensor([0, 1, 3])
    assert 1e-4 < relative_error(small.denoiser(x, 0.5, label=label), source.denoiser(x, 0.5, label=label)) < 0.1
    sizes = [
        (exported.denoiser.net.folder / "network.bin").stat().st_size,
        (tmp_path / "int8/network.bin").stat().st_size,
    ]
    assert sizes[1] < 0.4 * sizes[0]
    assert load(tmp_path / "int8").sha256 not in (exported.sha256, source.sha256)


def test_a_graph_is_tried_in_a_subprocess(exported: Model, tmp_path: Path) -> None:
    graph = exported.denoiser.net.graph()
    assert openvino.runs_in_subprocess(str(graph), 2, {"SNIPPETS_MODE": "DISABLE"})
    assert not openvino.runs_in_subprocess(str(tmp_path / "none.xml"), 2, {})
    assert not openvino.runs_in_subprocess(str(graph), 2, {"SNIPPETS_MODE": "NONSENSE"})


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_without_classes(tmp_path: Path, precision: str) -> None:
    """The network takes x and the time alone; any batch."""
    if precision == "int8":
        pytest.importorskip("nncf")
    plain = tiny(classes=None)
    exported = openvino.export(plain, tmp_path / "out", precision, n=2)
    for rows in (1, 3):
        x = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
        assert relative_error(exported.denoiser(x, 0.5), plain.denoiser(x, 0.5)) < (
            1e-5 if precision == "fp32" else 0.3
        )
    assert exported.classes is None and exported.sample(2, steps=3).shape == (2, 1, 8, 8)


def test_a_pipeline_is_refused_at_once(tmp_path: Path) -> None:
    plain = tiny()
    plain.card["pipeline"] = "StableDiffusionPipeline"
    with pytest.raises(BadInput, match="optimum"):
        openvino.export(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
