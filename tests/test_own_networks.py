"""One's own networks: saved by the import path of their class, refused before training, samples of any shape."""

from __future__ import annotations

import importlib
import json
import sys
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
from hasten.nets.unet import UNet
from hasten.schedules import VPLinear
from hasten.storage import weights
from hasten.train.data import Data
from hasten.workflows.distill import distill_model
from hasten.workflows.tune import tune_model


class Plain(nn.Module):
    """A network without a config: its constructor takes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, **cond: Any) -> Tensor:
        return self.conv(x) * (time / 1000).view(-1, 1, 1, 1)


class Any1(nn.Module):
    """For samples of any shape (C, ...): a linear map of the first axis, and a label where there are classes."""

    def __init__(self, channels: int, classes: int = 0) -> None:
        super().__init__()
        self.config = {"channels": channels, "classes": classes}
        self.mix = nn.Linear(channels, channels)
        self.label = nn.Embedding(classes + 1, channels) if classes else None
        self.null_label = classes or None

    def forward(self, x: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        y = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        if self.label is not None and label is not None:
            y = y + self.label(label).reshape(len(x), -1, *[1] * (x.ndim - 2))
        return y


class Misdescribed(nn.Module):
    """Its config builds another network."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.config = {"width": 4}
        self.layer = nn.Linear(width, width)


class Needy(nn.Module):
    """Its constructor wants what no config says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


class Odd(nn.Module):
    """Its config is no dict."""

    def __init__(self) -> None:
        super().__init__()
        self.config = object()


def plain() -> Model:
    torch.manual_seed(0)
    return Model(Denoiser(Plain(), VPLinear(), "eps", clock="t1000"), "mine", (3, 8, 8))


def of_shape(*shape: int, classes: int = 0) -> Model:
    torch.manual_seed(0)
    names = tuple(f"c{k}" for k in range(classes)) or None
    return Model(Denoiser(Any1(shape[0], classes), VPLinear(), "v"), "mine", shape, names)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    np.save(tmp_path / "i.npy", np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8))
    return tmp_path / "i.npy"


def test_it_is_saved_as_weights_and_the_import_path_of_its_class(tmp_path: Path) -> None:
    model = plain()
    model.save(tmp_path / "m")
    description = json.loads((tmp_path / "m" / "model.json").read_text())["net"]
    assert description == {"class": "Plain", "module": __name__, "config": {}}
    again = hasten.load(tmp_path / "m")
    assert torch.equal(again.sample(2, seed=1), model.sample(2, seed=1))


SOURCE = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.config = {"width": width}
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x, time, **cond):
        return self.layer(x)
"""


