"""Training data: `open_data` opens a folder, zip or array, `Batches` iterates over it in a reproducible order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, check_choice
from .arrays import open_array, open_npz
from .folders import SPLITS, file_tree, folder_tree, open_tree, zip_tree
from .labels import MAYBE
from .messages import join_names, pluralize, print_once
from .sources import Data, find_idx, open_idx, open_npy
from .tree import SUFFIXES

__all__ = ["Batches", "Data", "open_data", "to_float"]


FLIP_SEED_OFFSET = 2_654_435_769  # keeps the seeds of flips apart from those of epochs; CPU seeds repeat after 2**32


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: `x / 127.5 - 1`. Tensors of a floating type are only cast to float32."""
    if images.is_floating_point():
        return images.float()
    return images.float().div_(127.5).sub_(1.0)


def open_data(
    path: str | Path,
    split: str | None = "train",
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    label: str | None = None,
    report: bool = True,
    caption: str | None = None,
) -> Data:
    """Open the images, and labels and captions if any, of a path:

    - a folder or a zip of images, or one image. Labels come from a file next to them, or from class sub-folders:
      `labels.csv` (a column such as `file` or `filename`, and one such as `label` or `class`; separated by `,` `;` or
      a tab), `metadata.csv` or `metadata.jsonl` (`file_name` and `label`), `dataset.json` of the StyleGAN and EDM tools
      (`{"labels": [[file, class], ...]}`). Both must agree. Captions come from a column `text`, `caption` or `prompt`
      of the same metadata files, or from a `.txt` beside each image. Sub-folders `train`, `test`, `val` are splits;
    - a folder of IDX files under their usual names (`train-images-idx3-ubyte`, gzipped or not), or one such file;
    - `.npy` or `.npz` (`images`, `labels`; `x_train`, `y_train`; `train_images`, `train_labels`; ...):
      (n, H, W), (n, H, W, C) or (n, C, H, W), C = 1 or 3. Their value range is detected from the whole array, see
      `arrays.detect_value_range`: uint8, floats in [-1, 1], [0, 1] or 0..255, booleans, integers 0..255, 16 bits.

    Images are decoded at once, and an unreadable one is an error; above 1 GiB they are decoded on demand, and an
    unreadable one is replaced by the next of its class, with a message.

    Args:
        path: of the data.
        split: `train` (all images if the source has no splits), `test`, `val`, or None for all of a folder.
        size: side or (height, width) in pixels: images are center-cropped and resized. Required if their sizes differ.
        channels: 1 or 3. Default: those of the source.
        label: the column of the label file, or the array of an `.npz`, to use; `folders`: the class folders;
            `none`: no labels.
        report: print on stderr, once, what the data holds and what of it is not used.
        caption: the column of captions of a metadata file; `txt`: the files beside the images; `none`: no captions.
            Default: those that there are, or none, with a message, if they are incomplete or contradict one another.

    Returns:
        The data, with class names and labels, and with captions, if there are any.

    Raises:
        BadInput: in one line that names the file, if something is missing, empty, damaged or inconsistent; if there
            are labels, or captions as requested, that cannot be used; if two sources of them differ.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise BadInput(
            f"data is the path of a folder, zip or array, got {type(path).__name__}: pass images in memory as "
            "hasten.train.Data.of(images), uint8 (n, C, H, W)"
        )
    if not str(path):
        raise BadInput("the path of the data is empty (. is the current folder)")
    path = Path(path)
    if split is not None:
        check_choice("split", split, SPLITS)
    if channels not in (None, 1, 3) or isinstance(channels, bool):
        raise BadInput(f"channels must be 1 or 3, got {channels}")
    pair: tuple[int, int] | None = None
    if size is not None:
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        if len(sides) != 2 or not all(isinstance(s, int) and s > 0 and not isinstance(s, bool) for s in sides):
            raise BadInput(f"size must be a positive side or (height, width), got {size!r}")
        pair = sides
    if not os.path.exists(path):
        raise BadInput(f"there is no file or folder {path}")
    data = _open(path, split, pair, channels, label, caption)
    if caption is not None and caption.lower() != "none" and data.captions is None:
        raise BadInput(f"{path} is an array: captions ({caption}) are those of a folder or a zip of images")
    if report:
        for line in (data.summary, *data.messages, *_unused_files(path, data.labels is not None)):
            print_once(f"{path}: {line}")
    return data


def _unused_files(path: Path, labelled: bool) -> list[str]:
    """Messages about image files, and possible label files, in a folder whose arrays are read."""
    if not path.is_dir() or not (find_idx(path) or (path / "images.npy").is_file()):
        return []
    files = [p.name for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
    names = [name for name in files if name.lower().endswith(SUFFIXES)]
    tables = [n for n in files if MAYBE.search(n) and not n.endswith(".npy") or "idx1" in n and not labelled]
    messages = [f"not used as labels, the arrays are read: {join_names(tables)}"] if tables else []
    if names:
        messages.append(f"the arrays are read, not {pluralize(len(names), 'image')} next to them, such as {names[0]}")
    return messages


def _open(
    path: Path,
    split: str | None,
    pair: tuple[int, int] | None,
    channels: int | None,
    label: str | None,
    caption: str | None,
) -> Data:
    """`open_data` with its arguments checked."""
    if path.is_dir():
        idx = find_idx(path)
        if idx:
            split = split or "train"
            if split not in idx:
                raise BadInput(f"{path} has no IDX file of the split {split!r}: it has {', '.join(idx)}")
            return open_array(*open_idx(idx[split]), str(idx[split]), pair, channels, label)
        if (path / "images.npy").is_file():
            path = path / "images.npy"
        else:
            return open_tree(folder_tree(path), split, pair, channels, label, caption)
    name = path.name.lower()
    if split not in (None, "train") and name.endswith(".npy"):
        raise BadInput(f"{path} is one array and has no split {split!r}")
    if name.endswith(".zip"):
        return open_tree(zip_tree(path), split, pair, channels, label, caption)
    if name.endswith(".npy"):
        images, labels, messages = open_npy(path)
        return open_array(images, labels, str(path), pair, channels, label, messages=messages)
    if name.endswith(".npz"):
        return open_npz(path, split, pair, channels, label)
    if "idx3" in name or name.endswith((".gz", "ubyte")):
        return open_array(*open_idx(path), str(path), pair, channels, label)
    if name.endswith(SUFFIXES):
        return open_tree(file_tree(path), None, pair, channels, None, caption)
    raise BadInput(f"{path} is no source of images: use a folder, a .zip, an IDX file, a .npy or a .npz")


class Batches:
    """An endless sequence of batches; batch k is a function of `(seed, k)` only, so that a run can be resumed.

    Each epoch is a random permutation seeded by `(seed, epoch)`; epochs are concatenated and split into batches, so no
    image is dropped and a batch may span two epochs. A batch is `{"x": float32 (B, C, H, W) in [-1, 1],
    "label": int64 (B,)}`, without `label` if the data has none, with the data's further conditions if it has any.
    `batches[k]` is batch k; iteration starts at `start_step`.

    Args:
        data: the images and labels.
        batch_size: images in a batch over all ranks; a multiple of `world`.
        seed: of the order and the flips.
        start_step: first batch of an iteration, >= 0.
        rank: which of the `world` equal parts of each batch to take, 0 to world - 1.
        world: number of parts.
        flip: mirror each image horizontally with probability 1/2, seeded by `(seed, k)`.

    Raises:
        BadInput: if a number is out of range.
    """

    def __init__(
        self,
        data: Data,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        flip: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise BadInput(
                f"batch_size must be a positive multiple of the {world} processes (times accumulate), got {batch_size}"
            )
        if not 0 <= rank < world or start_step < 0:
            raise BadInput(f"rank must lie in 0..{world - 1} and start_step be 0 or more, got {rank} and {start_step}")
        self.data, self.batch_size, self.seed, self.start_step = data, batch_size, seed, start_step
        self.rank, self.world, self.flip = rank, world, flip
        self._order: tuple[int, Tensor] | None = None

    def _generator(self, k: int) -> torch.Generator:
        """A generator seeded by `(seed, k)`."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + k) % 2**63)

    def shard(self, rank: int, world: int) -> Batches:
        """Batches that are part `rank` of `world` equal parts of these."""
        return Batches(self.data, self.batch_size, self.seed, self.start_step, rank, world, self.flip)

    def _permutation(self, epoch: int) -> Tensor:
        """The order of an epoch, int64 (len(data),)."""
        cached = self._order
        if cached is None or cached[0] != epoch:
            cached = epoch, torch.randperm(len(self.data), generator=self._generator(epoch))
            self._order = cached
        return cached[1]

    def indices(self, step: int) -> Tensor:
        """The indices of the images of batch `step` over all ranks, int64 (batch_size,)."""
        if step < 0:
            raise IndexError(f"batches are counted from 0, got {step}")
        n, parts = len(self.data), []
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        while start < stop:
            epoch, offset = divmod(start, n)
            take = min(n - offset, stop - start)
            parts.append(self._permutation(epoch)[offset : offset + take])
            start += take
        return torch.cat(parts)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Batch `step`."""
        count = self.batch_size // self.world
        part = slice(self.rank * count, (self.rank + 1) * count)
        indices = self.indices(step)[part]
        x = to_float(self.data.images(indices))
        if self.flip:
            mirrored = torch.rand(self.batch_size, generator=self._generator(FLIP_SEED_OFFSET + step))[part] < 0.5
            x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        batch = {"x": x} if self.data.labels is None else {"x": x, "label": self.data.labels[indices]}
        return batch if self.data.conditions is None else {**batch, **self.data.conditions(indices.tolist())}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        step = self.start_step
        while True:
            yield self[step]
            step += 1


class BatchSlices:
    """Batches that are part `rank` of `world` equal parts of `batches`, any object like `Batches`."""

    def __init__(self, batches: Any, rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Batch `step`. Raises BadInput if it cannot be divided evenly."""
        batch = self.batches[step]
        n = min(len(value) for value in batch.values())
        if n % self.world:
            raise BadInput(f"a batch of {n} cannot be divided into {self.world} parts (processes, times accumulate)")
        part = slice(self.rank * n // self.world, (self.rank + 1) * n // self.world)
        return {key: value[part] for key, value in batch.items()}


def shard_batches(batches: Any, rank: int, world: int) -> Any:
    """Part `rank` of `world` equal parts of `batches`, by their own method `shard` if they have one."""
    if world == 1:
        return batches
    return batches.shard(rank, world) if hasattr(batches, "shard") else BatchSlices(batches, rank, world)
