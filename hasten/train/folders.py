"""Images from a folder or a zip: splits, class sub-folders, `labels.csv`, and the decoding of one file."""

from __future__ import annotations

import csv
import io
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import BadInput
from .sources import MEMORY, Data, crop

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "t10k"),
    "val": ("val", "valid", "validation"),
}
# What Pillow and zipfile raise for a file that is damaged.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, zipfile.BadZipFile, IndexError)


@dataclass(frozen=True)
class Tree:
    """A folder or a zip as a list of file names and a way to read one."""

    root: str
    names: tuple[str, ...]
    read: Callable[[str], bytes] = field(repr=False)

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"


def folder_tree(path: Path) -> Tree:
    """Every file below `path`, hidden ones left out."""
    files = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
    names = sorted(p.as_posix() for p in files if not any(part.startswith(".") for part in p.parts))
    return Tree(str(path), tuple(names), lambda name: (path / name).read_bytes())


def zip_tree(path: Path) -> Tree:
    """Every member of a zip, hidden ones and those of macOS left out."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as e:
        raise BadInput(f"{path} is not a zip file that can be read ({e}): it may be cut short") from e
    hidden = re.compile(r"(^|/)(\.|__MACOSX/)")
    names = sorted(i.filename for i in archive.infolist() if not i.is_dir() and not hidden.search(i.filename))
    return Tree(str(path), tuple(names), archive.read)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts "2" before "10"."""
    return [(0, int(s), "") if s.isdigit() else (1, 0, s) for s in re.split(r"(\d+)", name) if s]


def open_tree(
    tree: Tree, split: str | None, size: tuple[int, int] | None, channels: int | None, label: str | None
) -> Data:
    """Images of a folder or a zip, with labels from `labels.csv` or from the class sub-folders."""
    names = [name for name in tree.names if name.lower().endswith(SUFFIXES)]
    names, prefix = choose_split(tree, names, split)
    if not names:
        raise BadInput(f"{tree.root} holds no images (looked for {', '.join(SUFFIXES)})")
    labels, classes = labels_from_csv(tree, names, prefix, label)
    if labels is None and label is None:
        labels, classes = labels_from_folders(tree, names, prefix)
    shape = common_shape(tree, names, size, channels)
    c, h, w = shape

    def fetch(indices: list[int]) -> Tensor:
        out = torch.empty(len(indices), c, h, w, dtype=torch.uint8)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside Python's lock
            for k, image in enumerate(pool.map(lambda i: decode(tree, names[i], shape, size is not None), indices)):
                out[k] = image
        return out

    targets = None if labels is None else torch.tensor(labels)
    if len(names) * c * h * w <= MEMORY:
        return Data.of(fetch(list(range(len(names)))), targets, classes, tree.root)
    return Data(len(names), shape, fetch, targets, classes, tree.root, lazy=True)


def choose_split(tree: Tree, names: list[str], split: str | None) -> tuple[list[str], str]:
    """The names of the asked split, and the folder they share; a lone top folder is looked through."""
    prefix = ""
    while True:
        tops = {name[len(prefix) :].split("/", 1)[0] for name in names}
        inside = all("/" in name[len(prefix) :] for name in names)
        parts = {s: top for s, aliases in SPLITS.items() for top in tops if top.lower() in aliases}
        if parts and inside and len(parts) == len(tops):
            break
        if len(tops) != 1 or not inside:
            parts = {}
            break
        prefix += f"{tops.pop()}/"
    if split is None or (split == "train" and not parts):
        return names, prefix
    if split not in parts:
        found = f"it has {', '.join(sorted(parts))}" if parts else "it has no split folders"
        raise BadInput(f"{tree.root} has no split {split!r}: {found}")
    prefix = f"{prefix}{parts[split]}/"
    return [name for name in names if name.startswith(prefix)], prefix


def labels_from_folders(tree: Tree, names: list[str], prefix: str) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """The class of an image is the first folder of its name after `prefix`."""
    tops = [PurePosixPath(name[len(prefix) :]).parts for name in names]
    flat = [name for name, parts in zip(names, tops, strict=True) if len(parts) == 1]
    if len(flat) == len(names):
        return None, None
    if flat:
        raise BadInput(f"{tree.root} holds class folders and loose images as well ({flat[0]}): sort it into a class")
    classes = sorted({parts[0] for parts in tops}, key=natural)
    if len(classes) == 1:
        return None, None
    index = {name: k for k, name in enumerate(classes)}
    return [index[parts[0]] for parts in tops], tuple(classes)


