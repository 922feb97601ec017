"""`train_model`: every setting reaches the trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoiser import Denoiser
from hasten.errors import BadInput
from hasten.predictions import V
from hasten.train.data import Batches, Data
from hasten.train.losses import DenoisingLoss
from hasten.workflows.train import train_model

from .factories import CLASSES, noise_data, noise_images, weights


def trained(out: Path, source: Data | Path | None = None, **options: Any) -> hasten.Model:
    settings = {
        "steps": 2,
        "widths": (8,),
        "patch": 1,
        "batch_size": 4,
        "precision": "fp32",
        "device": "cpu",
        "show": False,
    }
    return train_model(noise_data(classes=CLASSES) if source is None else source, out, **{**settings, **options})


def test_the_ema_weights_are_saved(tmp_path: Path) -> None:
    model = trained(tmp_path, steps=12, lr=0.05)
    saved = torch.load(tmp_path / "checkpoint.pt")["players"]["model"]
    own = hasten.load(tmp_path).denoiser.state_dict()
    assert all(torch.equal(own[key], saved["ema"][key]) for key in own)
    assert any(not torch.equal(own[key], saved["module"][key]) for key in own)
    assert torch.equal(weights(model.denoiser), weights(hasten.load(tmp_path).denoiser))


def test_the_first_step_is_proportional_to_the_learning_rate(tmp_path: Path) -> None:
    """Adam's first step is `rate lr sign(g)`, the decay is `rate lr weight_decay w`: both proportional to lr."""
    start, once, twice = (
        weights(trained(tmp_path / str(lr), steps=1, lr=lr).denoiser) for lr in (1e-12, 0.02, 0.04)
    )  # fmt: skip
    assert (once - start).abs().max() == pytest.approx(0.02 / 200, rel=0.1)
    assert torch.allclose(twice - start, 2 * (once - start), atol=1e-6)


def test_the_seed_determines_the_weights_and_the_order(tmp_path: Path) -> None:
    order: list[list[int]] = []
    pixels = noise_images()

    def fetch(indices: list[int]) -> Tensor:
        order.append(indices)
        return pixels[indices]

    initial = []
    for seed in (0, 3):
        source = Data(12, (1, 8, 8), fetch)
        initial.append(weights(trained(tmp_path / str(seed), source, seed=seed, lr=1e-12).denoiser))
        expected = [Batches(source, 4, seed=seed).indices(k).tolist() for k in range(2)]
        assert order[-2:] == expected
    assert order[-2:] != order[1:3]
    assert not torch.allclose(initial[0], initial[1])


def test_flip_mirrors_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Seen(DenoisingLoss):
        def __call__(self, denoiser: Denoiser, batch: dict[str, Tensor]) -> Tensor:
            seen.append(batch["x"][:, 0, 0, 0] > 0)
            return super().__call__(denoiser, batch)

    monkeypatch.setattr("hasten.train_processes.diffusion.DenoisingLoss", Seen)
    pixels = torch.zeros(32, 1, 8, 8, dtype=torch.uint8)
    pixels[..., :4] = 255
    for flip in (False, True):
        seen.clear()
        trained(tmp_path / str(flip), noise_data(32, classes=CLASSES, images=pixels), steps=1, batch_size=32, flip=flip)
        assert 0 < int((~seen[0]).sum()) < 32 if flip else bool(seen[0].all())


@pytest.mark.parametrize(("drop", "low", "high"), [(0.0, 0, 0), (0.5, 8, 56), (1.0, 64, 64)])
def test_labels_are_dropped_at_the_requested_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: float, low: int, high: int
) -> None:
    seen: list[Tensor] = []
    raw = Denoiser.raw

    def spy(self: Denoiser, x_t: Tensor, t: Any, **cond: Any) -> Tensor:
        seen.append(cond["label"].clone())
        return raw(self, x_t, t, **cond)

    monkeypatch.setattr(Denoiser, "raw", spy)
    model = trained(tmp_path, noise_data(64, classes=CLASSES), steps=1, batch_size=64, label_drop=drop)
    assert len(seen) == 1
    assert low <= int((seen[0] == 3).sum()) <= high
    # a null label that was never trained must not be what guidance starts from
    assert model.denoiser.null_label == (3 if drop else None)
    assert model.guidance_scale == (1.5 if drop else 1.0)
    again = hasten.load(tmp_path)
    assert (again.denoiser.null_label, again.guidance_scale) == (model.denoiser.null_label, model.guidance_scale)
    assert again.sample(2, steps=1).shape == (2, 1, 8, 8)
    if not drop:
        with pytest.raises(BadInput):
            again.sample(2, steps=1, guidance_scale=2.0)


def test_a_model_without_classes_has_no_null_label(tmp_path: Path) -> None:
    model = trained(tmp_path, noise_data())
    assert model.denoiser.null_label is None and model.guidance_scale == 1.0 and model.card["label_drop"] == 0.0


def test_conditions_that_no_network_of_pixels_reads_are_refused(tmp_path: Path) -> None:
    data = replace(noise_data(), conditions=lambda rows: {"pose": torch.zeros(len(rows), 2)})
    with pytest.raises(BadInput, match="has the conditions pose: drop them"):
        train_model(data, tmp_path / "out", steps=1, show=False)
    assert not (tmp_path / "out").exists()


def test_the_conditions_that_a_loss_names_reach_the_network_and_no_others() -> None:
    seen: list[dict[str, Any]] = []

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
            seen.append(cond)
            return x

    batch = {"x": torch.randn(3, 1, 4, 4), "pose": torch.randn(3, 2), "fake": torch.randn(3)}
    denoiser = Denoiser(Net(), hasten.VPCosine(), V())
    DenoisingLoss(label_drop=0.0, conditions=("pose",))(denoiser, batch)
    DenoisingLoss(label_drop=0.0)(denoiser, batch)
    assert [set(cond) for cond in seen] == [{"pose"}, set()]
    assert torch.equal(seen[0]["pose"], batch["pose"])
