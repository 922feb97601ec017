"""The images of a folder, zip or array as they are, of any sizes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..errors import BadInput
from .data import open_data
from .decode import decode, readable_suffixes
from .folders import choose_split, folder_tree, read_headers, zip_tree
from .sources import MEMORY, find_idx

__all__ = ["AnySize", "open_any_size"]


@dataclass(frozen=True)
class AnySize:
    """Images of several sizes: `read(k)` gives number k as uint8 (C, H, W).

    Args:
        sizes: (H, W) of each.
        channels: of all.
        read: decodes an image, or has it in memory.
        names: their files; of an array numbers.
        source: the path, for messages.
        messages: what else is there and not used.
    """

    sizes: list[tuple[int, int]]
    channels: int
    read: Callable[[int], Tensor] = field(repr=False)
    names: list[str] = field(default_factory=list, repr=False)
    source: str = ""
    messages: tuple[str, ...] = ()

    def __len__(self) -> int:
        """The number of images."""
        return len(self.sizes)

    def only(self, rows: list[int]) -> AnySize:
        """Some of the images."""
        sizes, names = [self.sizes[k] for k in rows], [self.names[k] for k in rows]
        return AnySize(sizes, self.channels, lambda k: self.read(rows[k]), names, self.source, self.messages)


def open_any_size(path: str | Path, split: str | None = "train", channels: int | None = None) -> AnySize:
    """The images of a path, as `open_data` finds them, without labels and captions; those of files are decoded when
    they are read, and the last ones kept.

    Args:
        path: as `open_data` takes it.
        split: as `open_data` takes it.
        channels: 1 or 3. Default: those of the images.

    Raises:
        BadInput: as `open_data`.
    """
    path = Path(path)
    name = path.name.lower()
    is_tree = name.endswith(".zip") or path.is_dir() and not (find_idx(path) or (path / "images.npy").is_file())
    if not is_tree or not path.exists():
        data = open_data(path, split, channels=channels, label="none", caption="none")
        size, names = (data.shape[1], data.shape[2]), data.files or tuple(map(str, range(len(data))))
        read = lambda k: data.images([k])[0]  # noqa: E731
        return AnySize([size] * len(data), data.shape[0], read, list(names), data.source)
    tree = zip_tree(path) if name.endswith(".zip") else folder_tree(path)
    suffixes = readable_suffixes()
    files = [name for name in tree.names if name.lower().endswith(suffixes)]
    if not files:
        raise BadInput(f"{path} holds no images (looked for {', '.join(suffixes)})")
    parts, messages = choose_split(tree, files, split)
    files = [name for _, part in parts for name in part]
    headers = read_headers(tree, files)
    depth = channels or (1 if all(one.grey for one in headers) else 3)
    sizes = [(one.height, one.width) for one in headers]
    read = keep_read(lambda k: decode(tree, files[k], (depth, *sizes[k]), False), [depth * h * w for h, w in sizes])
    return AnySize(sizes, depth, read, files, str(path), (*tree.messages, *messages))


def keep_read(read: Callable[[int], Tensor], sizes: list[int]) -> Callable[[int], Tensor]:
    """`read` with the last results kept, up to `MEMORY` bytes. sizes: in bytes, of each result."""
    kept: OrderedDict[int, Tensor] = OrderedDict()
    lock, used = threading.Lock(), 0

    def get(k: int) -> Tensor:
        nonlocal used
        if (found := kept.get(k)) is not None:
            return found
        image = read(k)
        with lock:
            if k not in kept:
                kept[k] = image
                used += sizes[k]
            while used > MEMORY and len(kept) > 1:
                oldest, _ = kept.popitem(last=False)
                used -= sizes[oldest]
        return image

    return get
