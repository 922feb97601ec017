"""The restored pictures of the report: degraded, enlarged, every row, and the truth, side by side."""

from __future__ import annotations

from dataclasses import dataclass

from .pictures import Pictures, picture_uri
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
    """

    style: str
    tiles: tuple[tuple[str, str, str], ...]
    count: int
    side: int
    factor: int


def collect_restored(shots: Pictures | None, restored: RestoredPictures | None) -> RestoredShots | None:
    """The tiles of all pictures; None where no images are restored.

    Args:
        shots: the pictures of the rows, whose classes are used again.
        restored: the others.
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
    return RestoredShots("".join(rules), tuple(tiles), count, side, restored.factor)