def test_importing_a_class_is_the_users_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder never makes hasten import what the user has not: in a process that has not imported it, it is refused."""
    (tmp_path / "elsewhere.py").write_text(SOURCE + "\nopen('imported', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    net = importlib.import_module("elsewhere").Net(4)
    Model(Denoiser(net, VPLinear(), "v"), "m", (3, 8, 8)).save(tmp_path / "saved")
    (tmp_path / "imported").unlink()
    del sys.modules["elsewhere"]
    with pytest.raises(BadInput, match=r"class Net of elsewhere, which is not imported.*networks=\[Net\].*trust_code"):
        hasten.load(tmp_path / "saved")
    assert not (tmp_path / "imported").exists() and "elsewhere" not in sys.modules
    monkeypatch.setenv(weights.TRUST, "0")
    with pytest.raises(BadInput, match="not imported"):
        hasten.load(tmp_path / "saved")
    try:
        net = hasten.load(tmp_path / "saved", trust_code=True).denoiser.net
        assert type(net).__module__ == "elsewhere" and (tmp_path / "imported").exists()
        hasten.load(tmp_path / "saved")  # it is imported now
        kind = sys.modules.pop("elsewhere").Net
        assert type(hasten.load(tmp_path / "saved", networks=[kind]).denoiser.net) is kind
        monkeypatch.setenv(weights.TRUST, "1")
        assert hasten.load(tmp_path / "saved").sample(1).shape == (1, 3, 8, 8)
    finally:
        sys.modules.pop("elsewhere", None)


def test_only_networks_are_built(tmp_path: Path) -> None:
    plain().save(tmp_path / "m")
    file = tmp_path / "m" / "model.json"
    description = json.loads(file.read_text())
    description["net"] = {"class": "Path", "module": "pathlib", "config": {}}
    file.write_text(json.dumps(description))
    with pytest.raises(BadInput, match="pathlib.Path is not a class of networks"):
        hasten.load(tmp_path / "m")


class Local:
    @staticmethod
    def net() -> nn.Module:
        class Inside(Plain):
            pass

        return Inside()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Local.net, "defined inside a function: move it to the top level"),
        (Misdescribed, None),
        (lambda: Misdescribed(8), "builds a network with other tensors, first layer.bias"),
        (lambda: Needy(4), r"Needy\(\) fails \(TypeError: .*give the network an attribute config"),
        (Odd, "config is a object: it must be a dict"),
        (lambda: nn.DataParallel(Plain()), "wrapped in DataParallel: give the network itself, net.module"),
        (lambda: nn.Sequential(nn.Linear(1, 1)), "builds a network with other tensors"),
        (lambda: nn.Sequential(nn.LazyLinear(1)), "is lazy and has seen no sample yet"),
    ],
)
def test_networks_that_cannot_be_reloaded_are_refused(make: Any, message: str | None) -> None:
    before = torch.get_rng_state()
    why = weights.save_refusal(make())
    if message is None:
        assert why is None
    else:
        with pytest.raises(BadInput, match=message):
            raise BadInput(str(why))
    net = make()
    torch.set_rng_state(before)
    weights.save_refusal(net)
    assert torch.equal(torch.get_rng_state(), before), "to try its constructor leaves no trace"


def test_the_main_program_is_refused(tmp_path: Path) -> None:
    model = plain()
    model.denoiser.net = type("Net", (Plain,), {"__module__": "__main__"})()
    with pytest.raises(BadInput, match="Net is defined in the program itself, .*: move it to a module of its own"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_refusal_comes_before_training(tmp_path: Path, images: Path) -> None:
    model = plain()
    model.denoiser.net = Local.net()
    for call in (
        lambda: distill_model(model, tmp_path / "out", "progressive:steps=(4,2)", images, steps=4, show=False),
        lambda: tune_model(model, tmp_path / "out", "optimized_steps", steps=4),
        lambda: hasten.quantize_model(model, tmp_path / "out", steps=4),
    ):
        with pytest.raises(BadInput, match="cannot be saved: its class .* is defined inside a function"):
            call()
    assert not (tmp_path / "out").exists()


def test_a_decoder_of_ones_own_is_refused_before_work(tmp_path: Path) -> None:
    model = plain()
    model.decoder = object()
    with pytest.raises(BadInput, match="its decoder is no autoencoder of diffusers"):
        tune_model(model, tmp_path / "o", "optimized_steps", steps=4)


def test_the_config_of_a_custom_network_is_not_mistaken_for_ours() -> None:
    from hasten.adapters._export import exported_config

    assert "channels" in exported_config(UNet(1, widths=(8,))) and exported_config(Any1(3, 2)) == {"null_label": 2}


def test_it_is_quantised(tmp_path: Path) -> None:
    hasten.quantize_model(plain(), tmp_path / "q", steps=2, images=2, keep=())
    again = hasten.load(tmp_path / "q")
    assert again.card["quantized"]["bytes_fp32"] and again.sample(2, steps=2).isfinite().all()
    assert type(again.denoiser.net.conv).__name__ == "QConv2d"


@pytest.mark.parametrize("method", ["progressive:steps=(4,2)", "denoising_student:pairs=8,pair_steps=2"])
def test_it_is_distilled_and_the_same_call_again_changes_nothing(tmp_path: Path, images: Path, method: str) -> None:
    for _ in range(2):
        distill_model(plain(), tmp_path / "out", method, images, steps=6, batch_size=4, precision="fp32", show=False)
    student = hasten.load(tmp_path / "out")
    assert isinstance(student.denoiser.net, Plain) and student.sample(2).isfinite().all()


@pytest.mark.parametrize("shape", [(2,), (3, 5), (2, 3, 4, 4)])
def test_samples_of_any_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Saved, loaded, tuned, distilled, sampled; no value is clipped as pixels are."""
    model = of_shape(*shape)
    assert model.codec == "raw"
    wide = model.sample(64, steps=4)
    assert wide.shape == (64, *shape) and float(wide.abs().max()) > 1.5
    model.save(tmp_path / "m")
    assert torch.allclose(hasten.load(tmp_path / "m").sample(3, steps=4), model.sample(3, steps=4), atol=1e-4)
    tune_model(hasten.load(tmp_path / "m"), tmp_path / "t", "optimized_steps", steps=4, n=4)
    assert hasten.load(tmp_path / "t").sample(2).shape == (2, *shape)
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    common: Any = {"steps": 6, "batch_size": 4, "precision": "fp32", "show": False}
    distill_model(model, tmp_path / "d", "progressive:steps=(4,2)", x, **common)
    assert hasten.load(tmp_path / "d").sample(2).shape == (2, *shape) and not list((tmp_path / "d").glob("*.png"))
    with pytest.raises(BadInput, match="no images are: give data as a tensor"):
        distill_model(model, tmp_path / "e", "progressive", tmp_path / "i.npy", **common)
    with pytest.raises(BadInput, match=r"samples of shape .*, data has \(7,\)"):
        distill_model(model, tmp_path / "e", "progressive", torch.zeros(4, 7), **common)


@pytest.mark.parametrize("shape", [(2,), (3, 8, 8)])
def test_guided_adds_the_scale_to_any_network(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = of_shape(*shape, classes=3)
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(24, *shape, generator=g), torch.arange(24) % 3
    data = Data(24, shape, lambda rows: x[rows], labels, model.classes)  # type: ignore[arg-type]
    common: Any = {"steps": 12, "batch_size": 8, "precision": "fp32", "show": False, "guidance_scale": 2.0}
    distill_model(model, tmp_path / "g", "guided:steps=(4,2),guidance=(1,3)", data, **common)
    student = hasten.load(tmp_path / "g")
    assert student.denoiser.guidance_range == (1.0, 3.0) and student.sample(3, guidance_scale=1.5).isfinite().all()
    # a method without scales gets the network at one of them, and its student is saved too
    middle = hasten.load(tmp_path / "g" / "guidance")
    distill_model(middle, tmp_path / "p", "progressive:steps=(2,),start=16", data, **common)
    assert hasten.load(tmp_path / "p").denoiser.guidance_range == (2.0, 2.0)
