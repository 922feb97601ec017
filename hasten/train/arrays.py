"""Images and labels in NumPy arrays: which of an .npz they are, the range of values, the form of labels."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from . import sources
from .names import natural, normal
from .notes import listed
from .sources import LABELS, Data, checked_labels, crop

PAIRS = (("images", "labels"), ("x", "y"), ("image", "label"), ("data", "labels"), ("images", "y"), ("x", "labels"),
         ("images", "targets"), ("data", "targets"), ("data", "y"), ("images", "label"))  # fmt: skip
NAMES = ("class_names", "label_names", "names", "classes")
SPLITS = {"train": ("train", "training"), "test": ("test",), "val": ("val", "valid", "validation")}
CHUNK = 2**26  # values that are looked at once


def open_npz(
    path: Path, split: str | None, size: tuple[int, int] | None, channels: int | None, label: str | None
) -> Data:
    """Data of an `.npz`.

    The arrays are `images` and `labels`, `x` and `y` (or with the split before or after: `x_train`, `train_images`), or
    `arr_0` and `arr_1`; `class_names` names the classes. label: the array of labels. Arrays that are not used are
    named; one that looks like labels of these images is refused.
    """
    import numpy as np

    label = label.lower() if label and label.lower() == "none" else label
    try:
        if not zipfile.is_zipfile(path) and path.read_bytes()[:6] == b"\x93NUMPY":
            raise BadInput(f"{path} is one array, not an .npz: name it .npy")
        with np.load(path, allow_pickle=False) as archive:
            keys = {key.lower(): key for key in archive.files}
            if len(keys) < len(archive.files):
                lost = next(key for key in archive.files if key not in keys.values())
                raise BadInput(f"{path}: the arrays {lost!r} and {keys[lost.lower()]!r} differ in capitals alone")
            x, y = image_key(keys, split, path)
            images = archive[keys[x]]
            if label not in (None, "none", "folders"):
                if label not in archive.files:
                    raise BadInput(f"{path} has no array {label!r} (arrays: {', '.join(archive.files)})")
                y = label.lower()
            others = {key: archive[keys[key]] for key in keys if key != x and small(archive, keys[key])}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as e:
        if isinstance(e, BadInput):
            raise
        reason = (
            "it holds Python objects, not numbers" if "llow_pickle" in str(e) else f"{e} (the file may be cut short)"
        )
        raise BadInput(f"cannot read {path}: {reason}") from e
    others = {key: np.char.decode(a, "utf-8") if a.dtype.kind == "S" else a for key, a in others.items()}
    labels = None if label == "none" else others.get(y or "")
    if labels is not None and y == "arr_1" and not looks_like_labels(labels, len(images), "labels"):
        labels = None
    named = next((key for key in NAMES if key in others and key != y and others[key].dtype.kind == "U"), None)
    names = None if named is None or labels is None else others[named].reshape(-1)
    if names is not None and len(names) == len(images) != 1 + max_label(labels) and named == "names":
        names = None  # of the images
    used = {x, *([y] if labels is not None else []), *([named] if names is not None else [])}
    notes = []
    if label is None and labels is None:
        doubt = [k for k, a in others.items() if k not in used and looks_like_labels(a, len(images), k)]
        doubt = [k for k in doubt if not any(k.startswith(f"{s}_") or k.endswith(f"_{s}") for s in other_splits(split))]
        if doubt:
            raise BadInput(
                f"{path}: the array {keys[doubt[0]]!r} could hold labels and is not named labels: give label, the one "
                "to use, or 'none'"
            )
    unused = [keys[key] for key in keys if key not in used]
    if unused:
        notes.append(f"arrays not used: {listed(unused)}")
    if names is not None and labels is not None and len(names) < 1 + max_label(labels):
        notes.append(f"{len(names)} class names do not fit the labels, and are not used")
        names = None
    return open_array(images, labels, str(path), size, channels, None, names, notes)


def small(archive: Any, key: str) -> bool:
    """Whether an array is read to see what it is: those with few values, which labels and names have."""
    member = archive.zip.getinfo(f"{key}.npy" if f"{key}.npy" in archive.zip.namelist() else key)
    return member.file_size < 2**28


def other_splits(split: str | None) -> Iterable[str]:
    """The names of the splits that were not asked for."""
    return [name for kind, names in SPLITS.items() if kind != (split or "train") for name in names]


def image_key(keys: dict[str, str], split: str | None, path: Path) -> tuple[str, str | None]:
    """The keys, in lower case, of the images of a split and of their labels."""
    tails = SPLITS[split or "train"]
    pairs = []
    for x, y in PAIRS:
        for tail in tails:
            pairs += [(f"{x}_{tail}", f"{y}_{tail}"), (f"{tail}_{x}", f"{tail}_{y}")]
    if split in (None, "train"):
        pairs = [*PAIRS, ("arr_0", "arr_1"), *pairs]
    for x, y in pairs:
        if x in keys and y in keys:
            return x, y
    for x, _ in pairs:
        if x in keys:
            return x, None
    raise BadInput(
        f"{path} has no array of images: looked for {', '.join(dict.fromkeys(x for x, _ in pairs))}, found "
        f"{', '.join(keys.values()) or 'none'}"
    )


def looks_like_labels(array: Any, n: int, name: str) -> bool:
    """Whether an array may hold the labels of n images: (n,) or (n, 1), of values that repeat, or by its name."""
    import numpy as np

    if not array.ndim or len(array) != n or array.ndim > 2 or array.dtype.kind not in "iubUf":
        return False
    if LABELS.search(name):
        return True
    return array.size == n and array.dtype.kind in "iubU" and len(np.unique(array)) <= max(n // 2, 1)


def max_label(labels: Any) -> int:
    """The largest label; -1 where they are no integers."""
    return int(labels.max()) if labels.dtype.kind in "iu" and labels.size else -1


def label_array(labels: Any, n: int, source: str, names: Sequence[str] | None) -> tuple[Tensor, Any, list[str]]:
    """Labels as integers (n,), the class names or None, and notes.

    (n,) or (n, 1): integers, booleans, or floats that are whole; names, which are put in order. (n, K) with one 1 in
    each row: the column of it. Integers from 1 on, without a 0, keep their numbers as names.
    """
    import numpy as np

    notes: list[str] = []
    if not labels.ndim:
        raise BadInput(f"{source}: labels must be integers (n,), got a single {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "iufb" and len(labels) == n:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()):
            raise BadInput(f"{source}: labels must be integers (n,) or one-hot, got {labels.dtype} {labels.shape}")
        labels = labels.argmax(1)
        notes.append("one-hot labels are read as the index of their 1")
    if labels.dtype.kind == "U" and labels.size == len(labels):
        words = [normal(word) for word in labels.reshape(-1).tolist()]
        classes = tuple(sorted(set(words), key=natural))
        return torch.tensor([classes.index(word) for word in words]), classes, notes
    whole = labels.dtype.kind in "iub" or labels.dtype.kind == "f" and np.isfinite(labels).all()
    if not whole or labels.ndim > 2 or labels.size != len(labels) or not (labels == np.floor(labels)).all():
        raise BadInput(f"{source}: labels must be integers (n,), got {labels.dtype} {labels.shape}")
    if labels.size and float(labels.max()) >= 2**63:
        raise BadInput(f"{source}: labels run to {labels.max()}; they must be 0..K-1 for K classes")
    out = torch.from_numpy(np.array(labels, np.int64).reshape(-1))
    if names is not None and len({normal(str(name)) for name in names}) < len(names):
        raise BadInput(f"{source}: two classes have one name: {listed(names)}")
    if names is not None:
        return out, tuple(map(str, names)), notes
    if len(out) == n and n and int(out.min()) == 1 and int(out.max()) <= 10_000:
        high = int(out.max())
        notes.append(f"labels run from 1 to {high}: the classes are named 1 to {high}")
        return out - 1, tuple(str(k) for k in range(1, high + 1)), notes
    return out, None, notes


def value_range(images: Any, source: str) -> tuple[str, list[str]]:
    """How the values of an array become 8 bits, found from all of them, and notes.

    "bytes": uint8, or integers within 0..255. "bits": booleans. "deep": uint16 with values of 4096 and more, the upper
    8 bits. "signed": floats in [-1, 1] of which some are negative. "unit": floats in [0, 1]. "wide": floats in 0..255,
    with up to .5 of overshoot, of which some exceed 16. Anything else is refused, integers 0 and 1 among it.
    """
    import numpy as np

    kind = images.dtype
    if kind == np.uint8 and images.size > sources.MEMORY:
        return "bytes", []
    if kind.kind == "b":
        return "bits", ["booleans are read as black and white"]
    if kind.kind not in "iuf":
        raise BadInput(f"{source}: images must be uint8, or floats in [-1, 1], got {kind}")
    low, high = float("inf"), float("-inf")
    step = max(1, CHUNK // max(1, images[0].size))
    for first in range(0, len(images), step):
        part = np.asarray(images[first : first + step])
        if kind.kind == "f" and not np.isfinite(part).all():
            raise BadInput(f"{source}: float images must lie in [-1, 1], found NaN or infinity")
        low, high = min(low, float(part.min())), max(high, float(part.max()))
    span = f"{low:.4g} to {high:.4g}"
    if kind.kind in "iu":
        if low >= 0 and high == 1:
            raise BadInput(f"{source}: {kind} images hold 0 and 1 alone: give booleans, or 0 and 255")
        if low >= 0 and high <= 255:
            return "bytes", [] if kind == np.uint8 else [f"{kind} images are read as 0..255"]
        if kind.newbyteorder("=") == np.uint16 and high >= 4096:
            return "deep", ["16-bit images are reduced to 8 bits"]
        raise BadInput(f"{source}: images must be uint8, or floats in [-1, 1], got {kind} from {span}")
    if low < 0 and low >= -1.001 and high <= 1.001:
        pale = low > -0.75 and high < 0.75
        return "signed", [f"{kind} images from {span} are read as [-1, 1]"] if pale else []
    if low >= 0 and high <= 1.001:
        return "unit", [f"{kind} images from {span} are read as [0, 1]"]
    if low >= -0.5 and 16 < high <= 255.5:
        return "wide", [f"{kind} images from {span} are read as 0..255"]
    raise BadInput(f"{source}: float images must lie in [-1, 1], [0, 1] or 0..255, found {span}")


def to_bytes(images: Any, rule: str) -> Any:
    """Values as uint8 by a rule of `value_range`."""
    import numpy as np

    if rule == "bytes":
        return images.astype(np.uint8, copy=False)
    if rule == "bits":
        return images.astype(np.uint8) * 255
    if rule == "deep":
        return (images >> 8).astype(np.uint8)
    x = images.astype(np.float32)
    scaled = {"signed": lambda: 127.5 * (x + 1), "unit": lambda: 255 * x, "wide": lambda: x}[rule]()
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def open_array(
    images: Any,
    labels: Any,
    source: str,
    size: tuple[int, int] | None,
    channels: int | None,
    label: str | None = None,
    names: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> Data:
    """Data of a NumPy array (n, H, W), (n, H, W, C) or (n, C, H, W), brought to 8 bits as `value_range` says.

    label: "none" drops the labels; other names are refused, as an array has no columns.
    """
    import numpy as np
    from PIL import Image

    if label is not None and label.lower() != "none":
        raise BadInput(f"{source} has no column {label!r}: it is an array")
    given = images.shape
    if images.ndim == 3:
        if given[-1] in (3, 4) and given[1] > 4:
            raise BadInput(f"{source}: images must be (n, H, W, C) or (n, C, H, W), {given} is one: give (1, H, W, C)")
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3):
        images = np.moveaxis(images, -1, 1)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise BadInput(f"{source}: images must be (n, H, W, C) or (n, C, H, W) with C of 1 or 3, got {given}")
    if not images.size:
        raise BadInput(f"{source} holds no images")
    rule, more = value_range(images, source)
    notes = [*notes, *more]
    stored = int(images.shape[1])
    c, (h, w) = channels or stored, size or images.shape[2:]

    def fetch(indices: list[int]) -> Tensor:
        whole = len(indices) == len(images) and indices == list(range(len(images)))
        chosen = to_bytes(np.asarray(images if whole else images[indices]), rule)
        if (h, w) != chosen.shape[2:] or c != stored:
            pictures = (Image.fromarray(a[0] if stored == 1 else np.moveaxis(a, 0, -1)) for a in chosen)
            chosen = np.stack([np.array(crop(p.convert("L" if c == 1 else "RGB"), h, w)) for p in pictures])
            chosen = chosen[:, None] if c == 1 else np.moveaxis(chosen, -1, 1)
        return torch.from_numpy(np.array(chosen))

    targets, classes = None, None
    if labels is not None and label is None:
        targets, classes, more = label_array(labels, len(images), source, names)
        notes += more
    targets, classes = checked_labels(targets, classes, len(images), source)
    if targets is not None and classes is not None:
        empty = sorted(set(range(len(classes))) - set(targets.unique().tolist()))
        if empty:
            notes.append(f"no images of {len(empty)} of {len(classes)} classes: {listed(classes[k] for k in empty)}")
    details: dict[str, Any] = {"origin": "" if targets is None else "labels", "notes": tuple(notes)}
    if len(images) * c * h * w <= sources.MEMORY:
        return Data.of(fetch(list(range(len(images)))), targets, classes, source, **details)
    return Data(len(images), (c, h, w), fetch, targets, classes, source, lazy=True, **details)
