"""Image files: what Pillow can read here, their headers, and the decoding of one to 8 bits."""

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

import torch
from torch import Tensor

from ..errors import BadInput
from .sources import crop
from .tree import SUFFIXES, Tree

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow and zipfile raise for a file that is damaged, or of a kind that they cannot read.
BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile, IndexError, KeyError,
    TypeError, OverflowError, RuntimeError, NotImplementedError,
)  # fmt: skip
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


class Unreadable(BadInput):
    """An image file that cannot be read, or whose values cannot be brought to 8 bits without a guess."""


@functools.cache
def readable() -> tuple[str, ...]:
    """The suffixes of `SUFFIXES` whose format this Pillow can decode (with the package pillow_heif, HEIC too)."""
    from PIL import Image, features

    Image.init()
    with suppress(ImportError, AttributeError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    needs = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000", "JPEG": "jpg"}
    formats, able = Image.registered_extensions(), set()
    for suffix in SUFFIXES:
        kind = formats.get(suffix, "")
        with suppress(ValueError):  # a feature that this Pillow does not know
            if kind in Image.OPEN and (kind not in needs or features.check(needs[kind])):
                able.add(suffix)
    return tuple(suffix for suffix in SUFFIXES if suffix in able)


@dataclass(frozen=True)
class Header:
    """Of an image as it will be decoded, upright. pages: it holds more than one."""

    height: int
    width: int
    grey: bool
    pages: bool


@contextmanager
def opened(tree: Tree, name: str, whole: bool = True) -> Iterator[Image]:
    """An image file opened by its header; what goes wrong inside becomes Unreadable with the file's name.

    whole: read all of it first, which checks the sum that a zip keeps; else no more than the header needs.
    """
    from PIL import Image

    try:
        with io.BytesIO(tree.read(name)) if whole else tree.open(name) as stream, Image.open(stream) as image:
            yield image
    except BadInput:
        raise
    except (*BROKEN, Image.DecompressionBombError) as e:
        reason = "not an image, or cut short" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        raise Unreadable(f"cannot read {tree.where(name)}: {reason or type(e).__name__}") from e


def header(tree: Tree, name: str) -> Header:
    """The header of an image file; its pixels are not read."""
    with opened(tree, name, whole=False) as image:
        turned = orientation(image) >= 5
        grey = image.mode in GREY
        if turned and image.format == "TIFF":
            image.load()  # Pillow turns TIFF itself, some versions when it is loaded
            turned = False
        width, height = image.size[::-1] if turned else image.size
        pages = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        return Header(height, width, grey, pages)


def orientation(image: Image) -> int:
    """The EXIF orientation, 1 to 8, from what the header holds."""
    from PIL import Image as pillow

    try:  # the method of a PNG file would load the pixels first
        found = pillow.Image.getexif(image).get(0x0112, 1)
    except BROKEN:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def decode(tree: Tree, name: str, shape: tuple[int, int, int], resize: bool) -> Tensor:
    """One image as uint8 (C, H, W): upright, transparency on white, other depths reduced to 8 bits (`eight_bits`)."""
    import numpy as np
    from PIL import Image

    channels, height, width = shape
    with opened(tree, name) as image:
        deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        picture = eight_bits(tree, name, upright(image))
        if deep and picture.mode in ("RGB", "RGBA", "LA"):
            colours = [band for band in picture.getbands() if band != "A"]
            high = max(picture.getchannel(band).getextrema()[1] for band in colours)
            if 0 < high < 16:  # type: ignore[operator]
                raise Unreadable(f"{tree.where(name)} holds few of its 16 bits: scale its values to 0..65535")
        if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if channels == 1 else "RGB")
    picture = crop(picture, height, width) if resize else picture
    if picture.size != (width, height):
        raise Unreadable(f"{tree.where(name)} is {picture.width}x{picture.height}, others are {width}x{height}: "
                       "give a size to bring all to one")  # fmt: skip
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def upright(image: Image) -> Image:
    """The image turned as its EXIF data say."""
    from PIL import ImageOps

    image.load()
    turn = image.format != "TIFF" and orientation(image) > 1  # Pillow has turned a TIFF
    return (ImageOps.exif_transpose(image) or image) if turn else image


def alpha(tree: Tree, name: str) -> Tensor | None:
    """The opacity of an image, uint8 (H, W), upright; None for an image without transparency."""
    import numpy as np

    with opened(tree, name) as image:
        picture = upright(image)
        if picture.mode not in ("LA", "PA", "RGBA", "La", "RGBa") and "transparency" not in picture.info:
            return None
        return torch.from_numpy(np.array(picture.convert("RGBA").getchannel("A")))


def eight_bits(tree: Tree, name: str, image: Image) -> Image:
    """An image of one deep channel with 8 bits.

    16 bits: the upper 8; refused where all values are below 4096 and not 0, as are 10 or 12 bits kept in 16.
    32-bit integers: values of 0..255 only. Floats: [0, 1] times 255, or 0..255, the same in all images of a set.
    """
    import numpy as np
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    pixels, where = np.asarray(image), tree.where(name)
    low, high = float(pixels.min()), float(pixels.max())
    if image.mode == "F":
        if not np.isfinite(pixels).all() or low < 0 or high > 255:
            raise Unreadable(f"{where} holds floats from {low:.4g} to {high:.4g}: they must lie in [0, 1] or 0..255")
        rule = "[0, 1]" if high <= 1 else "0..255"
        if high > 0:
            other = next((known for known in tree.ranges if known != rule), None)
            tree.ranges.setdefault(rule, name)
            if other is not None:
                raise BadInput(f"{where} holds floats in {rule}, {tree.where(tree.ranges[other])} in {other}: "
                               "bring all to one range")  # fmt: skip
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
