"""Image files: the formats that Pillow supports here, headers, and decoding to 8 bits."""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from .sources import center_crop
from .tree import SUFFIXES, Tree

if TYPE_CHECKING:
    from PIL.Image import Image

# The exceptions of Pillow and zipfile for files that are damaged or not supported.
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile, IndexError, KeyError,
    TypeError, OverflowError, RuntimeError, NotImplementedError,
)  # fmt: skip
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


class Unreadable(BadInput):
    """An image file that cannot be read, or whose values have no unambiguous conversion to 8 bits."""


@functools.cache
def readable_suffixes() -> tuple[str, ...]:
    """The entries of `SUFFIXES` whose format Pillow can decode here (with the package pillow_heif, HEIC too)."""
    from PIL import Image, features

    Image.init()
    with suppress(ImportError, AttributeError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    needs = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000", "JPEG": "jpg"}
    formats, supported = Image.registered_extensions(), set()
    for suffix in SUFFIXES:
        kind = formats.get(suffix, "")
        with suppress(ValueError):  # a feature that this Pillow does not know
            if kind in Image.OPEN and (kind not in needs or features.check(needs[kind])):
                supported.add(suffix)
    return tuple(suffix for suffix in SUFFIXES if suffix in supported)


@dataclass(frozen=True)
class Header:
    """Size and kind of an image as it is decoded, upright.

    Args:
        height: in pixels.
        width: in pixels.
        grey: whether it has a single channel.
        pages: whether it holds several pages or frames.
    """

    height: int
    width: int
    grey: bool
    pages: bool


@contextmanager
def open_image(tree: Tree, name: str, header_only: bool = False) -> Iterator[Image]:
    """Open an image file; exceptions of decoding inside become Unreadable, which names the file.

    Args:
        tree: where the file is.
        name: of the file.
        header_only: do not read the whole file first, which would verify the checksum of a zip.
    """
    from PIL import Image

    try:
        with tree.open(name) if header_only else io.BytesIO(tree.read(name)) as stream, Image.open(stream) as image:
            yield image
    except BadInput:
        raise
    except (*BROKEN, Image.DecompressionBombError) as e:
        reason = "not an image, or truncated" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        raise Unreadable(f"cannot read {tree.where(name)}: {reason or type(e).__name__}") from e


def read_header(tree: Tree, name: str) -> Header:
    """The header of an image file; its pixels are not decoded."""
    with open_image(tree, name, header_only=True) as image:
        turned = orientation(image) >= 5
        grey = image.mode in GREY
        if turned and image.format == "TIFF":
            image.load()  # Pillow applies the orientation of TIFF itself, some versions on load
            turned = False
        width, height = image.size[::-1] if turned else image.size
        pages = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        return Header(height, width, grey, pages)


def orientation(image: Image) -> int:
    """The EXIF orientation, 1 to 8, from the header."""
    from PIL import Image as pillow

    try:  # the override of PNG files would decode the pixels first
        value = pillow.Image.getexif(image).get(0x0112, 1)
    except BROKEN:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def decode(tree: Tree, name: str, shape: tuple[int, int, int], resize: bool) -> Tensor:
    """Decode one image: upright, transparency on white, other bit depths converted to 8 bits (`to_eight_bits`).

    Args:
        tree: where the file is.
        name: of the file.
        shape: (C, H, W) of the result, C of 1 or 3.
        resize: center-crop and resize to the shape; otherwise an image of another size is an error.

    Returns:
        uint8 (C, H, W).

    Raises:
        Unreadable: if the file is damaged, of another size, or of an ambiguous value range.
    """
    from PIL import Image

    channels, height, width = shape
    with open_image(tree, name) as image:
        deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        picture = to_eight_bits(tree, name, upright(image))
        if deep and picture.mode in ("RGB", "RGBA", "LA"):
            colours = [band for band in picture.getbands() if band != "A"]
            high = max(int(np.asarray(picture.getchannel(band)).max()) for band in colours)
            if 0 < high < 16:
                raise Unreadable(f"{tree.where(name)} uses few of its 16 bits: scale its values to 0..65535")
        if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if channels == 1 else "RGB")
    picture = center_crop(picture, height, width) if resize else picture
    if picture.size != (width, height):
        raise Unreadable(
            f"{tree.where(name)} is {picture.width}x{picture.height}, others are {width}x{height}: "
            "set size to resize all images"
        )
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def upright(image: Image) -> Image:
    """The image with its EXIF orientation applied."""
    from PIL import ImageOps

    image.load()
    turn = image.format != "TIFF" and orientation(image) > 1  # Pillow has applied that of a TIFF
    return (ImageOps.exif_transpose(image) or image) if turn else image


def read_alpha(tree: Tree, name: str) -> Tensor | None:
    """The opacity of an image, uint8 (H, W), upright; None without transparency."""
    with open_image(tree, name) as image:
        picture = upright(image)
        if picture.mode not in ("LA", "PA", "RGBA", "La", "RGBa") and "transparency" not in picture.info:
            return None
        return torch.from_numpy(np.array(picture.convert("RGBA").getchannel("A")))


def to_eight_bits(tree: Tree, name: str, image: Image) -> Image:
    """Convert an image of one channel of more than 8 bits to 8 bits.

    - 16 bits: the upper 8. An error if all values are below 4096 and not 0, as for 10 or 12 bits stored in 16.
    - 32-bit integers: values in 0..255 only.
    - floats: [0, 1] times 255, or 0..255, the same range in all images of a set.

    Raises:
        Unreadable: for values out of range.
        BadInput: for floats of another range than in the images before.
    """
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    pixels, where = np.asarray(image), tree.where(name)
    low, high = float(pixels.min()), float(pixels.max())
    if image.mode == "F":
        if not np.isfinite(pixels).all() or low < 0 or high > 255:
            raise Unreadable(f"{where} holds floats from {low:.4g} to {high:.4g}: they must lie in [0, 1] or 0..255")
        value_range = "[0, 1]" if high <= 1 else "0..255"
        if high > 0:
            other = next((known for known in tree.ranges if known != value_range), None)
            tree.ranges.setdefault(value_range, name)
            if other is not None:
                raise BadInput(
                    f"{where} holds floats in {value_range}, {tree.where(tree.ranges[other])} in {other}: "
                    "scale all images to one range"
                )
        scaled: Any = np.rint(pixels * (255.0 if high <= 1 else 1.0))
    elif image.mode != "I" or image.format in ("PNG", "PPM") or "I;16" in str(getattr(image, "tile", "")):
        if 0 < high < 4096:
            raise Unreadable(
                f"{where} has 16 bits and no value above {high:.0f}: it would be almost black. Scale its values to "
                "0..65535 (12 bits: times 16)"
            )
        scaled = pixels.astype(np.int64) >> 8
    else:
        if low < 0 or high > 255:
            raise Unreadable(f"{where} holds 32-bit integers from {low:.0f} to {high:.0f}: they must lie in 0..255")
        scaled = pixels
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
