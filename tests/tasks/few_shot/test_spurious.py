"""The claim about times, with a small model: a mark that is the class, a background that goes with it in the shots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hasten
from benchmarks.few_shot_data import spurious
from hasten.tasks.few_shot import FewShotClassifier
from hasten.tasks.few_shot.baselines import LinearProbe
from hasten.train.data import Data


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_weights_in_time_against_a_spurious_background(tmp_path: Path) -> None:
    """Checks (1), (2) and (4): w(t) at least 5 points above uniform weights and above a linear probe on pixels, its
    inverse near chance, and the paired stop with the exhaustive answer on at least 95 % of the images."""
    images, _ = spurious(4096, 12, False, 10**6)
    data = Data.of(((images + 1) * 127.5).round().byte())
    model = hasten.train_model(
        data, tmp_path / "model", steps=900, widths=(24, 48), patch=2, batch_size=64, lr=2e-3, precision="fp32",
        process="diffusion:schedule=vp,prediction=eps", seed=0,
    )  # fmt: skip
    shots, y = spurious(64, 12, True, 1)
    test, labels = spurious(160, 12, False, 2)
    fitted = FewShotClassifier(
        model, rank=4, train_steps=250, lr=3e-3, times=64, spacing="even", elimination="all", weights="uniform"
    ).fit(shots, y, images[:64])
    errors = fitted.decide(test).errors
    found = {}
    for weights in ("time_steps", "uniform", "inverse"):
        w = fitted.replace(weights=weights).weights_
        found[weights] = float(((errors * w).mean(2).argmin(1) == labels).double().mean())
    probe = LinearProbe().fit(shots.flatten(1), y).score(test.flatten(1), labels)
    assert found["time_steps"] >= found["uniform"] + 0.05 and found["time_steps"] > probe, (found, probe)
    assert found["inverse"] <= 0.45, found
    early = fitted.replace(weights="time_steps", spacing="weighted", times=128)
    answer = early.decide(test[:80]).winner
    stopped = early.replace(elimination="paired").decide(test[:80])
    assert float((stopped.winner == answer).double().mean()) >= 0.95
    assert torch.isfinite(stopped.errors.nanmean(2)).all() and float(stopped.evaluations.double().mean()) < 4 * 128
