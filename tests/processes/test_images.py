"""From images to a model of each process, its folder, and samples of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.errors import BadInput
from hasten.plan.draw import draw
from hasten.samplers.blurring import BlurringSampler
from hasten.train import open_data
from hasten.workflows.train import TrainConfig, train_model

SIDES = (8, 12)  # not square
TINY: dict[str, Any] = {"steps": 2, "widths": (8,), "patch": 2, "batch_size": 4, "precision": "fp32", "label_drop": 0.0}


def data(folder: Path) -> Any:
    """Twelve grey images."""
    path = folder / "images.npy"
    if not path.is_file():
        import numpy as np

        values = torch.rand(12, *SIDES, generator=torch.Generator().manual_seed(0))
        np.save(path, (values * 255).byte().numpy())
    return open_data(path)


@pytest.mark.parametrize(
    ("process", "sampler"),
    [
        ("blurring:sigma_max=4,prediction=eps", "blurring"),
        ("soft", "soft"),
        ("cold:corruption=mask", "soft:form=cold"),
        ("heat", "soft:form=naive,noise=1.25"),
    ],
)
def test_a_trained_model_is_the_same_after_loading(process: str, sampler: str, tmp_path: Path) -> None:
    """The process, its prior and its sampler come back, and with them every pixel, also of one image alone."""
    trained = train_model(data(tmp_path), tmp_path / "run", TrainConfig(process=process, **TINY), show=False)
    loaded = hasten.load(tmp_path / "run")
    assert loaded.sampler == sampler and loaded.denoiser.schedule == trained.denoiser.schedule
    images = trained.sample(3, steps=3, seed=5)
    assert images.shape == (3, 1, *SIDES) and torch.equal(loaded.sample(3, steps=3, seed=5), images)
    assert (loaded.sample(1, steps=3, seed=6) - images[1:2]).abs().max() < 1e-5
    other = "soft" if process.startswith("blurring") else "blurring"
    with pytest.raises(BadInput, match=f"{other} is no sampler of the process"):
        loaded.sample(1, sampler=other, steps=2)


def test_samples_are_those_of_the_paper_s_algorithm(tmp_path: Path) -> None:
    """A whole run by hand: noise, one reverse step per frequency with the denoiser's estimate of the blurred image."""
    model = train_model(
        data(tmp_path), tmp_path / "run", TrainConfig(process="blurring:sigma_max=4", **TINY), show=False
    )
    process: Any = model.denoiser.schedule
    times = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    noise = hasten.Noise([7], model.shape)
    z = process.begin(noise.initial(), 1.0).double()
    for t, s in zip(times[:-1], times[1:]):
        with torch.no_grad():
            u, w = process.to(z), process.to(model.denoiser(z.float(), t).double())
        d_t, d_s = process.factor(t, process.keys), process.factor(s, process.keys)
        step = process.alpha(t) * d_t / (process.alpha(s) * d_s)
        left = process.sigma(s) ** 2 / process.sigma(t) ** 2
        mean = step * left * u + process.alpha(s) * d_s * (1 - step**2 * left) * (w / d_t)
        if s > 0:
            mean = mean + process.sigma(s) * torch.sqrt(1 - step**2 * left) * process.to(noise().double())
        z = process.back(mean)
    drawn = draw(model.denoiser, BlurringSampler(shrink=0.0), times, noise)
    assert (drawn - z).abs().max() < 1e-4 * float(z.abs().max())
