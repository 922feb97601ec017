"""Image files of any kind, with all their bits, transparency, colour profile and place on earth."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import BadInput
from ...train.decode import BROKEN, Unreadable, orientation, upright

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Picture", "picture_of", "picture_size", "read_description", "read_picture"]

GEO_TAGS = (33550, 33922, 34264, 34735)  # of a GeoTIFF: pixel scale, tie points, transformation, keys
BANDS, DESCRIPTION, BITS, PLANES = 277, 270, 258, 284  # tags of a TIFF; PLANES of 2: each channel by itself
# Pillow reads 16-bit colours as their high bytes, by one of these modes. The mode of the other byte order gives the low
# ones.
LOW_BYTES = {
    f"{bands};16{a}": f"{bands};16{b}"
    for bands in ("RGB", "RGBA")
    for a, b in ("BL", "LB", ("N", "B" if sys.byteorder == "little" else "L"))
}


@dataclass
class Picture:
    """An image, upright.

    Args:
        pixels: uint8 or uint16 (h, w, c), c of 1 (grey), 3, or 4 where all four bands are wanted.
        alpha: opacity (h, w) of the same type, or None.
        white: the highest value: 255, 65535, or less where only some of 16 bits are used.
        profile: ICC profile of `pixels`, or None.
        place: transformation, coordinate system and tags of `rasterio` for a GeoTIFF, or None.
        kind: the format of its file, such as PNG.
        notes: what is not kept, for the user.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    white: int = 255
    profile: bytes | None = None
    place: dict[str, Any] | None = None
    kind: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of an image file, upright, from its header.

    Raises:
        Unreadable: for what is no image.
    """

    def size(image: Image) -> tuple[int, int]:
        turned = orientation(image) >= 5
        if turned and image.format == "TIFF":
            image.load()  # Pillow applies the orientation of TIFF itself, some versions on load
            turned = False
        width, height = image.size
        return (width, height) if turned else (height, width)

    return _with_image(path, size, lambda raster: raster.shape)


def read_description(path: Path, key: str) -> str | None:
    """A text of the metadata of a PNG (of this key) or TIFF file; None where there is none.

    Args:
        path: of the file.
        key: of the text.
    """

    def text(image: Image) -> Any:
        if image.format == "TIFF":
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            return tags.get(DESCRIPTION)
        return image.info.get(key)  # those before the pixels

    try:
        found = _with_image(path, text, lambda raster: raster.tags().get("TIFFTAG_IMAGEDESCRIPTION"))
    except BadInput:
        return None
    return found if isinstance(found, str) else None


def read_picture(path: Path, four: bool = False) -> Picture:
    """Read an image file.

    Args:
        path: of the file.
        four: all four bands of an RGBA image are pixels; otherwise the fourth is the opacity.

    Raises:
        Unreadable: for a damaged file, and for values that have no white.
    """

    def read(image: Image) -> Picture:
        tags: Any
        low = _low_bytes(path, image)
        if low is None and image.format == "TIFF" and _is_deep(image):
            tags = image.tag_v2  # type: ignore[attr-defined]
            if (raster := _open_raster(path)) is not None:
                with raster:
                    return _read_raster(raster, four)
            if tags.get(PLANES) == 2:  # which Pillow mixes up
                raise BadInput("16 bits a channel, each channel by itself: pip install 'hasten[geo]' reads it")
        picture = picture_of(image, four, low)
        if image.format == "TIFF":
            tags = image.tag_v2  # type: ignore[attr-defined]
            bands, found = int(tags.get(BANDS, 1)), picture.pixels.shape[2] + (picture.alpha is not None)
            if bands > found and image.mode != "CMYK":
                picture.notes.append(f"of {bands} bands the first {found} are enlarged")
            if any(tag in tags for tag in GEO_TAGS):
                picture.place, note = _place(path)
                picture.notes += [note] if note else []
        return picture

    try:
        return _with_image(path, read, lambda raster: _read_raster(raster, four))
    except Unreadable:
        raise
    except BadInput as error:
        raise Unreadable(f"cannot read {path}: {error}") from error


def picture_of(image: Image, four: bool = False, low: Image | None = None) -> Picture:
    """A Pillow image as a `Picture`.

    Args:
        image: of any mode.
        four: see `read_picture`.
        low: the same file with the low bytes of 16-bit colours, or None.

    Raises:
        BadInput: for values that have no white, such as floats.
    """
    picture = Picture(np.empty(0), kind=image.format or "")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        picture.notes.append(f"of {getattr(image, 'n_frames', 1)} frames or pages the first is enlarged")
    deep = _is_deep(image)
    profile = image.info.get("icc_profile")
    image = upright(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "F" or values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**16:
            raise BadInput(f"its values are {'floats' if image.mode == 'F' else 'integers beyond 16 bits'}: scale them")
        picture.pixels = values.astype(np.uint16)[..., None]
        _find_white(picture)
        picture.profile = _profile_for(profile, b"GRAY")
        return picture
    if low is not None:
        image, low = image.convert(image.mode), upright(low)
        bands = (np.asarray(image).astype(np.uint16) << 8) | np.asarray(low)
    else:
        image = _to_bands(image, profile, picture)
        bands = np.asarray(image)
        if deep:
            picture.notes.append("its 16 bits a channel are read as 8")
    bands = bands[..., None] if bands.ndim == 2 else bands
    if image.mode in ("LA", "RGBA") and not (four and image.mode == "RGBA"):
        picture.alpha, bands = np.ascontiguousarray(bands[..., -1]), bands[..., :-1]
    picture.pixels = np.ascontiguousarray(bands)
    _find_white(picture)
    picture.profile = _profile_for(profile, b"GRAY" if picture.pixels.shape[2] == 1 else b"RGB ")
    return picture


def _to_bands(image: Image, profile: bytes | None, picture: Picture) -> Image:
    """The image in mode L, LA, RGB or RGBA."""
    if image.mode in ("PA", "La", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("1", "L", "La") and isinstance(image.info.get("transparency", 0), int)
        return image.convert("RGBA").convert("LA") if grey else image.convert("RGBA")
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode in ("1", "P", "RGBX"):
        return image.convert("L" if image.mode == "1" else "RGB")
    picture.notes.append(f"{image.mode} is converted to RGB")
    if profile and image.mode in ("CMYK", "LAB"):
        from PIL import ImageCms

        with suppress(ImageCms.PyCMSError, OSError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
    try:
        return image.convert("RGB")
    except ValueError as e:
        raise BadInput(f"Pillow cannot convert {image.mode} to RGB") from e


def _find_white(picture: Picture) -> None:
    """Set `white` to the highest value of as few bits as the values need, 8 or 16 where they are not clearly fewer."""
    if picture.pixels.dtype != np.uint16:
        return
    highest = int(picture.pixels.max()) if picture.pixels.size else 0
    bits = max(highest.bit_length(), 1)
    picture.white = 2**16 - 1 if bits >= 15 else 2**bits - 1
    if bits < 15:
        picture.notes.append(f"its values end at {highest}: {picture.white} is taken for white, as of {bits} bits")


def _profile_for(profile: Any, space: bytes) -> bytes | None:
    """The ICC profile, if it is one of this colour space."""
    return profile if isinstance(profile, bytes) and profile[16:20] == space else None


def _is_deep(image: Image) -> bool:
    """Whether Pillow reads the high bytes alone of 16-bit channels."""
    raw = [str(_raw_mode(tile)) for tile in getattr(image, "tile", ())]
    bits = getattr(image, "tag_v2", {}).get(BITS, 8)
    deep = any(";16" in mode for mode in raw) or max(bits if isinstance(bits, tuple) else (bits,)) > 8
    return deep and image.mode in ("RGB", "RGBA", "LA", "CMYK")


def _low_bytes(path: Path, image: Image) -> Image | None:
    """The low bytes of an image whose colours have 16 bits, of which Pillow reads the high ones; None for others."""
    from PIL import Image as pillow

    low: Any = None
    if getattr(image, "tag_v2", {}).get(PLANES) == 2:
        return None
    raw = {_raw_mode(tile) for tile in getattr(image, "tile", ())}
    if len(raw) == 1 and (other := LOW_BYTES.get(raw.pop() or "")) is not None:
        low = pillow.open(path)
        low.tile = [_with_raw_mode(tile, other) for tile in low.tile]
        low.load()
    return low  # type: ignore[no-any-return]


def _raw_mode(tile: Any) -> str | None:
    """How the pixels lie in the file, as Pillow names it."""
    args = tile[3]
    return args if isinstance(args, str) else args[0] if args else None


def _with_raw_mode(tile: Any, raw: str) -> Any:
    """The tile of Pillow with another way to read its pixels."""
    args = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
    return (*tile[:3], args) if not hasattr(tile, "_replace") else tile._replace(args=args)


# ---- GeoTIFF ----


def _open_raster(path: Path) -> Any:
    """A file as `rasterio` opens it; None where it cannot, or is not installed."""
    try:
        import rasterio
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            return rasterio.open(path)
        except rasterio.errors.RasterioIOError:
            return None


def _place(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What `rasterio` knows of the place of a GeoTIFF, and a line for the user where it is lost."""
    raster = _open_raster(path)
    if raster is None:
        return None, "its georeferencing is lost: pip install 'hasten[geo]' keeps it"
    with raster:
        return _place_of(raster)


