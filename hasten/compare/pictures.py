"""The pictures of the report: each is embedded once, as a class of the page's style that any element shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .plots import Row

SMALL = 160  # side in pixels up to which a picture is embedded without loss
LARGE = 448  # side that larger ones are reduced to
MANY, FEW = 10, 6  # pictures of a row, small ones and others
SHOWN = 128  # side in pixels that small ones are enlarged to, about


@dataclass(frozen=True)
class Pictures:
    """What the page shows of pictures.

    Args:
        style: CSS with a class `p{row}-{number}` for each picture.
        count: pictures of each row.
        rows: (index, name) of the rows that have pictures, the reference first.
        side: CSS pixels of a tile.
        ratio: CSS aspect ratio.
        pixelated: whether small pictures are enlarged.
        reduced: whether pictures are reduced or compressed for the page.
        psnr: text of PSNR to the reference's picture, by (row index, number).
    """

    style: str
    count: int
    rows: tuple[tuple[int, str], ...]
    side: int
    ratio: str
    pixelated: bool
    reduced: bool
    psnr: Mapping[tuple[int, int], str]


def collect_pictures(rows: Sequence[Row], images: Mapping[str, np.ndarray]) -> Pictures | None:
    """The pictures of all rows; None where there are none.

    Args:
        rows: Rows of results.jsonl.
        images: uint8 `(K, C, H, W)` by row key, the same K seeds in each.
    """
    known = [(index, row) for index, row in enumerate(rows) if row["key"] in images]
    if not known:
        return None
    first = images[known[0][1]["key"]]
    known = [(index, row) for index, row in known if images[row["key"]].shape == first.shape]
    height, width = first.shape[-2:]
    small = max(height, width) <= SMALL
    count = min(len(first), MANY if small else FEW)
    rules, psnr = [], {}
    for index, row in known:
        for k in range(count):
            pixels = images[row["key"]][k]
            rules.append(f".p{index}-{k}{{background-image:url({picture_uri(pixels, small)})}}")
            if index != known[0][0]:
                psnr[index, k] = pixel_psnr(pixels, first[k])
    scale = max(1, round(SHOWN / width)) if small else 1
    return Pictures(
        style="".join(rules),
        count=count,
        rows=tuple((index, str(row["name"])) for index, row in known),
        side=width * scale if small else 240,
        ratio=f"{width}/{height}",
        pixelated=small,
        reduced=not small,
        psnr=psnr,
    )


def picture_uri(pixels: np.ndarray, small: bool) -> str:
    """A picture uint8 (C, H, W) as a `data:` URI: a PNG of a small one, otherwise a JPEG of at most 448 pixels."""
    from PIL import Image

    picture = Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).convert("RGB")
    stream = io.BytesIO()
    if small:
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.thumbnail((LARGE, LARGE))
        picture.save(stream, "JPEG", quality=92, subsampling=0)
    kind: Any = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def pixel_psnr(pixels: np.ndarray, others: np.ndarray) -> str:
    """PSNR of two uint8 pictures as text."""
    error = np.square((pixels.astype(np.float64) - others) / 255).mean()
    return "identical" if error == 0 else f"{-10 * np.log10(error):.1f} dB"
