"""Perceptual distances: identities, and both layouts of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hasten.errors import BadInput
from hasten.nets.lpips import PerceptualDistance, load_perceptual


def made(shift_tolerant: bool = False) -> PerceptualDistance:
    torch.manual_seed(0)
    distance = PerceptualDistance("alex", shift_tolerant)
    for head in distance.heads:
        head.copy_(torch.rand(len(head)))
    return distance


def trunk(distance: PerceptualDistance) -> dict[str, Tensor]:
    """Its trunk as torchvision saves it."""
    state = (*distance.layers.named_parameters(), *distance.layers.named_buffers())
    return {f"features.{name}": value for name, value in state}


def heads(distance: PerceptualDistance) -> dict[str, Tensor]:
    """Its heads as the package lpips saves them."""
    return {f"lin{k}.model.1.weight": head.reshape(1, -1, 1, 1) for k, head in enumerate(distance.heads)}


def images(side: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.rand(2, 3, side, side, generator=generator) * 2 - 1 for _ in range(2))
    return x, (x + 0.3 * noise).clamp(-1, 1)


@pytest.mark.parametrize("shift_tolerant", [False, True])
def test_a_distance_is_zero_for_equal_images_and_symmetric(shift_tolerant: bool) -> None:
    distance, (x, y) = made(shift_tolerant), images()
    assert float(distance(x, x)) == 0
    assert torch.isclose(distance(x, y), distance(y, x)) and float(distance(x, y)) > 0
    grey = x[:, :1]
    assert torch.isclose(distance(grey, y), distance(grey.repeat(1, 3, 1, 1), y))


def test_normalised_maps_ignore_the_scale_of_the_trunk() -> None:
    """Rectifiers are homogeneous: a factor of the first layer, without biases after it, leaves the distance."""
    distance, (x, y) = made(), images()
    for name, p in distance.layers.named_parameters():
        if name.endswith("bias") and not name.startswith("0."):
            p.zero_()
    before = distance(x, y)
    for p in distance.layers[0].parameters():
        p.mul_(3.0)
    assert torch.isclose(distance(x, y), before, rtol=1e-4)


def test_a_pixel_without_features_has_a_gradient() -> None:
    distance, (x, y) = made(), images()
    for p in distance.layers[0].parameters():
        p.zero_()  # all features 0
    y.requires_grad_(True)
    (distance(x, y) + y.sum()).backward()
    assert y.grad is not None and bool(y.grad.isfinite().all())


@pytest.mark.parametrize("shift_tolerant", [False, True])
def test_one_file_with_trunk_and_heads(tmp_path: Path, shift_tolerant: bool) -> None:
    distance, (x, y) = made(shift_tolerant), images()
    state = {f"net.slice1.{name.removeprefix('features.')}": value for name, value in trunk(distance).items()}
    torch.save({**state, **heads(distance), "scaling_layer.shift": torch.zeros(1)}, tmp_path / "own.pth")
    for path in (tmp_path, tmp_path / "own.pth"):
        assert torch.equal(load_perceptual(path)(x, y), distance(x, y))


def test_a_folder_with_a_trunk_of_torchvision_and_heads(tmp_path: Path) -> None:
    distance, (x, y) = made(), images()
    classifier = {"classifier.1.weight": torch.zeros(2, 2)}
    torch.save({**trunk(distance), **classifier}, tmp_path / "alexnet-owt.pth")
    torch.save(heads(distance), tmp_path / "alex.pth")
    torch.save(
        {f"lin{k}.model.1.weight": torch.ones(1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))},
        tmp_path / "vgg.pth",
    )  # fmt: skip  heads of another trunk, which the package has too
    assert torch.equal(load_perceptual(tmp_path)(x, y), distance(x, y))


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no weights"):
        load_perceptual(tmp_path)
    torch.save(heads(made()), tmp_path / "heads.pth")
    with pytest.raises(BadInput, match="no trunk"):
        load_perceptual(tmp_path)
    torch.save({**trunk(made()), **heads(made())}, tmp_path / "a.pth")
    torch.save({**trunk(made()), **heads(made())}, tmp_path / "b.pth")
    with pytest.raises(BadInput, match="several perceptual distances, a.pth and b.pth: give one of the files"):
        load_perceptual(tmp_path)
    (tmp_path / "c.pth").write_bytes(b"x")
    with pytest.raises(BadInput, match="cannot read the weights"):
        load_perceptual(tmp_path / "c.pth")
    with pytest.raises(BadInput, match="at least 32 pixels"):
        made().check_side(16)
