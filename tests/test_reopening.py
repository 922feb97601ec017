"""User networks that would load differently, or cannot be trained, are refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.model import Model
from hasten.schedules import VPCosine
from hasten.workflows.distill import distill_model
from hasten.workflows.tune import tune_model


class Own(nn.Module):
    """A linear map of the channels."""

    def __init__(self, hidden: int = 4) -> None:
        super().__init__()
        self.mix: nn.Module = nn.Sequential(nn.Linear(3, hidden), nn.SiLU(), nn.Linear(hidden, 3))

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)


class Scaled(Own):
    """An argument with a default, which is in no tensor."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return self.scale * super().forward(x, time)


class Unsaved(Own):
    """A random buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.randn(1), persistent=False)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return self.noise * super().forward(x, time)  # type: ignore[operator]


class Lazy(Own):
    """Layers whose width is that of the first sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.LazyLinear(4), nn.SiLU(), nn.LazyLinear(3))


class Random(Own):
    """Dropout and a batch norm, in training mode as every new network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return self.drop(super().forward(self.norm(x), time))


class Extra(Own):
    """State other than tensors."""

    def get_extra_state(self) -> Any:
        return {"k": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class OldNorm(Own):
    """A weight computed before every call, which cannot be copied after training."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.utils.weight_norm(nn.Linear(3, 3))


class Weightless(nn.Module):
    """No parameters."""

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return x / 2


class Complex(Own):
    """Complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return torch.einsum("bc...,dc->bd...", x.to(torch.complex64), self.matrix).real


class Pair(Own):
    """Returns a tuple, as many networks do."""

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Any:
        return (super().forward(x, time),)


class Narrow(Own):
    """Returns one channel, which would be broadcast."""

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return super().forward(x, time)[:, :1]


class Timeless(Own):
    """Takes no time."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


def model(net: nn.Module) -> Model:
    return Model(Denoiser(net, VPCosine(), "v"), "mine", (3, 8, 8))


def distil(net: nn.Module, folder: Path) -> Path:
    np.save(folder / "i.npy", np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    method, out = "progressive:steps=(1,)", folder / "out"
    distill_model(model(net), out, method, folder / "i.npy", steps=2, batch_size=4, precision="fp32", show=False)
    return out


def other_layer() -> nn.Module:
    net = Own()
    net.mix[1] = nn.ReLU()  # type: ignore[operator]
    return net


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Scaled(5.0), "Scaled, built again.*has another output.*net.config"),
        (Unsaved, "Unsaved, built again.*has another output.*persistent=True"),
        (other_layer, "Own, built again.*has another output"),
        (Lazy, "is lazy and has seen no sample yet: run the network once"),
        (Extra, "state_dict holds _extra_state, a dict: only tensors"),
    ],
)
def test_networks_that_would_load_differently_are_refused(make: Any, why: str, tmp_path: Path) -> None:
    """By every function that saves, before any work."""
    with pytest.raises(BadInput, match=why):
        model(make()).save(tmp_path / "saved")
    with pytest.raises(BadInput, match=why):
        distil(make(), tmp_path)
    with pytest.raises(BadInput, match=why):
        tune_model(model(make()), tmp_path / "tuned", n=4)
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (OldNorm, "mine cannot be copied.*parametrizations.weight_norm"),
        (Weightless, "mine has no weights that could be trained"),
        (Pair, "Pair must return one tensor of the shape of its samples.*returned a tuple"),
        (Narrow, r"Narrow must return one tensor.*\(2, 3, 8, 8\), it returned a tensor of shape \(2, 1, 8, 8\)"),
        (Timeless, "the network of mine, Timeless, fails on samples of shape .* with the time .*TypeError"),
    ],
)
def test_untrainable_networks_are_refused(make: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=why):
        distil(make(), tmp_path)
    assert not (tmp_path / "out" / "run.json").exists()


def test_networks_without_weights_sample_and_load(tmp_path: Path) -> None:
    saved = model(Weightless())
    saved.save(tmp_path / "m")
    assert torch.equal(hasten.load(tmp_path / "m").sample(2), saved.sample(2))


def test_initialised_lazy_layers_load(tmp_path: Path) -> None:
    saved = model(Lazy())
    before = saved.sample(2)
    saved.save(tmp_path / "m")
    assert torch.allclose(hasten.load(tmp_path / "m").sample(2), before, atol=1e-5)
    assert hasten.load(distil(saved.denoiser.net, tmp_path)).sample(2).isfinite().all()


def test_sampling_runs_in_evaluation_mode_and_restores_the_mode(tmp_path: Path) -> None:
    """Image k depends on seed + k alone: without dropout and batch statistics; the mode of every part returns."""
    torch.manual_seed(0)
    saved = model(Random())
    saved.denoiser.net.norm.eval()  # type: ignore[union-attr,operator]
    one, four = saved.sample(1, seed=2), saved.sample(4, seed=1)
    assert torch.allclose(one[0], four[1], atol=1e-5)
    assert saved.denoiser.net.training and not saved.denoiser.net.norm.training  # type: ignore[union-attr]
    saved.save(tmp_path / "m")
    assert torch.equal(saved.sample(4, seed=1), four), "saving evaluates the network, which must leave no trace"
    assert torch.allclose(hasten.load(tmp_path / "m").sample(4, seed=1), four, atol=1e-4)


def test_complex_weights_train(tmp_path: Path) -> None:
    assert hasten.load(distil(Complex(), tmp_path)).sample(2).isfinite().all()


def test_one_label_and_several_are_read_by_evaluate(capsys: pytest.CaptureFixture[str]) -> None:
    """Up to the refusal that follows the labels."""
    from hasten.cli import main

    assert main(["evaluate", "fashion", "--label", "bag,nothing", "--n", "12", "--device", "cpu"]) == 1
    assert "nothing" in capsys.readouterr().err
