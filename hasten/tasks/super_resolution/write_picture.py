"""Write an enlarged picture row by row, with its colour profile and its place on earth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import atomic_open
from .enlarge_picture import Enlarged
from .png_rows import PngRows
from .tiff_rows import TiffRows

__all__ = ["WRITTEN", "write_picture"]

WRITTEN = (".png", ".tif", ".tiff")  # formats that are written
ROWS = 64  # at once


def write_picture(path: Path, enlarged: Enlarged, text: Mapping[str, str], description: str) -> list[str]:
    """Write a PNG or TIFF file completely or not at all.

    Args:
        path: of the file, whose suffix is one of `WRITTEN`.
        enlarged: of which some rows at a time are in memory.
        text: metadata of a PNG file.
        description: of a TIFF file.

    Returns:
        lines on what is not kept.
    """
    picture, shape, notes = enlarged.picture, enlarged.shape, []
    bits, place = 8 * picture.pixels.dtype.itemsize, picture.place
    with atomic_open(path) as file:
        if path.suffix.lower() == ".png":
            writer: Any = PngRows(file, shape, bits, picture.profile, text)
            if place:
                notes.append("a PNG has no georeferencing: write a .tif to keep it")
        else:
            writer = TiffRows(file, shape, bits, picture.profile, description)
        for begin in range(0, shape[0], ROWS):
            writer.write(enlarged.values(begin, min(begin + ROWS, shape[0])))
        writer.close()
        file.flush()
        if place and path.suffix.lower() != ".png":
            write_place(file.name, place, enlarged.factor)
    return notes


def write_place(path: str, place: Mapping[str, Any], factor: int) -> None:
    """Add the georeferencing of the small picture to a TIFF file, its pixels `factor` times smaller.

    Args:
        path: of the file.
        place: of the small picture, see `Picture`.
        factor: of the enlargement.
    """
    import warnings

    import rasterio
    from rasterio.control import GroundControlPoint
    from rasterio.transform import Affine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        raster = rasterio.open(path, "r+", driver="GTiff")
    with raster:
        if place["points"]:
            points = [GroundControlPoint(row * factor, col * factor, x, y, z) for row, col, x, y, z in place["points"]]
            raster.gcps = (points, rasterio.CRS.from_wkt(place["points_crs"] or ""))
        elif place["crs"]:
            raster.crs = rasterio.CRS.from_wkt(place["crs"])
            a, b, left, d, e, top = place["transform"]
            raster.transform = Affine(a / factor, b / factor, left, d / factor, e / factor, top)
        if place["area_or_point"]:
            raster.update_tags(AREA_OR_POINT=place["area_or_point"])
