"""Training an autoencoder: the saved folder, its scale, resuming, and inputs that do not fit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hasten.errors import BadInput
from hasten.train.data import Batches, Data, open_data, to_float
from hasten.workflows.autoencoder import train_autoencoder
from tests.factories import noise_data, noise_images, run_cli, weights

pytest.importorskip("diffusers")
TINY: dict[str, Any] = {"widths": (8, 8), "latent_channels": 2, "batch_size": 4, "show": False}


def colours(n: int = 16, side: int = 12) -> Data:
    """Images of one colour each, which an autoencoder learns fast."""
    values = torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return Data.of((255 * values).expand(n, 3, side, side).byte())


def image_folder(path: Path, splits: dict[str, int], side: int = 12, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(0)
    for split, count in splits.items():
        (path / split).mkdir(parents=True)
        for k in range(count):
            shape = (side, side, 3) if mode == "RGB" else (side, side)
            Image.fromarray(pixels.integers(0, 255, shape, dtype=np.uint8)).save(path / split / f"{k}.png")
    return path


def test_the_saved_folder_has_latents_of_unit_variance(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    data = colours()
    result = train_autoencoder(data, tmp_path, steps=12, **TINY)
    vae = AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        z = vae.encode(to_float(data.images(range(len(data))))).latent_dist.mean * vae.config.scaling_factor
    assert abs(float(z.std(correction=0)) - 1) < 1e-4
    assert z.shape == (16, 2, 6, 6)
    assert json.loads((tmp_path / "autoencoder.json").read_text())["psnr"] == result["psnr"]
    assert "training images" in result["measured_on"] and result["measured"] == 16


def test_it_learns(tmp_path: Path) -> None:
    short, longer = (train_autoencoder(colours(), tmp_path / str(n), steps=n, kl=1e-4, **TINY) for n in (1, 50))
    assert longer["psnr"] > short["psnr"] + 1


def test_a_stopped_run_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the stop lies near the start of the discriminator."""
    options = {**TINY, "steps": 8, "gan_weight": 0.1, "gan_start": 0.5}
    data = noise_data(16, 12)
    train_autoencoder(data, tmp_path / "whole", **options)
    original = Batches.__getitem__

    def interrupted(self: Batches, step: int) -> Any:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(Batches, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
        train_autoencoder(data, tmp_path / "stopped", **options)
    assert 0 < torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"] < 8
    monkeypatch.undo()
    train_autoencoder(data, tmp_path / "stopped", **options)
    names = ["diffusion_pytorch_model.safetensors", "config.json"]
    for name in names:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_held_out_images_are_those_of_the_split(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"train": 6, "val": 3})
    lines: list[str] = []
    result = train_autoencoder(folder, tmp_path / "out", steps=1, log=lines.append, **TINY)
    assert result["measured_on"] == "3 held-out images (val)" and result["measured"] == 3
    assert any("no perceptual term" in line for line in lines) and any("held-out" in line for line in lines)


def test_grey_images_and_an_initial_autoencoder(tmp_path: Path) -> None:
    grey = image_folder(tmp_path / "grey", {"train": 5}, mode="L")
    train_autoencoder(grey, tmp_path / "first", steps=2, **TINY)
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["in_channels"] == config["out_channels"] == 1
    options = {"batch_size": 4, "show": False, "steps": 2}
    colour = image_folder(tmp_path / "colour", {"train": 5})
    train_autoencoder(colour, tmp_path / "next", init=tmp_path / "first", **options)  # read as grey
    assert json.loads((tmp_path / "next" / "config.json").read_text())["block_out_channels"] == [8, 8]
    with pytest.raises(BadInput, match=r"init has the latent_channels 2, the config asks for 3"):
        train_autoencoder(colour, tmp_path / "x", init=tmp_path / "first", latent_channels=3, **options)
    with pytest.raises(BadInput, match="holds no autoencoder of diffusers"):
        train_autoencoder(colour, tmp_path / "x", init=colour, **options)


def test_an_initial_autoencoder_is_where_training_starts(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    train_autoencoder(colours(), tmp_path / "first", steps=2, **TINY)
    options = {"batch_size": 4, "show": False, "steps": 1, "optimiser": "adamw", "lr": 1e-6}
    train_autoencoder(colours(), tmp_path / "next", init=tmp_path / "first", **options)
    first, after = (weights(AutoencoderKL.from_pretrained(tmp_path / name)) for name in ("first", "next"))
    assert torch.allclose(first, after, atol=1e-5) and not torch.equal(first, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 8, 8, 8)}, "images of 12x12 do not fit a factor of 8: set --size 16"),
        ({"widths": None, "factor": 3}, "power of two, got 3: the nearest are 2 and 4"),
        ({"factor": 4}, "a factor of 2, not 4"),
        ({"widths": (6, 8)}, r"multiples of 4 \(.*\), got 6: the nearest is 8"),
        ({"gan_weight": -1.0}, "gan_weight must be 0 or more"),
        ({"kl": -1.0}, "kl must be 0 or more"),
        ({"optimiser": "sgd"}, "unknown optimiser"),
        ({"perceptual": "nowhere"}, "there is no file or folder nowhere"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        train_autoencoder(noise_data(4, 12), tmp_path, **{**TINY, "steps": 1, **options})


def test_sizes_that_are_found_by_default(tmp_path: Path) -> None:
    from hasten.workflows.autoencoder import AutoencoderConfig, network_for

    def shape_of(side: int, **options: Any) -> tuple[Any, ...]:
        data = Data.of(noise_images(1, side, 3))
        config = network_for(data, AutoencoderConfig(**options)).config
        return tuple(config.block_out_channels), config.latent_channels, config.norm_num_groups

    assert shape_of(64) == ((16, 32, 64), 8, 16)  # that of the bundled pipeline `emoji`
    assert shape_of(128) == ((32, 64, 128, 128), 8, 16)
    assert shape_of(64, factor=8, latent_channels=4) == ((16, 32, 64, 64), 4, 16)


def test_another_model_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="holds a network of diffusers already"):
        train_autoencoder(noise_data(4, 12), tmp_path, steps=1, **TINY)


def test_the_command(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"train": 4})
    common = ["train", folder, "--kind", "autoencoder", "--out", tmp_path / "vae", "--steps", "1", "--batch-size", "2"]
    code, out, _ = run_cli(*common, "--widths", "8,8", "--latent-channels", "2", "--blocks", "2")
    assert code == 0 and "scaling factor" in out and "SSIM" in out
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["layers_per_block"] == 2
    for extra, message in (
        (["--patch", "2"], "--patch is not for --kind autoencoder"),
        (["--kind", "autoencodr"], "did you mean 'autoencoder'"),
        (["--kind", "model", "--gan-weight", "1"], "--gan-weight is for --kind autoencoder or decoder"),
    ):
        code, _, err = run_cli(*common[:2], *extra, "--out", tmp_path / "x", "--steps", "1", *(
            [] if "--kind" in extra else ["--kind", "autoencoder"]
        ))  # fmt: skip
        assert code == 1 and message in err, err
    assert open_data(folder).shape == (3, 12, 12)
