"""torchao's linear layers: refused without the package and off CUDA; with it, a copy of the network gets them."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from hasten.accelerators import SamplingContext
from hasten.accelerators.torchao import CONFIGS, TorchAO
from hasten.errors import BadInput
from hasten.pick import pick

from ._tiny import denoiser_of, unet

NOTHING = SamplingContext()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for torchao.quantization, which makes the weights of the layers that it is given 0."""

    def quantize_(net: nn.Module, config: Any, filter_fn: Any) -> None:
        for name, module in net.named_modules():
            if filter_fn(module, name):
                module.weight = nn.Parameter(torch.zeros_like(module.weight))
                module.config = config

    package: Any = types.ModuleType("torchao.quantization")
    package.quantize_ = quantize_
    for name in CONFIGS.values():
        setattr(package, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", package)
    return package


def test_without_the_package_and_off_cuda_it_is_refused(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    plain = denoiser_of(unet())
    with pytest.raises(BadInput, match="kernels are for CUDA, found a network on cpu: use quantize"):
        TorchAO().apply(plain, NOTHING)
    del library.Int8WeightOnlyConfig
    with pytest.raises(BadInput, match="has no Int8WeightOnlyConfig: pip install -U torchao"):
        TorchAO().apply(plain, NOTHING)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(BadInput, match="needs the package torchao: pip install torchao"):
        TorchAO().apply(plain, NOTHING)
    with pytest.raises(BadInput, match="int8, int8_weights or float8|dtype"):
        pick("accelerators", "torchao:dtype=int7")


@pytest.mark.parametrize("dtype", CONFIGS)
def test_a_copy_of_the_network_gets_its_layers(dtype: str, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.accelerators import torchao

    plain = denoiser_of(unet(widths=(16, 32)))
    before = {key: value.clone() for key, value in plain.net.state_dict().items()}
    monkeypatch.setattr(torchao, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    if dtype == "float8":
        with pytest.raises(BadInput, match="float8 needs compute capability 8.9 or newer, found 8.0"):
            TorchAO(dtype).apply(plain, NOTHING)
        return
    fast: Any = TorchAO(dtype).apply(plain, NOTHING)
    changed = [m for m in fast.net.modules() if type(getattr(m, "config", None)).__name__ == CONFIGS[dtype]]
    assert changed and all(isinstance(m, nn.Linear) and not m.weight.any() for m in changed)
    assert all(torch.equal(value, before[key]) for key, value in plain.net.state_dict().items())
