"""Training of bridges: tiny runs, saved and loaded; the losses of both directions of a Schroedinger bridge."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.loading import load
from hasten.predictions import Eps
from hasten.processes import DSBM, Interpolant
from hasten.samplers.dsbm import DSBMSampler
from hasten.sampling import walk
from hasten.train.data import Batches, Data
from hasten.train.unpaired import unpaired_sources
from hasten.train_processes._directions import Directions
from hasten.train_processes.ddbm import measured_prediction
from hasten.train_processes.dsb import ProportionalDirections, TrainDSB
from hasten.train_processes.dsbm import TrainDSBM
from hasten.train_processes.rectified_flow import RectifiedFlow
from hasten.workflows.train import train_model

GOLDEN = (math.sqrt(5) - 1) / 2
TINY = {"widths": (8,), "patch": 2, "batch_size": 4, "steps": 3, "precision": "fp32", "show": False}


def images(n: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, 1, 8, 12), generator=generator, dtype=torch.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    import numpy as np

    paths = tmp_path / "images.npy", tmp_path / "sources.npy"
    for path, (n, seed) in zip(paths, ((8, 0), (8, 1)), strict=True):
        np.save(path, images(n, seed=seed)[:, 0].numpy())
    return paths


RECIPES = {
    "ddbm": "dbim",
    "ddbm:base=ve,sigma_max=2": "dbim",
    "rectified_flow:coupling=ot": "interpolant",
    "interpolant:diffusion=0.1": "interpolant",
    "dsbm:first=1,inner=2,reuse=1,steps=2": "dsbm",
    "dsb:first=1,inner=1,reuse=1,steps=2": "dsbm",
}


@pytest.mark.parametrize("process", RECIPES)
def test_trained_saved_loaded_and_sampled(process: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, source = folders
    out = tmp_path / "model"
    model = train_model(data, out, process=process, source=str(source), **TINY)
    assert model.sampler == RECIPES[process]
    loaded = load(out)
    assert loaded.denoiser.schedule == model.denoiser.schedule
    assert loaded.denoiser.prediction == model.denoiser.prediction
    given = images(1, seed=3)
    results = [one.sample(1, images=given, steps=3, seed=1) for one in (model, loaded)]
    assert results[0].shape == (1, 1, 8, 12) and torch.isfinite(results[0]).all()
    torch.testing.assert_close(*results, rtol=0, atol=0)
    with pytest.raises(BadInput, match="source images"):
        model.sample(1)


def test_a_bridge_of_two_directions_resumes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, source = folders
    options = {**TINY, "process": "dsbm:first=1,inner=1,reuse=1,steps=2", "source": str(source)}
    whole = train_model(data, tmp_path / "whole", **options)
    train_model(data, tmp_path / "parts", **{**options, "steps": 2})
    resumed = train_model(data, tmp_path / "parts", **options)  # to 3 steps
    assert resumed.card["last"]["step"] == whole.card["last"]["step"] == 3
    assert [p.shape for p in resumed.denoiser.parameters()] == [p.shape for p in whole.denoiser.parameters()]
    with pytest.raises(BadInput):  # other settings
        train_model(data, tmp_path / "parts", **{**options, "process": "dsbm:noise=2", "steps": 4})


def test_two_sets_are_needed(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="dsbm trains on two sets: give --source"):
        train_model(folders[0], tmp_path / "m", process="dsbm", **TINY)
    for make in (
        lambda: TrainDSBM(inner=7),
        lambda: TrainDSBM(coupling="paired"),
        lambda: TrainDSB(steps=0),
        lambda: RectifiedFlow("pairs"),
    ):
        with pytest.raises(BadInput):
            make()


def test_unpaired_sources_differ_between_epochs_and_repeat_in_a_resumed_run() -> None:
    data = unpaired_sources(Data.of(images(5)), Data.of(images(40, seed=1)))
    batches = [Batches(data, 5, seed=2) for _ in range(2)]
    first, again, later = batches[0][0], batches[1][0], batches[0][1]
    assert torch.equal(first["source"], again["source"])
    assert not torch.equal(first["source"].sum((1, 2, 3)).sort()[0], later["source"].sum((1, 2, 3)).sort()[0])
    seen = {float(row.sum()) for k in range(60) for row in batches[0][k]["source"]}
    assert len(seen) > 35  # of 40, more than there are images
    with pytest.raises(BadInput, match="both sets need one size"):
        unpaired_sources(Data.of(images(5)), Data.of(torch.zeros(3, 3, 8, 12, dtype=torch.uint8)))


def test_preconditioning_is_that_of_the_data() -> None:
    x = images(64, 100, 200)
    data = replace(Data.of(x), conditions=lambda rows: {"source": (x[rows].float() / 127.5 - 1) * 0.5})
    from hasten.processes import DDBM

    prediction = measured_prediction(DDBM(), data)
    assert prediction.source_std == pytest.approx(prediction.std / 2)
    assert prediction.covariance == pytest.approx(0.99 * prediction.std**2 / 2)  # fully correlated, limited


# ---- both directions, on one dimension ----


class Affine(nn.Module):
    """`raw = slope(t) z + offset(t)`, a table of cosines in t."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2, width, dtype=torch.float64))

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        waves = torch.cos(math.pi * t.double()[:, None] * torch.arange(self.table.shape[1]))
        slope, offset = (waves @ self.table.T).unbind(1)
        return slope[:, None] * z + offset[:, None]


