"""Runtimes by name, and the autotune cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.errors import BadInput
from hasten.performance import autotune as tuner
from hasten.performance.device import device_for
from hasten.performance.runtime import Runtime


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("text", ["fp32", "bf16", "fp32+medium", "bf16+high+channels_last"])
def test_runtimes_are_parsed_and_formatted(text: str) -> None:
    assert tuner.format_runtime(tuner.parse_runtime(text)) == text


@pytest.mark.parametrize(
    ("text", "message"), [("fp33", "did you mean 'fp32'"), ("bf16+medum", "did you mean 'medium'")]
)
def test_unknown_runtimes_name_the_nearest(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tuner.parse_runtime(text)


def test_a_probe_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []

    def probe(denoiser: torch.nn.Module, x: torch.Tensor, **_: object) -> Runtime:
        probed.append(tuple(x.shape))
        return Runtime(dtype="bfloat16", matmul="medium", speedup=2.0)

    monkeypatch.setattr(tuner, "probe", probe)
    net = torch.nn.Identity()
    for _ in range(2):
        result = tuner.autotune(net, torch.zeros(4, 3), "weights A")
        assert tuner.format_runtime(result) == "bf16+medium"
    assert probed == [(4, 3)]
    tuner.autotune(net, torch.zeros(4, 3), "weights B")
    tuner.autotune(net, torch.zeros(8, 3), "weights A")
    assert probed == [(4, 3), (4, 3), (8, 3)]
    tuner.autotune_cache().write_text('{"broken')
    assert tuner.format_runtime(tuner.autotune(net, torch.zeros(4, 3), "weights A")) == "bf16+medium"
    assert len(probed) == 4


def test_a_cache_that_cannot_be_written_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tuner, "probe", lambda *_, **__: Runtime())
    assert tuner.format_runtime(tuner.autotune(torch.nn.Identity(), torch.zeros(1, 2), "a")) == "fp32"


def test_an_unavailable_device() -> None:
    assert device_for("cpu").type == "cpu"
    with pytest.raises(BadInput, match="no device 'gpu' here"):
        device_for("gpu")
