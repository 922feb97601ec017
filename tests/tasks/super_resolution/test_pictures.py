"""Image files of every kind, in and out."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from hasten.errors import BadInput
from hasten.tasks import SuperResolution
from hasten.tasks.super_resolution.pictures import picture_size, read_description, read_picture
from hasten.tasks.super_resolution.png_rows import PngRows
from hasten.tasks.super_resolution.tiff_rows import TiffRows
from hasten.workflows.upscale import upscale_files

from .tiny import local_model, scene

WRITERS = {".png": PngRows, ".tif": TiffRows}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def write(path: Path, values: np.ndarray, profile: bytes | None = None, **options: Any) -> Path:
    """Write pixels (h, w, C) with our own writers, seven rows at a time."""
    with open(path, "wb") as file:
        writer = WRITERS[path.suffix](file, values.shape, 8 * values.dtype.itemsize, profile, **options)
        for begin in range(0, len(values), 7):
            writer.write(values[begin : begin + 7])
        writer.close()
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("white", [255, 65535])
def test_what_is_written_is_read_again(tmp_path: Path, suffix: str, channels: int, white: int) -> None:
    values = scene(75, 31, channels, white=white)
    values[:10] = np.random.default_rng(0).integers(0, white + 1, (10, 31, channels))
    text: Any = {"text": {"key": "täxt"}} if suffix == ".png" else {"text": "text"}
    path = write(tmp_path / f"a{suffix}", values, SRGB if channels >= 3 else None, **text)
    if channels == 2 and white > 255:  # which Pillow cannot read
        return
    with Image.open(path) as image:  # of 16-bit colours Pillow keeps the high bytes
        high = values if white == 255 or channels == 1 else (values >> 8).astype(np.uint8)
        assert np.array_equal(np.asarray(image).reshape(high.shape), high)
    picture = read_picture(path)
    found = picture.pixels if picture.alpha is None else np.concatenate([picture.pixels, picture.alpha[..., None]], 2)
    assert np.array_equal(found, values) and picture.white == white and not picture.notes
    assert (picture.alpha is None) == (channels in (1, 3)) and picture.profile == (SRGB if channels >= 3 else None)
    assert picture_size(path) == (75, 31)
    assert read_description(path, "key") == ("täxt" if suffix == ".png" else "text")


def test_a_large_tiff_has_offsets_of_64_bits(tmp_path: Path) -> None:
    values = scene(70, 20)
    path = write(tmp_path / "a.tif", values, large=True)
    assert struct.unpack("<2sH", path.read_bytes()[:4]) == (b"II", 43)
    assert np.array_equal(read_picture(path).pixels, values)


def test_other_readers_agree(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    for suffix in (".png", ".tif"):
        values = scene(20, 30, white=65535)
        with rasterio.open(write(tmp_path / f"a{suffix}", values)) as raster:
            assert np.array_equal(raster.read().transpose(1, 2, 0), values)
    for order in ({}, {"compress": "lzw"}, {"compress": "deflate", "predictor": 2}, {"endianness": "BIG"}):
        options = {"driver": "GTiff", "height": 20, "width": 30, "count": 3, "dtype": "uint16", **order}
        for interleave in ("pixel", "band"):
            path = tmp_path / "b.tif"
            with rasterio.open(path, "w", photometric="RGB", interleave=interleave, **options) as raster:
                raster.write(values.transpose(2, 0, 1))
            picture = read_picture(path)
            assert np.array_equal(picture.pixels, values) and not picture.notes, (order, interleave)


KINDS: dict[str, tuple[Any, str, int | None]] = {  # how it is made, what it becomes, notes
    "grey.png": (lambda x: Image.fromarray(x).convert("L"), "L", 0),
    "bits.png": (lambda x: Image.fromarray(x).convert("1"), "L", 0),
    "grey-alpha.png": (lambda x: Image.fromarray(x).convert("LA"), "LA", 0),
    "colour.webp": (Image.fromarray, "RGB", 0),
    "colour.bmp": (Image.fromarray, "RGB", 0),
    "alpha.png": (lambda x: Image.fromarray(x).convert("RGBA"), "RGBA", 0),
    "palette.png": (lambda x: Image.fromarray(x).convert("P"), "RGB", 0),
    "palette.gif": (lambda x: Image.fromarray(x).convert("P"), "RGB", 0),
    "cmyk.jpg": (lambda x: Image.fromarray(x).convert("CMYK"), "RGB", 1),
    "lab.tif": (lambda x: Image.fromarray(x).convert("HSV").convert("RGB"), "RGB", 0),
    "deep.png": (lambda x: Image.fromarray(x[..., 0].astype(np.uint16) * 257), "I;16", 0),
    "twelve.png": (lambda x: Image.fromarray(x[..., 0].astype(np.uint16) * 16), "I;16", 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file(tmp_path: Path, name: str) -> None:
    make, mode, notes = KINDS[name]
    make(scene(12, 20)).save(tmp_path / name)
    lines: list[str] = []
    result = upscale_files(local_model(), [tmp_path / name], tmp_path / "out", steps=1, warn=lines.append)
    assert len(lines) == notes and not result["failed"], lines
    file = Path(result["images"][0]["file"])
    assert file == tmp_path / "out" / Path(name).with_suffix(".tif" if name.endswith("tif") else ".png")
    with Image.open(file) as image:
        assert image.size == (40, 24) and image.mode == mode
        if name == "twelve.png":
            assert 2048 < np.asarray(image).max() <= 4095 and "white" in lines[0]


def test_palettes_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(scene(12, 20)).convert("P")
    image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    picture = read_picture(tmp_path / "a.png")
    assert picture.alpha is not None and picture.alpha[0, 0] == 0 and picture.alpha.max() == 255


def test_the_opacity_is_enlarged_and_whole(tmp_path: Path) -> None:
    """In rows it is what Pillow makes of the whole."""
    values = scene(150, 20, 4)
    values[30:60, :, 3] = 0
    values[90:, :, 3] = 255
    large = SuperResolution(local_model()).upscale(values)
    Image.fromarray(values).save(tmp_path / "a.png")
    upscale_files(local_model(), [tmp_path / "a.png"], tmp_path / "b.png")
    whole = Image.fromarray(values[..., 3]).resize((40, 300), Image.Resampling.LANCZOS)
    for found in (large[..., 3], np.asarray(Image.open(tmp_path / "b.png"))[..., 3]):
        assert np.abs(found.astype(int) - np.asarray(whole)).max() <= 1


@pytest.mark.parametrize("turn", [3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_photographs_are_turned_upright(tmp_path: Path, turn: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(scene(12, 20)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert picture_size(tmp_path / f"a.{suffix}") == ((12, 20) if turn == 3 else (20, 12))
    result = upscale_files(local_model(), [tmp_path / f"a.{suffix}"], tmp_path / "out", steps=1)
    with Image.open(result["images"][0]["file"]) as image:
        assert image.size == ((40, 24) if turn == 3 else (24, 40))
        assert image.getexif().get(0x0112, 1) == 1


def test_colour_profiles(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.tif"):
        Image.fromarray(scene(12, 20)).save(tmp_path / name, icc_profile=SRGB)
        file = upscale_files(local_model(), [tmp_path / name], tmp_path / "out" / name, steps=1)["images"][0]["file"]
        with Image.open(file) as image:
            assert image.info["icc_profile"] == SRGB
    Image.fromarray(scene(12, 20)).convert("L").save(tmp_path / "b.png", icc_profile=SRGB)  # not one of grey
    assert read_picture(tmp_path / "b.png").profile is None


@pytest.mark.parametrize("points", [False, True])
def test_a_geotiff_keeps_its_place(tmp_path: Path, points: bool) -> None:
    rasterio = pytest.importorskip("rasterio")
    from rasterio.control import GroundControlPoint
    from rasterio.transform import Affine

    transform = Affine(0.6, 0.1, 500000, 0.05, -0.6, 4000000)
    options: dict[str, Any] = {"driver": "GTiff", "height": 12, "width": 20, "count": 3, "dtype": "uint16"}
    with rasterio.open(tmp_path / "a.tif", "w", **options) as raster:
        raster.write(scene(12, 20, white=65535).transpose(2, 0, 1))
        if points:
            raster.gcps = (
                [GroundControlPoint(r, c, 10.0 + c, 50.0 - r) for r, c in ((0, 0), (0, 20), (12, 0))],
                "EPSG:4326",
            )
        else:
            raster.crs, raster.transform = "EPSG:32611", transform
            raster.update_tags(AREA_OR_POINT="Point")
    lines: list[str] = []
    upscale_files(local_model(), [tmp_path / "a.tif"], tmp_path / "b.tif", warn=lines.append)
    assert lines == [] and sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.tif"]
    with rasterio.open(tmp_path / "a.tif") as small, rasterio.open(tmp_path / "b.tif") as large:
        assert large.dtypes == ("uint16",) * 3 and large.shape == (24, 40)
        if points:
            assert [(p.row, p.col, p.x, p.y) for p in large.gcps[0]] == [
                (2 * p.row, 2 * p.col, p.x, p.y) for p in small.gcps[0]
            ]
        else:
            assert large.crs == small.crs and large.tags()["AREA_OR_POINT"] == "Point"
            for corner in ((0, 0), (20, 12)):
                assert np.allclose(large.transform @ (2 * corner[0], 2 * corner[1]), small.transform @ corner)
    upscale_files(local_model(), [tmp_path / "b.tif"], tmp_path / "c.png", warn=lines.append)
    assert len(lines) == 1 and "write a .tif" in lines[0]


def test_a_geotiff_without_rasterio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rasterio = pytest.importorskip("rasterio")
    options: dict[str, Any] = {"driver": "GTiff", "height": 12, "width": 20, "count": 5, "dtype": "uint8"}
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        photometric="RGB",
        crs="EPSG:32611",
        transform=rasterio.Affine(1, 0, 5, 0, -1, 5),
        **options,
    ) as raster:
        raster.write(scene(12, 20, 5).transpose(2, 0, 1))
    assert [note[:9] for note in read_picture(tmp_path / "a.tif").notes] == ["of 5 band"]
    monkeypatch.setitem(sys.modules, "rasterio", None)
    notes = read_picture(tmp_path / "a.tif").notes
    assert notes[0].startswith("of 5 bands the first 3") and "pip install 'hasten[geo]'" in notes[1]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(-1, 9, 80, dtype=np.float32).reshape(8, 10)).save(tmp_path / "floats.tif")
    Image.fromarray(scene(40, 40)).save(buffer := io.BytesIO(), "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:300])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").touch()
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(BadInput, match=f"cannot read .*{path.name}") as caught:
            read_picture(path)
        assert "\n" not in str(caught.value)
