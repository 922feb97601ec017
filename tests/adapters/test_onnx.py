"""Networks run by ONNX Runtime: the same outputs behind the same interface, and a graph for other programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.adapters import onnx
from hasten.errors import BadInput
from hasten.loading import load
from hasten.model import Model

from ._tiny import relative_error, tiny

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def source() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def exported(source: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return onnx.export(source, tmp_path_factory.mktemp("onnx") / "fp32")


def test_the_outputs_are_those_of_the_network(source: Model, exported: Model) -> None:
    """Any batch, with conditions and without."""
    for rows in (1, 2, 3, 7):
        generator = torch.Generator().manual_seed(rows)
        x, label = torch.randn(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 4
        for t in (0.95, 0.4):
            assert relative_error(exported.denoiser(x, t, label=label), source.denoiser(x, t, label=label)) < 1e-5
        assert relative_error(exported.denoiser(x, 0.4), source.denoiser(x, 0.4)) < 1e-5
    config = {"n": 5, "seed": 3, "batch_size": 4, "guidance_scale": 2.0, "steps": 4}
    assert relative_error(exported.sample(**config), source.sample(**config)) < 1e-4


def test_other_programs_can_run_the_graph(source: Model, exported: Model) -> None:
    import onnxruntime

    file = exported.denoiser.net.folder / "network.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [(one.name, one.type) for one in session.get_inputs()] == [
        ("x", "tensor(float)"),
        ("time", "tensor(float)"),
        ("label", "tensor(int64)"),
    ]
    x, time, label = np.ones((3, 1, 8, 8), np.float32), np.full(3, 0.5, np.float32), np.array([0, 1, 2])
    (raw,) = session.run(["raw"], {"x": x, "time": time, "label": label})
    truth = source.denoiser.net(*(torch.from_numpy(a) for a in (x, time, label)))
    assert relative_error(torch.from_numpy(raw), truth) < 1e-5
    import onnx as package

    assert "/" not in "".join(
        str(one.metadata_props) for one in package.load(str(file)).graph.node
    )  # no paths of this host
    assert [one.version for one in package.load(str(file)).opset_import if one.domain == ""] == [18]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "fraction", "error"), [("fp16", 0.65, 0.005), ("int8", 0.65, 0.08)])
def test_lower_precision_is_close_and_small(
    source: Model, exported: Model, tmp_path: Path, precision: str, fraction: float, error: float
) -> None:
    small = onnx.export(source, tmp_path / precision, precision, n=3)
    assert 1e-6 < small.card["exported"]["error"] < error
    assert small.card["exported"]["bytes"] < fraction * exported.card["exported"]["bytes"]
    x, label = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9)), torch.tensor([0, 1, 3])
    assert relative_error(small.denoiser(x, 0.5, label=label), source.denoiser(x, 0.5, label=label)) < 2 * error


def test_the_folder_is_checked(exported: Model, tmp_path: Path) -> None:
    folder = exported.save(tmp_path / "again")
    description = json.loads((folder / "model.json").read_text())["net"]
    assert description["class"] == "OnnxNet" and description["config"]["files"] == ["network.onnx"]
    data = (folder / "network.onnx").read_bytes()
    (folder / "network.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="network.onnx is not the file that was saved: sha256"):
        load(folder)


def test_bad_arguments_and_missing_packages(source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="opset must be 18 to 23, found 12"):
        onnx.export(source, tmp_path / "x", opset=12)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(BadInput, match=r"onnx networks need onnxscript: pip install 'hasten\[onnx\]'"):
        onnx.export(source, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_without_classes(tmp_path: Path, precision: str) -> None:
    """The network takes x and the time alone; any batch."""
    plain = tiny(classes=None)
    exported = onnx.export(plain, tmp_path / "out", precision, n=2)
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
        onnx.export(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
