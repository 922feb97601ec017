"""Networks that ONNX Runtime runs: the same answers behind the same interface, and a graph for other programs."""

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

from ._tiny import off, tiny

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def source() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def made(source: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return onnx.export(source, tmp_path_factory.mktemp("onnx") / "fp32")


def test_the_answers_are_the_networks(source: Model, made: Model) -> None:
    """Any batch, with conditions and without."""
    for rows in (1, 2, 3, 7):
        generator = torch.Generator().manual_seed(rows)
        x, label = torch.randn(rows, 1, 8, 8, generator=generator), torch.arange(rows) % 4
        for t in (0.95, 0.4):
            assert off(made.denoiser(x, t, label=label), source.denoiser(x, t, label=label)) < 1e-5
        assert off(made.denoiser(x, 0.4), source.denoiser(x, 0.4)) < 1e-5
    way = {"n": 5, "seed": 3, "batch_size": 4, "guidance_scale": 2.0, "steps": 4}
    assert off(made.sample(**way), source.sample(**way)) < 1e-4


def test_other_programs_can_run_the_graph(source: Model, made: Model) -> None:
    import onnxruntime

    file = made.denoiser.net.folder / "network.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [(one.name, one.type) for one in session.get_inputs()] == [
        ("x", "tensor(float)"), ("time", "tensor(float)"), ("label", "tensor(int64)"),
    ]  # fmt: skip
    x, time, label = np.ones((3, 1, 8, 8), np.float32), np.full(3, 0.5, np.float32), np.array([0, 1, 2])
    (raw,) = session.run(["raw"], {"x": x, "time": time, "label": label})
    truth = source.denoiser.net(*(torch.from_numpy(a) for a in (x, time, label)))
    assert off(torch.from_numpy(raw), truth) < 1e-5
    import onnx as package

    assert "/" not in "".join(str(one.metadata_props) for one in package.load(str(file)).graph.node)  # no paths of here
    assert [one.version for one in package.load(str(file)).opset_import if one.domain == ""] == [18]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "share", "error"), [("fp16", 0.65, 0.005), ("int8", 0.65, 0.08)])
def test_smaller_numbers_are_near_and_small(
    source: Model, made: Model, tmp_path: Path, precision: str, share: float, error: float
) -> None:
    small = onnx.export(source, tmp_path / precision, precision, n=3)
    assert 1e-6 < small.card["exported"]["error"] < error
    assert small.card["exported"]["bytes"] < share * made.card["exported"]["bytes"]
    x, label = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(9)), torch.tensor([0, 1, 3])
    assert off(small.denoiser(x, 0.5, label=label), source.denoiser(x, 0.5, label=label)) < 2 * error


def test_the_folder_is_checked(made: Model, tmp_path: Path) -> None:
    folder = made.save(tmp_path / "again")
    told = json.loads((folder / "model.json").read_text())["net"]
    assert told["class"] == "OnnxNet" and told["config"]["files"] == ["network.onnx"]
    data = (folder / "network.onnx").read_bytes()
    (folder / "network.onnx").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="network.onnx is not the file that was saved: sha256"):
        load(folder)


def test_what_cannot_be_is_said(source: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    made = onnx.export(plain, tmp_path / "out", precision, n=2)
    for rows in (1, 3):
        x = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))
        assert off(made.denoiser(x, 0.5), plain.denoiser(x, 0.5)) < (1e-5 if precision == "fp32" else 0.3)
    assert made.classes is None and made.sample(2, steps=3).shape == (2, 1, 8, 8)


def test_a_pipeline_is_refused_at_once(tmp_path: Path) -> None:
    plain = tiny()
    plain.card["pipeline"] = "StableDiffusionPipeline"
    with pytest.raises(BadInput, match="optimum"):
        onnx.export(plain, tmp_path / "out")
    assert not (tmp_path / "out").exists()
