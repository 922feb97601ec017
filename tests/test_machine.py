"""Runtimes by name, and the notes of what was probed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.errors import BadInput
from hasten.performance import autotune as machine
from hasten.performance.device import device_for
from hasten.performance.runtime import Runtime


@pytest.fixture(autouse=True)
def own_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("text", ["fp32", "bf16", "fp32+medium", "bf16+high+channels_last"])
def test_spelling(text: str) -> None:
    assert machine.format_runtime(machine.parse_runtime(text)) == text


@pytest.mark.parametrize(
    ("text", "message"), [("fp33", "did you mean 'fp32'"), ("bf16+medum", "did you mean 'medium'")]
)
def test_what_cannot_be_spelled(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        machine.parse_runtime(text)


def test_a_probe_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []

    def probe(denoiser: torch.nn.Module, x: torch.Tensor, **_: object) -> Runtime:
        probed.append(tuple(x.shape))
        return Runtime(dtype="bfloat16", matmul="medium", speedup=2.0)

    monkeypatch.setattr(machine, "probe", probe)
    net = torch.nn.Identity()
    for _ in range(2):
        found = machine.autotune(net, torch.zeros(4, 3), "weights A")
        assert machine.format_runtime(found) == "bf16+medium"
    assert probed == [(4, 3)]
    machine.autotune(net, torch.zeros(4, 3), "weights B")
    machine.autotune(net, torch.zeros(8, 3), "weights A")
    assert probed == [(4, 3), (4, 3), (8, 3)]
    machine.autotune_cache().write_text('{"broken')
    assert machine.format_runtime(machine.autotune(net, torch.zeros(4, 3), "weights A")) == "bf16+medium"
    assert len(probed) == 4


def test_notes_that_cannot_be_written_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(machine, "probe", lambda *_, **__: Runtime())
    assert machine.format_runtime(machine.autotune(torch.nn.Identity(), torch.zeros(1, 2), "a")) == "fp32"


def test_a_device_that_is_not_here() -> None:
    assert device_for("cpu").type == "cpu"
    with pytest.raises(BadInput, match="no device 'gpu' here"):
        device_for("gpu")