def labels_from_csv(
    tree: Tree, names: list[str], prefix: str, label: str | None
) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Labels of `labels.csv`: a header with `file` and `label` (or the column asked for), or two columns without one.

    A file is named relative to where the csv lies. A csv without that column gives no labels unless it was asked for.
    """
    places = (f"{prefix}labels.csv", f"{PurePosixPath(prefix).parent}/labels.csv".removeprefix("./"), "labels.csv")
    place = next((p for p in places if p in tree.names), None)
    if place is None:
        if label is not None:
            raise BadInput(f"{tree.root} has no labels.csv to take the column {label!r} from")
        return None, None
    where, base = tree.where(place), place.removesuffix("labels.csv")
    try:
        rows = [row for row in csv.reader(io.StringIO(tree.read(place).decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error, zipfile.BadZipFile, OSError) as e:
        raise BadInput(f"cannot read {where}: {e}") from e
    column, file = label or "label", 0
    if rows and base + rows[0][0] in tree.names:
        value = 1
    elif not rows or column not in rows[0]:
        if label is None:
            return None, None
        raise BadInput(f"{where} has no column {label!r} (columns: {', '.join(rows[0]) if rows else 'none'})")
    elif "file" not in rows[0]:
        raise BadInput(f"{where} has no column 'file' (columns: {', '.join(rows[0])})")
    else:
        file, value = rows[0].index("file"), rows[0].index(column)
        rows = rows[1:]
    short = next((row for row in rows if len(row) <= max(file, value)), None)
    if short:
        raise BadInput(f"{where}: the row {','.join(short)!r} has no label")
    said = {base + row[file]: row[value].strip() for row in rows}
    missing = [name for name in names if name not in said]
    if missing:
        raise BadInput(f"{where}: {len(names)} images but no label for {len(missing)} of them, such as {missing[0]}")
    lost = next((name for name in said if name not in tree.names), None)
    if lost:
        raise BadInput(f"{where} names {lost}, which is not there")
    classes = sorted({said[name] for name in names}, key=natural)
    index = {name: k for k, name in enumerate(classes)}
    return [index[said[name]] for name in names], tuple(classes)


def open_image(tree: Tree, name: str) -> Image:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(tree.read(name)))
    except (*BROKEN, Image.DecompressionBombError) as e:
        reason = "not an image, or cut short" if isinstance(e, Image.UnidentifiedImageError) else str(e)
        raise BadInput(f"cannot read {tree.where(name)}: {reason}") from e


def common_shape(
    tree: Tree, names: list[str], size: tuple[int, int] | None, channels: int | None
) -> tuple[int, int, int]:
    """(C, H, W) of all the images, from their headers; grey only when all are."""
    first, grey = None, True
    for name in names:
        with open_image(tree, name) as image:
            width, height = image.size
            if orientation(image) >= 5:
                width, height = height, width
            grey = grey and image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "F")
        if first is None:
            first = (name, height, width)
        if size is None and first[1:] != (height, width):
            raise BadInput(
                f"{tree.root} mixes sizes: {first[0]} is {first[2]}x{first[1]} and {name} is {width}x{height}; "
                "give a size to bring all to one"
            )
        if size is not None and channels is not None:
            break
    assert first is not None
    height, width = size or first[1:]
    return channels or (1 if grey else 3), height, width


def orientation(image: Image) -> int:
    """The EXIF orientation, of the formats whose header holds it."""
    return image.getexif().get(0x0112, 1) if image.format in ("JPEG", "MPO", "TIFF", "WEBP") else 1


def decode(tree: Tree, name: str, shape: tuple[int, int, int], resize: bool) -> Tensor:
    """One image as uint8 (C, H, W): upright, transparency on white, 16 bits reduced to 8."""
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = shape
    with open_image(tree, name) as opened:
        try:
            image: Image.Image = opened
            if orientation(image) > 1:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
        except (*BROKEN, Image.DecompressionBombError) as e:
            raise BadInput(f"cannot read {tree.where(name)}: {e}") from e
        image = crop(image, height, width) if resize else image
        pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
