"""`hasten export`: its messages, its errors, and that the folder is a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hasten.cli import main

from .adapters._tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny().save(tmp_path_factory.mktemp("models") / "tiny")


def test_the_help_needs_no_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "--precision" in capsys.readouterr().out


def test_errors_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "x")

    def error(*options: str) -> str:
        assert main(["export", str(folder), *options]) in (1, 2)
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "out" in error()
    assert "torchscript" in error("--out", out, "--to", "torchscript")
    assert "--opset is ONNX's" in error("--out", out, "--opset", "18")
    assert "n must be a whole number of at least 1" in error("--out", out, "--n", "0")
    for to, package in (("openvino", "openvino"), ("onnx", "onnx")):
        monkeypatch.setitem(sys.modules, package, None)
        assert f"pip install 'hasten[{to}]'" in error("--out", out, "--to", to)
    assert not Path(out).exists()


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_the_folder_is_a_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str) -> None:
    for package in ("openvino",) if to == "openvino" else ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = tmp_path / to
    assert main(["export", str(folder), "--to", to, "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["error"] < 1e-5 and result["bytes"] > 0
    assert all((out / name).is_file() for name in result["files"])
    assert main(["show", str(out)]) == 0
    config = ["--n", "3", "--steps", "2", "--sampler", "ddim", "--runtime", "fp32"]
    assert main(["sample", str(out), *config, "--out", str(tmp_path / "a.png")]) == 0
    assert main(["export", str(out), "--to", to, "--out", str(tmp_path / "twice")]) == 1
    assert "exported already" in capsys.readouterr().err