def _place_of(raster: Any) -> tuple[dict[str, Any] | None, str | None]:
    """As `_place`, of an open raster."""
    points, system = raster.gcps
    place = {
        "transform": tuple(raster.transform)[:6],
        "crs": raster.crs.to_wkt() if raster.crs else None,
        "points": [(p.row, p.col, p.x, p.y, p.z) for p in points],
        "points_crs": system.to_wkt() if system else None,
        "area_or_point": raster.tags().get("AREA_OR_POINT"),
    }
    lost = "its rational polynomial coefficients (RPC) are not kept" if raster.rpcs else None
    return (place if place["crs"] or place["points"] else None), lost


def _read_raster(raster: Any, four: bool) -> Picture:
    """An image that `rasterio` has opened, and Pillow does not read."""
    count, kind = raster.count, raster.dtypes[0]
    if kind not in ("uint8", "uint16"):
        raise BadInput(f"its values are {kind}: scale them to 8 or 16 bits")
    opaque = getattr(raster.colorinterp[-1], "name", "") != "alpha"
    kept = 4 if four and count >= 4 else 3 if count >= (3 if opaque else 4) else 1
    picture = Picture(np.ascontiguousarray(raster.read(list(range(1, kept + 1))).transpose(1, 2, 0)), kind="TIFF")
    if not opaque and count > kept:
        picture.alpha = raster.read(count)
        count -= 1
    if count > kept:
        picture.notes.append(f"of {count} bands the first {kept} are enlarged")
    picture.place, note = _place_of(raster)
    picture.notes += [note] if note else []
    _find_white(picture)
    return picture


def _with_image(path: Path, read: Callable[[Image], Any], read_raster: Callable[[Any], Any]) -> Any:
    """`read` of the image as Pillow opens it, however large; of a TIFF that it does not open, `read_raster` of it as
    `rasterio` does, where that is installed."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the user's own files may be large
    try:
        with Image.open(path) as image:
            return read(image)
    except Image.UnidentifiedImageError as error:
        if (raster := _open_raster(path)) is not None:
            with raster:
                return read_raster(raster)
        raise Unreadable(f"cannot read {path}: not an image, or truncated") from error
    except BadInput:
        raise
    except (*BROKEN, MemoryError) as error:
        raise Unreadable(f"cannot read {path}: {error or type(error).__name__}") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
