"""Images of one size, and how they are read from IDX and NumPy files."""

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

import torch
from torch import Tensor

from ..errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY = 2**30  # bytes of decoded images that are kept in memory; above that they are decoded when asked for
IDX = re.compile(r"^(.*[-_])?(train|t10k|test)[-_]images[-_.]idx3[-_]ubyte(\.gz)?$")


@dataclass(frozen=True, eq=False)
class Data:
    """A set of equally large images: `len(data)`, `data.shape`, `data.images(indices)`.

    shape: (C, H, W). fetch: list of indices -> uint8 (n, C, H, W).
    labels: int64 (len,) in 0..len(classes)-1, or None. classes: their names, or None.
    source: where it came from, for messages. lazy: images are decoded when they are asked for.
    """

    size: int
    shape: tuple[int, int, int]
    fetch: Callable[[list[int]], Tensor] = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    classes: tuple[str, ...] | None = None
    source: str = ""
    lazy: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise BadInput(f"{self.source or 'the data'} holds no images")
        if self.labels is not None and len(self.labels) != self.size:
            raise BadInput(f"{self.source or 'the data'}: {self.size} images but {len(self.labels)} labels")

    @classmethod
    def of(
        cls, images: Tensor, labels: Tensor | None = None, classes: Sequence[str] | None = None, source: str = ""
    ) -> Data:
        """Data in memory: `images` uint8 (n, C, H, W); `labels` integers (n,), named by number by default."""
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise BadInput(f"images must be uint8 (n, C, H, W), got {images.dtype} {tuple(images.shape)}")
        shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        labels, names = checked_labels(labels, classes, len(images), source)
        return cls(len(images), shape, lambda indices: images[indices], labels, names, source)

    def __len__(self) -> int:
        return self.size

    def images(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The images of `indices`, uint8 (n, C, H, W). Raises BadInput, naming the file, where one cannot be read."""
        return self.fetch(indices.tolist() if isinstance(indices, Tensor) else list(indices))


def checked_labels(
    labels: Any, classes: Sequence[str] | None, n: int, source: str
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as int64 (n,) in 0..K-1, and the K names; BadInput where they are something else."""
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


def crop(image: Image, height: int, width: int) -> Image:
    """The largest centred rectangle of the asked proportions, brought to the asked size with Pillow's Lanczos."""
    from PIL import Image, ImageOps

    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def find_idx(folder: Path) -> dict[str, Path]:
    """Split -> file of images, for the IDX files of a folder under their usual names."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = IDX.match(path.name)
        if match:
            found.setdefault("train" if match[2] == "train" else "test", path)
    return found


def read_idx(path: Path) -> Any:
    """A NumPy array of an IDX file of bytes (big-endian header `0 0 8 rank`, then `rank` sizes), gzipped or not."""
    import numpy as np

    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as e:
        raise BadInput(f"cannot read {path}: {e} (the file may be cut short)") from e
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or not 1 <= raw[3] <= 4:
        raise BadInput(f"{path} is not an IDX file of bytes: it starts with {raw[:4].hex(' ') or 'nothing'}")
    rank = raw[3]
    start = 4 + 4 * rank
    shape = struct.unpack(f">{rank}I", raw[4:start]) if len(raw) >= start else (-1,)
    need = start + int(np.prod(shape, dtype=object))
    if len(raw) != need or len(raw) < start:
        raise BadInput(f"{path} should hold {need} bytes for sizes {shape} but holds {len(raw)}: it may be cut short")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def open_idx(path: Path) -> tuple[Any, Any]:
    """Images (n, H, W) of an IDX file, and the labels (n,) that lie beside it under their usual name, or None."""
    images = read_idx(path)
    if images.ndim not in (3, 4):
        raise BadInput(f"{path} holds an array of shape {images.shape}, not images (n, H, W)")
    partner = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1"))
    places = [partner, partner.with_name(partner.name.removesuffix(".gz")), partner.with_name(partner.name + ".gz")]
    labels = next((read_idx(p) for p in places if p != path and p.is_file()), None)
    return images, labels


def open_npy(path: Path) -> tuple[Any, Any]:
    """Images and labels or None of an `.npy`; `images` becomes `labels` in the name of the file of labels."""
    partner = path.with_name(path.name.replace("images", "labels"))
    return read_npy(path), read_npy(partner) if partner != path and partner.is_file() else None


def read_npy(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as e:
        raise BadInput(f"cannot read {path}: {e} (the file may be cut short)") from e


def open_npz(path: Path, split: str | None) -> tuple[Any, Any]:
    """Images and labels, or None, of an `.npz`.

    The arrays are `images` and `labels`, `x` and `y` (or ending in `_train`, `_test`, `_val`), or `arr_0` and `arr_1`.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = archive.files
            tail = "train" if split is None else split
            pairs = [(f"{x}_{tail}", f"{y}_{tail}") for x, y in (("x", "y"), ("images", "labels"))]
            if split in (None, "train"):
                pairs = [("images", "labels"), ("x", "y"), ("arr_0", "arr_1"), *pairs]
            for x, y in pairs:
                if x in keys:
                    return archive[x], archive[y] if y in keys else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise BadInput(f"cannot read {path}: {e} (the file may be cut short)") from e
    raise BadInput(
        f"{path} has no array of images: looked for {', '.join(x for x, _ in pairs)}, found {', '.join(keys)}"
    )


def open_array(images: Any, labels: Any, source: str, size: tuple[int, int] | None, channels: int | None) -> Data:
    """Data of a NumPy array (n, H, W), (n, H, W, C) or (n, C, H, W), uint8 or floats in [-1, 1] (rounded to 8 bits)."""
    import numpy as np
    from PIL import Image

    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3):
        images = np.moveaxis(images, -1, 1)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise BadInput(f"{source}: images must be (n, H, W, C) or (n, C, H, W) with C of 1 or 3, got {images.shape}")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise BadInput(f"{source}: images must be uint8, or floats in [-1, 1], got {images.dtype}")
    stored = int(images.shape[1])
    c, (h, w) = channels or stored, size or images.shape[2:]

    def fetch(indices: list[int]) -> Tensor:
        whole = len(indices) == len(images) and indices == list(range(len(images)))
        chosen = np.asarray(images if whole else images[indices])
        if chosen.dtype != np.uint8:
            if not (np.abs(chosen) <= 1.001).all():
                raise BadInput(
                    f"{source}: float images must lie in [-1, 1], found {chosen.min():.4g} to {chosen.max():.4g}"
                )
            chosen = np.rint(127.5 * (chosen.astype(np.float32) + 1)).clip(0, 255).astype(np.uint8)
        if (h, w) != chosen.shape[2:] or c != stored:
            pictures = (Image.fromarray(a[0] if stored == 1 else np.moveaxis(a, 0, -1)) for a in chosen)
            chosen = np.stack([np.array(crop(p.convert("L" if c == 1 else "RGB"), h, w)) for p in pictures])
            chosen = chosen[:, None] if c == 1 else np.moveaxis(chosen, -1, 1)
        return torch.from_numpy(np.array(chosen))

    if not len(images):
        raise BadInput(f"{source} holds no images")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.size != len(labels)):
        raise BadInput(f"{source}: labels must be integers (n,), got {labels.dtype} {labels.shape}")
    targets = None if labels is None else torch.from_numpy(np.array(labels, np.int64).reshape(-1))
    if len(images) * c * h * w <= MEMORY:
        return Data.of(fetch(list(range(len(images)))), targets, None, source)
    targets, classes = checked_labels(targets, None, len(images), source)
    return Data(len(images), (c, h, w), fetch, targets, classes, source, lazy=True)
