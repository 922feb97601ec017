"""Tiles: windows sum to one, the noise is one field, and the result is that of the whole image."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


RUN = """
import os, signal, sys
from hasten.progress import ProgressReporter
from hasten.workflows.upscale import upscale_files
from tests.tasks.super_resolution.tiny import local_model

class Killer(ProgressReporter):
    def advance(self, count):
        super().advance(count)
        if self.done >= float(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

upscale_files(local_model(side=64), [sys.argv[1]], sys.argv[2], reporter=Killer(0, show=False))
line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss is inherited
print(int(line.split()[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_picture_killed_and_resumed_in_bounded_memory_has_no_seam(tmp_path: Path) -> None:
    """2000 x 3000 pixels become 4000 x 6000, which are 72 MB as bytes and 288 MB as floats."""
    peaks = {}
    for height, width, ends in ((200, 300, ("inf",)), (2000, 3000, (1500, "inf"))):
        values = scene(height, width)
        Image.fromarray(values).save(file := tmp_path / f"{width}.png")
        out = tmp_path / f"{width}-large.png"
        for after in ends:
            done = subprocess.run(
                [sys.executable, "-c", RUN, str(file), str(out), str(after)],
                env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == (0 if after == "inf" else -signal.SIGKILL), done.stderr
        peaks[width] = float(done.stdout)
    assert peaks[3000] - peaks[300] < 100, peaks
    with Image.open(out) as image:
        assert image.size == (6000, 4000)
        found = np.asarray(image.crop((2000, 1600, 3200, 2400)), np.float32)
    part = torch.from_numpy(values[795:1205, 995:1605].copy()).permute(2, 0, 1) / 127.5 - 1
    noise = TileNoise(NoiseField(0, 3), [(1590, 1990, 820, 1220)])
    whole = local_model(side=64).sample(1, images=part[None], noise=noise)[0, :, 10:-10, 10:-10]
    assert np.abs((whole.permute(1, 2, 0).numpy() + 1) * 127.5 - found).max() < 0.51  # rounded
