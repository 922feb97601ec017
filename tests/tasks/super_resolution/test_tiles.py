"""Tiles: windows sum to one, the noise is one field, and the result is that of the whole image."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch

from hasten.errors import BadInput
from hasten.tasks import SuperResolution
from hasten.tasks.super_resolution.grid import Axis
from hasten.tasks.super_resolution.noise_field import BLOCK, NoiseField, TileNoise

from .tiny import local_model, scene

SIZES = [(1, 8, 2, 4), (8, 8, 2, 2), (9, 8, 2, 3), (50, 12, 4, 2), (100, 16, 5, 3), (31, 16, 0, 2), (47, 16, 4, 4)]


@pytest.mark.parametrize(("size", "tile", "overlap", "factor"), SIZES)
def test_windows_sum_to_one_and_bands_follow_one_another(size: int, tile: int, overlap: int, factor: int) -> None:
    axis = Axis(size, tile, overlap, factor)
    total = torch.zeros(factor * max(size, tile))
    reach = np.zeros(factor * max(size, tile), int)
    for k, start in enumerate(axis.starts):
        window = axis.window(k)
        total[factor * start : factor * (start + tile)] += window
        used = np.flatnonzero(window.numpy() > 1e-6) + factor * start
        reach[used] += 1
        begin, end = axis.band(k)
        assert end <= factor * (start + tile)
        if k >= 2:  # no tile before the last two has a weight in the band
            assert not axis.window(k - 2)[max(begin - factor * axis.starts[k - 2], 0) :].any()
    torch.testing.assert_close(total, torch.ones_like(total))
    assert reach.max() <= 2
    bands = [axis.band(k) for k in range(len(axis.starts))]
    assert bands[0][0] == 0 and bands[-1][1] == factor * size
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bands))
    if size > tile:
        assert axis.starts[-1] + tile == size
        assert all(b - a <= tile - overlap for a, b in itertools.pairwise(axis.starts))


def test_the_edge_of_a_tile_counts_for_nothing_inside_the_image() -> None:
    axis = Axis(100, 16, 4, 2)
    for k in range(len(axis.starts)):
        window = axis.window(k)
        assert k == 0 or not window[:2].any()
        assert k == len(axis.starts) - 1 or not window[-2:].any()


def test_the_noise_of_a_pixel_depends_on_seed_and_place_alone() -> None:
    field = NoiseField(7, 2)
    whole = field.window(0, 0, 3 * BLOCK, 2 * BLOCK + 5)
    for top, left, height, width in (
        (0, 0, 1, 1),
        (BLOCK - 3, 5, 7, BLOCK),
        (BLOCK, BLOCK, BLOCK, 9),
        (13, 60, 130, 70),
    ):
        assert torch.equal(field.window(top, left, height, width), whole[:, top : top + height, left : left + width])
    assert torch.equal(field.window(0, 0, 3 * BLOCK, 2 * BLOCK + 5), whole)  # and not on what was asked before
    other = torch.stack([NoiseField(8, 2).window(0, 0, BLOCK, BLOCK), field.window(0, 0, BLOCK, BLOCK, draw=1)])
    parts = [whole[:, :BLOCK, :BLOCK], whole[:, BLOCK : 2 * BLOCK, :BLOCK], *other]
    for one, two in itertools.combinations(parts, 2):
        assert abs(float((one * two).mean())) < 0.05
    assert abs(float(whole.mean())) < 0.02 and float(whole.std()) == pytest.approx(1, abs=0.02)


def test_tiles_see_windows_of_one_field_at_every_step() -> None:
    field = NoiseField(3, 1)
    noise = TileNoise(field, [(0, 0, 8, 8), (0, 6, 8, 8)])
    for draw in (noise.initial(), noise(), noise()):
        assert torch.equal(draw[0, :, :, 6:], draw[1, :, :, :2])
    assert torch.equal(noise.rows(slice(1, 2)).initial(), noise.initial()[1:])
    assert not torch.equal(noise(), noise.initial())


@pytest.mark.parametrize("options", [{"sampler": "ddim"}, {"sampler": "ddpm", "steps": 3}])
def test_tiles_give_what_the_whole_image_gives(options: dict) -> None:
    """The network sees 3 pixels around (of 48): less than what the windows cut off, so that there is no seam at all."""
    model = local_model()
    x = torch.from_numpy(scene(70, 100)).permute(2, 0, 1) / 127.5 - 1
    tiled = SuperResolution(model).upscale(x, seed=5, **options)
    noise = TileNoise(NoiseField(5, 3), [(0, 0, 140, 200)])
    whole = model.sample(1, images=x[None], noise=noise, **options)[0]
    error = (tiled - whole).abs().amax(0)
    axes = Axis(70, 24, 6, 2), Axis(100, 24, 6, 2)
    border = torch.zeros_like(error, dtype=torch.bool)
    for k in range(len(axes[0].starts) - 1):
        border[slice(*axes[0].ramp(k))] = True
    for k in range(len(axes[1].starts) - 1):
        border[:, slice(*axes[1].ramp(k))] = True
    assert 0.2 < float(border.float().mean()) < 0.6
    assert float(error[border].max()) < 1e-4 and float(error[~border].max()) < 1e-4
    # without the common noise it is another image
    assert float((whole - SuperResolution(model).upscale(x, seed=6, **options)).abs().mean()) > 0.01


def test_the_result_does_not_depend_on_tiles_or_batches() -> None:
    sr = SuperResolution(local_model())
    image = scene(50, 61)
    first = sr.upscale(image).astype(int)
    for options in ({"tile": 30, "overlap": 8}, {"batch_size": 1}, {"tile": 64}):
        other = sr.upscale(image, **options).astype(int)
        assert np.abs(other[:-4, :-4] - first[:-4, :-4]).max() <= 1, options  # rounding; mirrored pixels at the end


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (24, 1)])
def test_images_smaller_than_a_tile(size: tuple[int, int]) -> None:
    image = scene(*size)
    assert SuperResolution(local_model()).upscale(image).shape == (2 * size[0], 2 * size[1], 3)


def test_channels_of_model_and_image() -> None:
    grey, colour = scene(30, 30, 1), scene(30, 30)
    of_grey = SuperResolution(local_model(1))
    each = of_grey.upscale(colour)
    assert np.array_equal(each[..., 1], of_grey.upscale(colour[..., 1]))
    assert SuperResolution(local_model()).upscale(grey[..., 0]).shape == (60, 60)
    four = SuperResolution(local_model(4))
    assert four.upscale(scene(30, 30, 4)).shape == (60, 60, 4)
    with pytest.raises(BadInput, match="of 4 channels, this one has 3"):
        four.upscale(colour)


def test_types_of_images() -> None:
    from PIL import Image

    sr, image = SuperResolution(local_model()), scene(20, 30)
    array = sr.upscale(image)
    one, two = sr.upscale([Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1)])
    assert np.array_equal(np.asarray(one), array)
    assert two.dtype == torch.uint8 and np.array_equal(two.permute(1, 2, 0).numpy(), array)
    floats = sr.upscale(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1)
    assert floats.shape == (1, 3, 40, 60)
    assert np.abs((floats[0].permute(1, 2, 0).numpy() + 1) * 127.5 - array).max() <= 0.51
    with pytest.raises(BadInput, match="cannot read nothing.png"):
        sr.upscale("nothing.png")
    with pytest.raises(BadInput, match="got int"):
        sr.upscale(3)


def test_what_it_cannot_be() -> None:
    from ...factories import tiny_model

    with pytest.raises(BadInput, match="no model of super-resolution"):
        SuperResolution(tiny_model())
    sr = SuperResolution(local_model())
    with pytest.raises(BadInput, match="at most a third of the tile of 24, 8, got 9"):
        sr.upscale(scene(8, 8), overlap=9)
    model = local_model()
    model.denoiser.net.multiple = 8
    with pytest.raises(BadInput, match="multiple of 4 for local, got 30: use 28 or 32"):
        SuperResolution(model).upscale(scene(8, 8), tile=30)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
def test_memory_does_not_grow_with_the_image(tmp_path) -> None:  # 2000 x 3000 pixels in, 4000 x 6000 out
    import os
    import subprocess

    from PIL import Image

    code = (
        "import resource, sys\nfrom tests.tasks.super_resolution.tiny import local_model\n"
        "from hasten.workflows.upscale import upscale_files\n"
        "upscale_files(local_model(side=64), [sys.argv[1]], sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    peaks = {}
    for height, width in ((200, 300), (2000, 3000)):
        Image.fromarray(scene(height, width)).save(file := tmp_path / f"{width}.png")
        done = subprocess.run(
            [sys.executable, "-c", code, str(file), str(tmp_path / f"{width}-large.png")],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        peaks[width] = float(done.stdout)
        with Image.open(tmp_path / f"{width}-large.png") as image:
            assert image.size == (2 * width, 2 * height)
            image.load()
    # the small image takes 18 MB and the large one 72 MB as bytes, 288 MB as floats
    assert peaks[3000] - peaks[300] < 150, peaks
