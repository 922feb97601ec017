"""The tiny models, networks, data and commands that tests share: one place for what many of them build.

Networks have random weights, none of them zero, so that no layer hides a mistake. Pipelines of diffusers are built by
`tests.adapters.tiny`, which needs the package; `pipeline` builds one from there.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hasten.cli import main
from hasten.denoiser import Denoiser
from hasten.model import Model
from hasten.nets.unet import UNet
from hasten.predictions import Prediction
from hasten.schedules import Schedule, VPCosine
from hasten.train.data import Data

SHAPE = (1, 8, 8)
CLASSES = ("coat", "bag", "boot")

# ---- networks and models ----


def tiny_unet(
    classes: int = 0,
    channels: int = 1,
    widths: Sequence[int] = (8,),
    embedding: int = 8,
    std: float = 0.15,
    seed: int = 0,
    **options: Any,
) -> UNet:
    """A U-Net whose weights are all N(0, std^2), biases and layers that start at zero too. options: more of `UNet`."""
    torch.manual_seed(seed)
    net = UNet(channels, widths=widths, classes=classes, embedding=embedding, **options)
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net


def tiny_denoiser(
    classes: int = 0,
    schedule: Schedule | None = None,
    prediction: Prediction | str = "v",
    null_label: int | None = None,
    trainable: bool = False,
    **options: Any,
) -> Denoiser:
    """A denoiser of `tiny_unet`; in evaluation mode and frozen, or `trainable`. schedule: `VPCosine()` by default."""
    net = tiny_unet(classes, **options)
    denoiser = Denoiser(net, schedule or VPCosine(), prediction, null_label=null_label)
    return denoiser if trainable else denoiser.eval().requires_grad_(False)


def tiny_model(
    classes: Sequence[str] | None = CLASSES,
    name: str = "tiny",
    shape: tuple[int, int, int] = SHAPE,
    seed: int = 0,
    schedule: Schedule | None = None,
    prediction: Prediction | str = "v",
    network: dict[str, Any] | None = None,
    **options: Any,
) -> Model:
    """A model of `tiny_denoiser` on images of `shape`. network: options of `tiny_unet`. options: more of `Model`."""
    network = {"channels": shape[0], "seed": seed, **(network or {})}
    denoiser = tiny_denoiser(len(classes or ()), schedule, prediction, **network)
    return Model(denoiser, name, shape, None if classes is None else tuple(classes), **options)


def constant_model(value: float, classes: Sequence[str] = ("a", "b")) -> Model:
    """A model all of whose weights are `value`; also its name tells the value."""
    model = tiny_model(classes, f"m{value:g}")
    fill(model.denoiser.net, value)
    return model


def fill(module: nn.Module, value: float) -> nn.Module:
    """The module with all its weights set to `value`, in place."""
    for p in module.parameters():
        nn.init.constant_(p, value)
    return module


def break_weight(model: Model, name: str = "conv_in.weight", value: float = float("nan")) -> Model:
    """The model with one weight of its network set to `value`, in place."""
    model.denoiser.net.get_parameter(name).view(-1)[0] = value
    return model


def pipeline(kind: str, **options: Any) -> Any:
    """A tiny randomly initialised diffusers pipeline: `ddpm`, `sd`, `sdxl`, `sd3` or `dit`; needs diffusers."""
    from .adapters import tiny

    return getattr(tiny, f"{kind}_pipeline")(**options)


def weights(module: nn.Module) -> Tensor:
    """All the module's parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ---- data ----


def noise_images(n: int = 12, side: int = 8, channels: int = 1, seed: int = 0) -> Tensor:
    """Uniform noise, uint8 (n, channels, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator)


def noise_data(
    n: int = 12, side: int = 8, classes: Sequence[str] | None = None, images: Tensor | None = None, seed: int = 0
) -> Data:
    """Data of `noise_images`, or of `images`; the labels cycle through `classes`."""
    labels = torch.arange(n) % len(classes) if classes else None
    return Data.of(noise_images(n, side, seed=seed) if images is None else images, labels, classes)


def write_image(path: Path, value: int = 100, side: int = 4) -> Path:
    """Write one uniform grey image; folders above it are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), value).save(path)
    return path


def write_images(folder: Path, *names: str, value: int = 100) -> Path:
    """Write uniform grey images of these names below `folder`, which is returned."""
    for name in names:
        write_image(folder / name, value)
    return folder


def class_folders(path: Path, n: int = 6, value: int = 0, side: int = 8) -> Path:
    """A folder of `n` uniform images in the class folders a and b, in turn; image k has the value 20 k + `value`."""
    for k in range(n):
        write_image(path / "ab"[k % 2] / f"{k}.png", 20 * k + value, side)
    return path


def image_folder(path: Path, n: int, side: int = 12, mode: str = "L", seed: int = 0) -> Path:
    """A new folder of `n` images of uniform noise, without labels."""
    path.mkdir()
    noise = np.random.default_rng(seed)
    for k in range(n):
        shape = (side, side) if mode == "L" else (side, side, 3)
        Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8), mode).save(path / f"{k:03d}.png")
    return path


def image_archive(path: Path, n: int = 24, classes: int = 0, side: int = 8, channels: int = 1, seed: int = 0) -> Path:
    """An `.npz` of `n` images of uniform noise, with labels that cycle through `classes`."""
    shape = (n, side, side) if channels == 1 else (n, side, side, channels)
    arrays = {"images": np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)}
    np.savez(path, **arrays, **({"labels": np.arange(n) % classes} if classes else {}))  # type: ignore[arg-type]
    return path


# ---- commands ----


def run_cli(*words: Any) -> tuple[int, str, str]:
    """`hasten WORDS` in this process: the exit code, and what it prints on stdout and stderr."""
    with captured() as (out, err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


@contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """The stdout and stderr of what runs inside."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err
