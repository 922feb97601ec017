from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from hasten.errors import BadInput
from hasten.performance.runtime import Runtime, probe


class Pretend(nn.Module):
    """Takes given numbers of seconds, in plain float32 and otherwise; has an error of `error` under autocast."""

    def __init__(self, plain: float, autocast: float, medium: float = 1.0, error: float = 0.01) -> None:
        super().__init__()
        self.plain, self.autocast, self.medium, self.error = plain, autocast, medium, error

    def forward(self, x: Tensor, t: float, scale: float = 1.0) -> Tensor:
        mixed = torch.is_autocast_enabled("cpu")
        seconds = self.autocast if mixed else self.plain
        time.sleep(seconds * (self.medium if torch.get_float32_matmul_precision() == "medium" else 1))
        return x * (scale * (1 + self.error) if mixed else scale)


X = torch.randn(2, 3)


def test_the_faster_setting_is_selected_with_its_error() -> None:
    runtime = probe(Pretend(0.02, 0.004), X, budget=0.4, scale=2.0)
    assert runtime.dtype == "bfloat16" and runtime.matmul == "highest"
    assert runtime.error == pytest.approx(0.01, rel=1e-3)
    assert runtime.speedup is not None and runtime.speedup > 2
    assert set(runtime.measured) == {"float32, highest", "bfloat16, highest", "bfloat16, medium"}
    assert "bfloat16 autocast" in str(runtime) and "relative error 1.0e-02" in str(runtime)


def test_plain_float32_is_selected_where_bfloat16_is_not_faster() -> None:
    for autocast in (0.02, 0.005):
        runtime = probe(Pretend(0.005, autocast), X, budget=0.3)
        assert (runtime.dtype, runtime.matmul, runtime.error, runtime.speedup) == ("float32", "highest", 0.0, 1.0)


@pytest.mark.parametrize("error", [0.2, float("nan")])
def test_an_inaccurate_setting_is_not_selected(error: float) -> None:
    assert probe(Pretend(0.02, 0.002, error=error), X, budget=0.3).dtype == "float32"
    assert probe(Pretend(0.02, 0.002, error=0.2), X, budget=0.3, tolerance=0.5).dtype == "bfloat16"


def test_matmul_precision_is_selected_where_it_is_faster() -> None:
    runtime = probe(Pretend(0.02, 0.03, medium=0.2), X, budget=0.4)
    assert (runtime.dtype, runtime.matmul) == ("float32", "medium")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_slow_network_is_measured_by_single_calls() -> None:
    start = time.perf_counter()
    runtime = probe(Pretend(0.3, 0.1), X, budget=0.3)
    assert runtime.dtype == "bfloat16"
    assert time.perf_counter() - start < 1.0


def test_a_network_has_the_memory_format_and_the_error_of_its_runtime() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    class Denoise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: float) -> Tensor:
            return self.net(x)

    denoiser, x = Denoise(), torch.randn(2, 3, 16, 16)
    runtime = probe(denoiser, x, budget=2.0)
    assert any("channels_last" in name for name in runtime.measured)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last) == runtime.channels_last
    with torch.no_grad():
        plain = denoiser(x, 0.5)
        with runtime.apply():
            y = denoiser(x, 0.5).float()
    assert float((y - plain).norm() / plain.norm()) <= 0.03


def test_settings_apply_within_the_block_only() -> None:
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    with pytest.raises(KeyError), Runtime("bfloat16", "medium", threads=1).apply():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium" and torch.get_num_threads() == 1
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
        raise KeyError
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == (precision, threads)


def test_settings_can_be_overridden() -> None:
    measured = Runtime("bfloat16", error=0.01, speedup=1.6, seconds=0.1)
    assert measured.override(dtype=None, matmul=None) is measured
    other = measured.override(dtype="float32", threads=2)
    assert (other.dtype, other.threads, other.speedup, other.error) == ("float32", 2, None, None)
    with pytest.raises(BadInput, match="did you mean 'bfloat16'"):
        measured.override(dtype="bfloat")
    with pytest.raises(BadInput, match="matmul precision"):
        Runtime(matmul="low")
    with pytest.raises(BadInput, match="-1 threads"):
        Runtime(threads=-1)
    with pytest.raises(BadInput, match="positive budget"):
        probe(Pretend(0, 0), X, budget=0)
