"""Starts as a user meets them: tuned for a model, saved with it, spelled by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.loading import load
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.schedules import Discrete
from hasten.workflows.tune import tune_model


def small() -> Model:
    """An untrained model of two classes on Stable Diffusion's table."""
    torch.manual_seed(0)
    net = UNet(1, widths=(8, 16), classes=2)
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    denoiser = Denoiser(net, Discrete.scaled_linear(), "eps", clock="index").eval().requires_grad_(False)
    return Model(denoiser, "small", (1, 8, 8), ("dark", "bright"), times="lambda", steps=4)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """60 images in two folders, dark and bright."""
    import numpy as np

    levels = np.random.default_rng(0).integers(0, 60, (60, 8, 8)).astype(np.uint8)
    levels[30:] += 180
    np.save(tmp_path / "images.npy", levels)
    np.save(tmp_path / "labels.npy", np.arange(60) // 30)
    return tmp_path / "images.npy"


@pytest.mark.parametrize(
    "start,method",
    [("singdiffusion", "first_step"), ("auxiliary", "auxiliary:levels=(2,4),level=4,rank=8,components=2")],
)
def test_tuned_saved_loaded(start: str, method: str, images: Path, tmp_path: Path) -> None:
    model = small()
    with pytest.raises(BadInput, match="hasten tune MODEL --method"):
        model.sample(2, start=start)
    told = tune_model(model, tmp_path / "tuned", method=method, data=images, n=60, guidance_scale=1.0)
    assert told["parts"] and not model.parts  # the model itself stays as it is
    model, again = (load(tmp_path / "tuned") for _ in range(2))
    for scale in (1.0, 3.0):
        x = model.sample(4, start=start, guidance_scale=scale)
        assert torch.isfinite(x).all() and not torch.equal(x, model.sample(4, guidance_scale=scale))
        assert torch.equal(again.sample(4, start=start, guidance_scale=scale), x)
        alone = torch.cat([model.sample(1, [k % 2], seed=k, start=start, guidance_scale=scale) for k in range(4)])
        assert (alone - x).abs().max() < 1e-3
    if start == "auxiliary":
        times = again.way(start=start).times
        assert abs(float(model.denoiser.schedule.q(times[0])) - 4) < 1e-6 and len(times) == 5


def test_ccdf_by_name() -> None:
    model, y = small(), torch.rand(3, 1, 2, 2) * 2 - 1
    x = model.sample(3, start="ccdf:time=0.4", images=y, batch_size=2)
    assert x.shape == (3, 1, 8, 8)
    assert float(model.way(start="ccdf:time=0.4").times[0]) == 0.4
    with pytest.raises(BadInput, match="begins from images"):
        model.sample(1, start="ccdf:time=0.4")


def test_temperature_scales_the_noise() -> None:
    """On N(0, s^2) data the exact probability flow is linear, so the samples scale with the temperature."""
    model = small()
    exact = hasten_exact(model)
    full, half = (exact.sample(3, seed=1, steps=4, start=f"temperature:value={v}") for v in (1.0, 0.5))
    assert torch.equal(full, exact.sample(3, seed=1, steps=4, start="noise"))
    assert torch.allclose(half, full / 2, atol=1e-6) and float(full.abs().max()) > 0.05
    with pytest.raises(BadInput, match=r"0\.\.2"):
        model.sample(1, start="temperature:value=3")
    with pytest.raises(BadInput, match="images are for a start"):
        model.sample(1, start="temperature", images=torch.zeros(1, 1, 8, 8))


def hasten_exact(model: Model) -> Model:
    """The model of N(0, .1^2) on the same schedule, exact."""

    class Exact(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            t = ((time.double() + 1) / len(schedule.alphas_cumprod)).view(-1, 1, 1, 1)
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            return (x * sigma / (0.01 * alpha**2 + sigma**2)).float()

    schedule = model.denoiser.schedule
    assert isinstance(schedule, Discrete)
    denoiser = Denoiser(Exact(), schedule, "eps", clock="index").eval().requires_grad_(False)
    return Model(denoiser, "exact", (1, 8, 8), times="lambda", sampler="ddim", steps=4)
