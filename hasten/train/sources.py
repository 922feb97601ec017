"""The data set class, and readers of IDX and NumPy files."""

from __future__ import annotations

import gzip
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from .messages import join_names, pluralize

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY = 2**30  # maximum bytes of decoded images in memory; larger data is decoded on demand
LABELS = re.compile(r"label|target|class|(^|_)y($|_)", re.IGNORECASE)  # names of arrays that may be labels
IDX = re.compile(r"^(.*[-_])?(train|t10k|test)[-_]images[-_.]idx3[-_]ubyte(\.gz)?$")


class MixedSizes(BadInput):
    """A folder whose images have several sizes was opened without `size`."""


class NoSplits(BadInput):
    """A folder without splits was asked for one other than `train`."""


@dataclass(frozen=True, eq=False)
class Data:
    """A data set of images of one size: `len(data)`, `data.shape`, `data.images(indices)`.

    Args:
        size: number of images, >= 1.
        shape: (C, H, W) of each.
        fetch: list of n indices -> uint8 (n, C, H, W).
        labels: int64 (size,) in 0..len(classes)-1, or None.
        classes: the names of the classes, or None.
        source: the path, for messages.
        lazy: images are decoded on demand.
        origin: where the labels come from, for messages.
        skipped: the files that were skipped, for messages.
        messages: what else is there and not used, or is ambiguous and how it was read.
        alpha: index -> the opacity of an image, uint8 (H, W), or None without transparency; for image files only.
        unreadable: indices of images that could not be read and were replaced by others.
        captions: the text of each image, or None.
        conditions: list of n indices -> what a network is conditioned on beside labels, each (n, ...) by name, such as
            the embedded captions `text`; or None.
        null_conditions: what replaces a condition NAME where it is dropped, (1, ...) each, as `null_NAME`; or None.
        files: the path of each image below the root of its folder or zip, or None for arrays.
        caption_problem: why the captions that there are cannot be used, for messages.

    Raises:
        BadInput: without images, or if the number of labels differs.
    """

    size: int
    shape: tuple[int, int, int]
    fetch: Callable[[list[int]], Tensor] = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    classes: tuple[str, ...] | None = None
    source: str = ""
    lazy: bool = False
    origin: str = ""
    skipped: str = ""
    messages: tuple[str, ...] = ()
    alpha: Callable[[int], Tensor | None] | None = field(default=None, repr=False)
    unreadable: set[int] = field(default_factory=set, repr=False, compare=False)
    captions: tuple[str, ...] | None = field(default=None, repr=False)
    conditions: Callable[[list[int]], dict[str, Tensor]] | None = field(default=None, repr=False)
    null_conditions: dict[str, Tensor] | None = field(default=None, repr=False)
    caption_problem: str = ""
    files: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"{self.source or 'the data'} holds no images")
        if self.labels is not None and len(self.labels) != self.size:
            raise BadInput(f"{self.source or 'the data'}: {self.size} images but {len(self.labels)} labels")
        if self.captions is not None and len(self.captions) != self.size:
            raise BadInput(f"{self.source or 'the data'}: {self.size} images but {len(self.captions)} captions")

    @classmethod
    def of(
        cls,
        images: Tensor,
        labels: Tensor | None = None,
        classes: Sequence[str] | None = None,
        source: str = "",
        **details: Any,
    ) -> Data:
        """Data in memory.

        Args:
            images: uint8 (n, C, H, W).
            labels: integers (n,) in 0..K-1, or None.
            classes: K names. Default: "0", "1", ...
            source: a name for messages.
            details: further fields.

        Raises:
            BadInput: if images or labels are of another shape, type or range.
        """
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise BadInput(f"images must be uint8 (n, C, H, W), got {images.dtype} {tuple(images.shape)}")
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        labels, names = check_labels(labels, classes, len(images), source)
        return cls(len(images), shape, lambda indices: images[indices], labels, names, source, **details)

    @property
    def summary(self) -> str:
        """One line: number, size and color of the images, the classes and the origin of the labels, captions."""
        channels, height, width = self.shape
        colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
        line = f"{pluralize(self.size, 'image')} {width} x {height} {colour}, "
        parts = []
        if self.labels is not None:
            names = self.classes or ()
            where = f" from {self.origin}" if self.origin else ""
            parts.append(f"{len(names):,} classes{where} ({join_names(names)})")
        if self.captions is not None:
            empty = sum(not text for text in self.captions)
            parts.append(f"with captions ({empty:,} empty)" if empty else "with captions")
        return line + ", ".join([*(parts or ["no labels"]), *([self.skipped] if self.skipped else [])])

    def __len__(self) -> int:
        """The number of images."""
        return self.size

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images of `indices`, uint8 (n, C, H, W). Raises BadInput, which names the file, if one is unreadable."""
        return self.fetch(indices.tolist() if isinstance(indices, Tensor) else list(indices))


def check_labels(
    labels: Any, classes: Sequence[str] | None, n: int, source: str
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as int64 (n,) in 0..K-1, and the K class names. Raises BadInput for anything else."""
    if labels is None:
        return None, None
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise BadInput(f"{source}: labels must be integers (n,), got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) != n:
        raise BadInput(f"{source}: {n} images but {len(labels)} labels")
    labels = labels.long()
    count = len(classes) if classes is not None else int(labels.max()) + 1 if n else 0
    if n and (int(labels.min()) < 0 or int(labels.max()) >= count or count > max(n, 10_000)):
        low, high = int(labels.min()), int(labels.max())
        raise BadInput(f"{source}: labels run from {low} to {high}; they must be 0..K-1 for K classes")
    return labels, tuple(classes) if classes is not None else tuple(str(k) for k in range(count))


def center_crop(image: Image, height: int, width: int) -> Image:
    """The largest centered crop of the aspect ratio height:width, resized to (height, width) by Lanczos resampling."""
    from PIL import Image, ImageOps

    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def find_idx(folder: Path) -> dict[str, Path]:
    """Split -> image file, for the IDX files of a folder under their usual names."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = IDX.match(path.name)
        if match:
            split = "train" if match[2] == "train" else "test"
            other = files.setdefault(split, path)
            if other.name.removesuffix(".gz") != path.name.removesuffix(".gz"):
                raise BadInput(f"{folder} holds several sets, {other.name} and {path.name}: name the file to use")
    return files


def read_idx(path: Path) -> Any:
    """The uint8 array of an IDX file (big-endian header `0 0 8 rank`, then `rank` sizes), gzipped or not."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"cannot read {path}: {e} (the file may be truncated)") from e
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 4:
        raise BadInput(f"{path} is not an IDX file of bytes: it starts with {raw[:4].hex(' ') or 'nothing'}")
    rank = raw[3]
    start = 4 + 4 * rank
    shape = struct.unpack(f">{rank}I", raw[4:start]) if len(raw) >= start else (-1,)
    need = start + int(np.prod(shape, dtype=object))
    if len(raw) != need or len(raw) < start:
        raise BadInput(f"{path} should hold {need} bytes for sizes {shape} but holds {len(raw)}: it may be truncated")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def open_idx(path: Path) -> tuple[Any, Any]:
    """The images (n, H, W) of an IDX file, and the labels (n,) of the label file next to it, or None."""
    images = read_idx(path)
    if images.ndim not in (3, 4):
        raise BadInput(f"{path} holds an array of shape {images.shape}, not images (n, H, W)")

    def stem(name: str) -> str:
        return re.sub(r"(labels)[-_.]idx1|(images)[-_.]idx[34]", "labels", name.removesuffix(".gz").lower())

    candidates = (p for p in sorted(path.parent.iterdir()) if "idx1" in p.name.lower() and p.is_file())
    labels = next((p for p in candidates if stem(p.name) == stem(path.name) and p != path), None)
    return images, None if labels is None else read_idx(labels)


def open_npy(path: Path) -> tuple[Any, Any, list[str]]:
    """Images, labels or None, and messages of an `.npy`. Labels are next to it: `labels.npy` of `images.npy`."""
    swaps = (("images", "labels"), ("image", "label"), ("Images", "Labels"), ("X", "y"), ("x", "y"))
    names = dict.fromkeys(path.name.replace(*swap) for swap in swaps)
    partner = next((path.with_name(n) for n in names if n != path.name and path.with_name(n).is_file()), None)
    images = read_npy(path)
    if partner is not None:
        return images, read_npy(partner), []
    unused = [p.name for p in sorted(path.parent.glob("*.npy")) if p != path and LABELS.search(p.stem)]
    return images, None, [f"{', '.join(unused)} next to it not used"] if unused else []


def read_npy(path: Path) -> Any:
    """The memory-mapped array of an `.npy`. Raises BadInput if it is damaged or holds anything else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.ndarray):
            return array
        array.close()
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile) as e:
        if "Python objects" in str(e) or "allow_pickle" in str(e):
            raise BadInput(f"cannot read {path}: it holds Python objects, not numbers") from e
        raise BadInput(f"cannot read {path}: {e} (the file may be truncated)") from e
    raise BadInput(f"{path} holds several arrays: name it .npz")
