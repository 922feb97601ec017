"""Images as files: PNG grids and single PNGs with their provenance in the metadata."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput
from .utils.finite import check_images

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_uint8(x: Tensor) -> np.ndarray:
    """`(n, C, H, W)` floats in [-1, 1] -> `(n, H, W, C)` uint8, `round(127.5 (x + 1))`, clamped to 0..255.

    Raises:
        BadInput: for another shape.
        NonFinite: for images with NaN or infinity, naming them.
    """
    if x.ndim != 4 or x.shape[1] not in MODES:
        raise BadInput(f"images are (n, C, H, W) with C of 1, 3 or 4, got shape {tuple(x.shape)}")
    check_images(x)
    pixels = (x.detach().float().cpu() + 1).mul(127.5).round().clamp(0, 255)
    return pixels.byte().permute(0, 2, 3, 1).contiguous().numpy()


def to_image_tensor(images: Any, shape: Sequence[int] | None) -> Tensor:
    """Images as float32 (n, C, H, W) in [-1, 1]; NaN is allowed, for unknown pixels.

    Args:
        images: a tensor or NumPy array, floats in [-1, 1] or uint8, (n, C, H, W), for arrays also (n, H, W, C) or (n,
            H, W); or a PIL image, or a list of PIL images, which are rotated as their EXIF data say, composited on
            white, and converted to the channels of `shape`.
        shape: (C, H, W) of a sample, of which only the channels matter; None: latents, of any range and shape.

    Raises:
        BadInput: for other types, for integers other than uint8, for floats beyond [-1, 1] by more than a half.
    """
    import numpy as np
    import torch

    several = images if isinstance(images, (list, tuple)) else [images]
    if several and all(hasattr(one, "getexif") and hasattr(one, "convert") for one in several):
        from PIL import Image, ImageOps

        def flat(one: Image.Image) -> np.ndarray:
            one = ImageOps.exif_transpose(one) or one
            if one.mode in ("LA", "PA", "RGBA") or "transparency" in one.info:
                one = Image.alpha_composite(Image.new("RGBA", one.size, "white"), one.convert("RGBA"))
            if one.mode.startswith(("I", "F")):
                raise BadInput(f"images of PIL must have 8 bits a channel, got one of mode {one.mode}")
            return np.array(one.convert("L" if shape is not None and shape[0] == 1 else "RGB"))

        arrays = [flat(one) for one in several]
        if len({array.shape for array in arrays}) > 1:
            raise BadInput(f"images must have one size, found {sorted({a.shape[1::-1] for a in arrays})}")
        images = np.stack(arrays)
    elif isinstance(images, (list, tuple)):
        if not images or not all(isinstance(one, (torch.Tensor, np.ndarray)) for one in images):
            kinds = sorted({type(one).__name__ for one in images}) or ["nothing"]
            raise BadInput(f"images must be a tensor, an array or PIL images, got a list of {', '.join(kinds)}")
        if len({tuple(one.shape) for one in images}) > 1:
            raise BadInput(f"images must have one shape, found {sorted({tuple(one.shape) for one in images})}")
        images = torch.stack([torch.as_tensor(one) for one in images])
    if isinstance(images, np.ndarray):
        if shape is not None and images.ndim == 3 and shape[0] == 1:
            images = images[:, None]
        elif shape is not None and images.ndim == 4 and images.shape[1] != shape[0] == images.shape[-1]:
            images = np.moveaxis(images, -1, 1)
        if images.dtype.kind not in "fiub":
            raise BadInput(f"images must be numbers, got an array of {images.dtype}")
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, torch.Tensor):
        raise BadInput(f"images must be a tensor, an array or PIL images, got {type(images).__name__}")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point():
        raise BadInput(f"images must be floats in [-1, 1] or uint8, got {images.dtype}")
    high = float(images.detach().nan_to_num(0.0).abs().amax()) if images.numel() else 0.0
    if shape is not None and high > 1.5:
        raise BadInput(f"images must lie in [-1, 1], found values up to {high:.4g} (uint8 images are scaled)")
    return images if images.dtype == torch.float64 else images.float()


def mark_non_finite(x: Tensor) -> Tensor:
    """Images `(n, C, H, W)`, with a white cross on grey in place of those with NaN or infinity."""
    import torch

    height, width = x.shape[-2:]
    rows, columns = torch.arange(height)[:, None] / max(height - 1, 1), torch.arange(width) / max(width - 1, 1)
    near = 0.75 / max(min(height, width) - 1, 1)
    cross = ((rows - columns).abs() <= near) | ((rows + columns - 1).abs() <= near)
    bad = ~torch.isfinite(x).flatten(1).all(dim=1)
    return torch.where(bad[:, None, None, None], cross.float(), x.clamp(-1, 1))


def to_pil(x: Tensor) -> Image:
    """One image `(C, H, W)` in [-1, 1] as a Pillow image."""
    from PIL import Image

    pixels = to_uint8(x[None])[0]
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def make_image_grid(x: Tensor, columns: int | None = None, gap: int = 2) -> Image:
    """Images `(n, C, H, W)` in [-1, 1] as one Pillow image, row by row.

    Args:
        x: the images.
        columns: images per row; by default the smallest square that fits them.
        gap: white pixels between them.
    """
    from PIL import Image

    n, channels, height, width = x.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1:
        raise BadInput(f"columns must be at least 1, got {columns}")
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new(MODES.get(channels, "RGB"), size, 255 if channels == 1 else (255,) * channels)
    for k in range(n):
        sheet.paste(to_pil(x[k]), (k % columns * (width + gap), k // columns * (height + gap)))
    return sheet


def interleave_rows(sources: Tensor, results: Tensor, columns: int = 16) -> Tensor:
    """Rows of at most `columns` sources, each above the row of its results: (2 n, C, H, W), white where n ends."""
    import torch

    if sources.shape[1] != results.shape[1]:
        channels = max(sources.shape[1], results.shape[1])
        sources, results = (x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x for x in (sources, results))
    rows = []
    for first in range(0, len(sources), columns):
        for row in (sources[first : first + columns], results[first : first + columns]):
            missing = min(columns, len(sources)) - len(row)
            rows.append(torch.cat([row, row.new_ones(missing, *row.shape[1:])]))
    return torch.cat(rows)


def encode_png(image: Image, text: Mapping[str, str] | None = None) -> bytes:
    """A Pillow image as the bytes of a PNG file. The same input gives the same bytes.

    Args:
        image: to encode.
        text: metadata, written to text chunks.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_png_text(path: str | Path) -> dict[str, str]:
    """The metadata in the text chunks of a PNG file, where hasten stores the provenance."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return dict(getattr(image, "text", {}))
