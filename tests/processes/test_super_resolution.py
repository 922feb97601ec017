"""Training of super-resolution: pairs, residuals, crops, and what a trained model gains over bicubic enlargement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import hasten
from hasten.errors import BadInput
from hasten.pick import pick
from hasten.train.crops import crops, open_crops
from hasten.train.data import Batches, Data
from hasten.train_processes import TrainSettings
from hasten.train_processes.super_resolution import residual_std
from hasten.utils.resizing import enlarge, reduce
from hasten.workflows.train import train_model


def textures(n: int, side: int, seed: int = 0) -> Tensor:
    """Smooth random fields with edges, uint8 (n, 3, side, side)."""
    g = torch.Generator().manual_seed(seed)
    low = enlarge(torch.randn(n, 3, side // 8, side // 8, generator=g), 8)
    return (127.5 + 100 * torch.tanh(3 * low)).round().clamp(0, 255).to(torch.uint8)


def folder_of(images: Tensor, where: Path) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(where / f"{k}.png")
    return where


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarge_and_reduce_are_pillows(factor: int) -> None:
    x = torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(x[0, 0].numpy())
    for ours, size in (
        (enlarge(x, factor), (24 * factor, 16 * factor)),
        (reduce(x, factor), (24 // factor, 16 // factor)),
    ):
        theirs = torch.from_numpy(np.array(image.resize(size, Image.Resampling.BICUBIC)))
        assert float((ours[0, 0] - theirs).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="does not divide"):
        reduce(x[..., :15], factor)


def test_crops_of_any_sizes(tmp_path: Path) -> None:
    """Every crop lies in its image; with `flip` all eight symmetries occur; small images are left out, in a line."""
    ramp = torch.arange(40 * 56).view(40, 56)
    image = torch.stack([ramp % 256, ramp // 256, torch.zeros_like(ramp)]).to(torch.uint8)
    folder_of(image[None], tmp_path / "a")
    Image.fromarray(np.full((8, 90, 3), 7, np.uint8)).save(tmp_path / "a" / "thin.png")
    data = open_crops(tmp_path / "a", 16, flip=True)
    assert data.shape == (3, 16, 16) and len(data) == 1024
    kinds, places = set(), set()
    for k in range(400):
        crop = data.images([k])[0].long()
        value = crop[0] + 256 * crop[1]
        assert torch.equal(data.images([k])[0].long(), crop)  # the same at every call
        top, left = divmod(int(value.min()), 56)
        window = ramp[top : top + 16, left : left + 16]
        kind = next(
            (s, r)
            for s in (0, 1)
            for r in range(4)
            if torch.equal(torch.rot90(window.flip(-1) if s else window, r), value)
        )
        kinds.add(kind)
        places.add((top, left))
    assert len(kinds) == 8 and len(places) > 250
    assert {top for top, _ in places} == set(range(25)) and max(left for _, left in places) == 40
    with pytest.raises(BadInput, match="no image has a crop of 64 pixels"):
        open_crops(tmp_path / "a", 64)
    assert len(crops(Data.of(textures(3, 32)), 16)) == 3072


def test_the_loss_is_that_of_the_residual() -> None:
    """A network that answers the exact v of the residual has loss 0, whatever the sources are."""
    process = pick("train_processes", "super_resolution:factor=4,width=128")
    data = Data.of(textures(8, 32))
    degrade = pick("degradations", process.degradation)
    from hasten.train.pairs import degraded_pairs

    pairs = degraded_pairs(data, degrade)
    denoiser = process.denoiser(pairs, lambda **options: None)
    (module,) = process.modules(denoiser, pairs, TrainSettings())
    std = residual_std(pairs, 4)
    batch = Batches(pairs, 4)[0]
    r = (batch["x"] - enlarge(batch["source"], 4)) / std
    assert float(r.std()) == pytest.approx(1, abs=0.3)

    def exact(x_t: Tensor, time: Tensor, source: Tensor) -> Tensor:
        angle = (time.double() * torch.pi / 2).view(-1, 1, 1, 1)
        eps = (x_t - angle.cos() * r) / angle.sin().clamp_min(1e-6)
        return (angle.cos() * eps - angle.sin() * r).float()

    class Exact(torch.nn.Module):
        source_channels, source_factor = 3, 4

        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, time: Tensor, source: Tensor) -> Tensor:
            return exact(x, time, source)

    denoiser.net = Exact()
    assert float(module.loss(batch)) < 1e-5
    assert float(module.loss({**batch, "x": batch["x"].flip(0)})) > 0.1


def test_train_save_reopen_and_sample_other_sizes(tmp_path: Path) -> None:
    data = folder_of(textures(6, 48), tmp_path / "data")
    how: dict[str, Any] = {"crop": 32, "flip": True, "batch_size": 4, "precision": "fp32", "steps": 2}
    made = train_model(data, tmp_path / "m", process="super_resolution:factor=4", show=False, **how)
    model = hasten.load(tmp_path / "m")
    assert model.codec == "residual" and model.residual_std == made.residual_std and model.source_shape == (3, 8, 8)
    assert model.card["degrade"] == "low_resolution:factor=4" and model.card["crop"] == 32
    source = torch.rand(2, 3, 12, 8) * 2 - 1
    first = model.sample(2, images=source, steps=2, seed=3)
    assert first.shape == (2, 3, 48, 32) and float(first.abs().max()) <= 1
    noise = hasten.Noise(range(3, 5), (3, 48, 32)).initial()
    assert torch.equal(first, model.sample(2, images=source, steps=2, noise=noise))
    assert not torch.equal(first, model.sample(2, images=source, steps=2, noise=noise.flip(0)))
    assert not torch.allclose(first, model.sample(2, images=source.flip(0), steps=2, noise=noise))
    x = torch.rand(2, 3, 48, 32) * 2 - 1
    assert torch.allclose(model.decode(model.encode(x, source), source), x, atol=1e-6)
    with pytest.raises(BadInput, match="sides that 4 divides"):
        model.sample(1, images=source[:1, :, :10], steps=1)
    with pytest.raises(BadInput, match="noise must be of shape"):
        model.sample(2, images=source, steps=1, noise=noise[:, :, :8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": "super_resolution:factor=4", "crop": 24}, "set crop .--crop. 32"),
        ({"process": "super_resolution:factor=3", "crop": 32}, "does not divide"),
        ({"process": "super_resolution:prediction=eps", "crop": 32}, "schedule=linear"),
        ({"process": "super_resolution:width=100", "crop": 32}, "width"),
        ({"process": "super_resolution", "degrade": "low_resolution:factor=2", "crop": 32}, "need sources of 8x8"),
        ({"process": "super_resolution", "crop": 32, "size": 32}, "size is for whole images"),
        ({"process": "i2sb", "degrade": "low_resolution:factor=4", "size": 32}, "sources of the size of the data"),
        ({"process": "super_resolution", "crop": 64}, "no image has a crop of 64"),
    ],
)
def test_one_line_for_what_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    np.save(tmp_path / "images.npy", textures(3, 48).permute(0, 2, 3, 1).numpy())
    with pytest.raises(BadInput, match=message) as error:
        train_model(tmp_path / "images.npy", tmp_path / "m", show=False, steps=1, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "m" / "model.json").exists()


@pytest.mark.parametrize("spec", ["network=unet", "prediction=eps,schedule=linear,loss=l1,residual=false,dropout=0.1"])
def test_the_other_forms_train(tmp_path: Path, spec: str) -> None:
    """The U-Net of the enlarged source, and the paper's recipe."""
    np.save(tmp_path / "images.npy", textures(4, 32).permute(0, 2, 3, 1).numpy())
    how: dict[str, Any] = {"crop": 16, "batch_size": 2, "precision": "fp32", "steps": 1, "widths": [16], "patch": 1}
    model = train_model(
        tmp_path / "images.npy", tmp_path / "m", process=f"super_resolution:factor=2,{spec}", show=False, **how
    )
    out = model.sample(1, images=torch.zeros(1, 3, 8, 8), steps=2)
    assert out.shape == (1, 3, 16, 16)
    assert model.codec == ("image" if "residual" in spec else "residual")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_steps_beat_bicubic_and_equal_two_hundred(tmp_path: Path) -> None:
    """x4 on 64 textures: PSNR of 20 DDIM steps > bicubic + .5 dB, and within .3 dB of 200 steps."""
    np.save(tmp_path / "images.npy", textures(64, 64).permute(0, 2, 3, 1).numpy())
    how: dict[str, Any] = {"crop": 32, "flip": True, "batch_size": 16, "precision": "fp32", "steps": 1200}
    model = train_model(tmp_path / "images.npy", tmp_path / "m", process="super_resolution:factor=4", show=False, **how)
    x = textures(16, 64, seed=1).float() / 127.5 - 1
    source = reduce(x, 4)

    def psnr(y: Tensor) -> float:
        return float(-10 * ((y.clamp(-1, 1) - x) / 2).square().mean().log10())

    figures = [psnr(model.sample(16, images=source, sampler="ddim", steps=steps)) for steps in (20, 200)]
    assert figures[0] > psnr(enlarge(source, 4)) + 0.5, (figures, psnr(enlarge(source, 4)))
    assert abs(figures[0] - figures[1]) < 0.3, figures
