"""The restored pictures of the report: degraded, enlarged, every row, and the truth, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .pictures import Pictures, picture_uri, pixel_psnr
from .restored_rows import RestoredPictures

SHOWN = 200  # CSS pixels of a tile, about


@dataclass(frozen=True)
class RestoredShots:
    """What the page shows of restored pictures.

    Args:
        style: CSS with the classes `q{kind}-{number}` of the pictures that are no row's.
        tiles: (class without its number, name, kind) of each tile, where the kind is "input", "bicubic", "row" or
            "truth".
        count: pictures.
        side: CSS pixels of a tile.
        factor: of the sides.
        figures: PSNR to the true picture as text, by class.
    """

    style: str
    tiles: tuple[tuple[str, str, str], ...]
    count: int
    side: int
    factor: int
    figures: Mapping[str, str]


def collect_restored(
    shots: Pictures | None, restored: RestoredPictures | None, rows: Sequence[np.ndarray | None] = ()
) -> RestoredShots | None:
    """The tiles of all pictures; None where no images are restored.

    Args:
        shots: the pictures of the rows, whose classes are used again.
        restored: the others.
        rows: the pictures of each row, uint8 (K, C, H, W).
    """
    if shots is None or restored is None:
        return None
    height, width = restored.truths.shape[-2:]
    small = shots.pixelated
    tiles = [("qi", f"input, {width // restored.factor}x{height // restored.factor}", "input")]
    tiles += [("qb", "bicubic", "bicubic")] if restored.factor > 1 else []
    tiles += [(f"p{index}", f"{index + 1} · {name}", "row") for index, name in shots.rows]
    tiles += [("qt", "truth", "truth")]
    rules = []
    for kind, images in {"qi": restored.inputs, "qb": restored.enlarged, "qt": restored.truths}.items():
        for k in range(min(shots.count, len(images))) if any(kind == tile[0] for tile in tiles) else ():
            rules.append(f".{kind}-{k}{{background-image:url({picture_uri(images[k], small)})}}")
    side = max(SHOWN, min(width, 2 * SHOWN))
    count = min(shots.count, len(restored.truths))
    own = {f"p{index}": images for index, images in enumerate(rows) if images is not None}
    own |= {"qb": restored.enlarged}
    figures = {
        f"{kind}-{k}": pixel_psnr(own[kind][k], restored.truths[k])
        for kind, _, _ in tiles
        for k in range(count)
        if kind in own
    }
    return RestoredShots("".join(rules), tuple(tiles), count, side, restored.factor, figures)
