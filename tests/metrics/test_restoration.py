"""Figures of restored images against scikit-image, torchmetrics and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hasten.degradations.low_resolution import LowResolution
from hasten.errors import BadInput
from hasten.metrics.restoration import (
    as_levels,
    consistency_error,
    restoration_psnr,
    restoration_ssim,
    without_border,
)


def pair(n: int = 2, side: tuple[int, int] = (24, 28)) -> tuple[Tensor, Tensor]:
    """Smooth images and noisy ones, floats beyond [-1, 1] in places."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    truth = torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(-1, 1)
    return truth + 0.2 * torch.randn(truth.shape, generator=generator), truth


def pixels(x: Tensor) -> np.ndarray:
    """What a saved file has: uint8 (n, H, W, 3)."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("border", [0, 3])
def test_psnr_and_ssim_are_those_of_scikit_image_on_8_bits(border: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, truth = pair()
    psnr, ssim = restoration_psnr(x, truth, border), restoration_ssim(x, truth, border)
    for k, (a, b) in enumerate(zip(pixels(x), pixels(truth), strict=True)):
        a, b = (one[border : one.shape[0] - border, border : one.shape[1] - border] for one in (a, b))
        expected = metrics.structural_similarity(
            b, a, gaussian_weights=True, use_sample_covariance=False, channel_axis=2, data_range=255
        )
        assert float(ssim[k]) == pytest.approx(expected, abs=1e-9)
        assert float(psnr[k]) == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=255), abs=1e-9)


def test_psnr_and_ssim_are_those_of_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.image")
    x, truth = pair()
    a, b = ((as_levels(one) + 1) / 2 for one in (x, truth))
    psnr = metrics.peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(restoration_psnr(x, truth), psnr, atol=1e-6)
    # its windows reach over the edge, by reflection: equal on images whose inner part alone is compared
    inner = metrics.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)[
        1
    ][..., 5:-5, 5:-5]
    assert torch.allclose(restoration_ssim(x, truth), inner.flatten(1).mean(1), atol=1e-6)


def test_figures_are_of_8_bits_without_the_border() -> None:
    truth = torch.zeros(1, 3, 16, 16, dtype=torch.uint8) + 100
    x = truth.clone()
    x[:, :, 0] = 255  # a border of one row
    x[:, :, 8, 8] += 10
    expected = 20 * math.log10(255) - 10 * math.log10(100 / 14**2)
    assert float(restoration_psnr(x, truth, 1)) == pytest.approx(expected)
    less_than_half = truth.float() / 127.5 - 1 + 0.49 / 127.5
    assert (
        float(restoration_psnr(less_than_half, truth)) == 100 and float(restoration_ssim(x[:, :, 2:], x[:, :, 2:])) == 1
    )
    with pytest.raises(BadInput, match="border 8 leaves nothing of images of 16x16: at most 7"):
        without_border(x, 8)
    with pytest.raises(BadInput, match="hold NaN"):
        as_levels(torch.full((1, 3, 4, 4), float("nan")))


@pytest.mark.parametrize("factor", [2, 4])
def test_true_images_are_consistent_and_an_offset_is_the_error(factor: int) -> None:
    truth = (pair(side=(16, 24))[1].add(1).mul(127.5)).round().to(torch.uint8)
    small = LowResolution(factor)(truth, [0, 1])
    assert consistency_error(truth, small, factor).tolist() == [0, 0]
    flat = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    source = torch.full((1, 3, 8 // factor, 8 // factor), 97, dtype=torch.uint8)
    assert consistency_error(flat, source, factor).tolist() == [7]
    with pytest.raises(BadInput, match=f"do not differ by the factor {factor}"):
        consistency_error(flat, flat, factor)


def test_consistency_reduces_as_pillow_does() -> None:
    x, truth = pair(1, (16, 16))
    small = np.asarray(Image.fromarray(pixels(x)[0]).resize((4, 4), Image.Resampling.BICUBIC)).astype(float)
    source = np.asarray(Image.fromarray(pixels(truth)[0]).resize((4, 4), Image.Resampling.BICUBIC)).astype(float)
    expected = math.sqrt(np.square(small - source).mean())
    found = consistency_error(x, LowResolution(4)((truth.add(1) * 127.5).round().to(torch.uint8), [0]), 4)
    assert float(found) == pytest.approx(expected, abs=0.5)  # Pillow rounds rows and columns one after the other


@pytest.mark.slow
def test_lpips_grows_with_noise_in_the_weights_of_the_package() -> None:
    from hasten.nets.lpips import find_perceptual

    distance = find_perceptual("alex_shift_tolerant")
    if distance is None:
        pytest.skip("stlpips_pytorch is not installed")
    truth = pair(1, (64, 64))[1]
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    little, much = (float(distance(truth + s * noise, truth)) for s in (0.05, 0.3))
    assert 0 < little < much


def test_the_packaged_lpips_is_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.nets.lpips import PerceptualDistance, find_perceptual

    package = tmp_path / "stlpips_pytorch"
    folder = package / "weights" / "vST0.0"
    folder.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    made = PerceptualDistance("alex", True)
    state = {f"net.slice1.{key}": value for key, value in made.layers.state_dict().items()}
    state |= {f"lin{k}.model.1.weight": head.reshape(1, -1, 1, 1) for k, head in enumerate(made.heads)}
    torch.save(state, folder / "alex_shift_tolerant.pth")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_perceptual("alex_shift_tolerant")
    assert found is not None and found.name == "alex, shift-tolerant" and find_perceptual("vgg_shift_tolerant") is None
    x, y = pair(1, (32, 32))
    assert torch.equal(found(x, y), made(x, y))