def normal_batch(n: int) -> Tensor:
    """Normal numbers (n, 1) on a grid of quantiles, in random order."""
    quantiles = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return (quantiles / quantiles.std(correction=0))[torch.randperm(n)][:, None]


def fit_bridge(kind: type[Directions], steps: int, batch: int = 512, **options: Any) -> tuple[float, float, float]:
    """Between N(-.5, 1) and N(.5, 1) with noise 1: covariance of the ends, mean and variance of the images."""
    torch.manual_seed(0)
    both = kind(Denoiser(Affine(), DSBM(1.0), Eps()), steps=20, **options)
    optimizer = torch.optim.Adam(both.parameters(), 0.1)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 2e-3)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        both({"x": normal_batch(batch) - 0.5, "source": normal_batch(batch) + 0.5}).backward()
        optimizer.step()
        rate.step()
    y = normal_batch(20000) + 0.5
    end = walk(DSBMSampler(), both.to_data, y, both.times, lambda: torch.randn_like(y))
    return float(((y - y.mean()) * (end - end.mean())).mean()), float(end.mean()), float(end.var())


def test_markovian_fitting_learns_the_bridge() -> None:
    k, mean, variance = fit_bridge(Directions, 300, first=60, inner=30, reuse=2)
    assert k == pytest.approx(GOLDEN, abs=0.03) and mean == pytest.approx(-0.5, abs=0.05), (k, mean)
    assert variance == pytest.approx(1, abs=0.08)


@pytest.mark.slow
def test_markovian_fitting_within_two_hundredths() -> None:
    k, mean, _ = fit_bridge(Directions, 1500, 1024, first=200, inner=50, reuse=1)
    assert k == pytest.approx(GOLDEN, abs=0.02) and mean == pytest.approx(-0.5, abs=0.02), (k, mean)


def test_proportional_fitting_learns_the_bridge() -> None:
    """Two iterations: the mean -.39 of the exact fit."""
    k, mean, variance = fit_bridge(ProportionalDirections, 300, first=60, inner=60, reuse=5)
    assert k == pytest.approx(GOLDEN, abs=0.1) and -0.55 < mean < -0.2, (k, mean)
    assert variance == pytest.approx(1, abs=0.2)


def test_only_the_direction_whose_turn_it_is_gets_gradients() -> None:
    for kind, turns in ((Directions, (True, False)), (ProportionalDirections, (False, True))):
        both = kind(Denoiser(Affine(), DSBM(1.0), Eps()), first=1, inner=1, reuse=1, steps=2)
        batch = {"x": torch.randn(4, 1).double(), "source": torch.randn(4, 1).double()}
        both(batch)
        for to_data in turns:
            both.zero_grad(set_to_none=True)
            both(batch).backward()
            assert (both.to_data.net.table.grad is not None) == to_data
            assert (both.to_source.net.table.grad is not None) != to_data


def test_coupling_lowers_the_cost_of_the_pairs() -> None:
    from hasten.train_processes._coupled import couple_batch

    batch = {"x": torch.randn(32, 2), "source": torch.randn(32, 2)}
    coupled = couple_batch(batch, "ot")
    assert (coupled["source"] - batch["x"]).square().sum() < (batch["source"] - batch["x"]).square().sum()
    assert torch.equal(coupled["source"].sort(0)[0], batch["source"].sort(0)[0])
    assert couple_batch(batch, "paired") is batch and isinstance(RectifiedFlow("paired").unpaired, bool)
    assert not RectifiedFlow("paired").unpaired and RectifiedFlow().unpaired and Interpolant().bridge
