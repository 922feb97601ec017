"""Images and labels in NumPy arrays: the arrays of an .npz, value ranges, forms of labels."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput
from . import sources
from .messages import join_names
from .names import natural_key, normalize_name
from .sources import LABELS, Data, center_crop, check_labels

# Names of the arrays of images and labels, in order of preference.
PAIRS = (("images", "labels"), ("x", "y"), ("image", "label"), ("data", "labels"), ("images", "y"), ("x", "labels"),
         ("images", "targets"), ("data", "targets"), ("data", "y"), ("images", "label"))  # fmt: skip
CLASS_NAMES = ("class_names", "label_names", "names", "classes")
SPLITS = {"train": ("train", "training"), "test": ("test",), "val": ("val", "valid", "validation")}
CHUNK = 2**26  # values examined at a time


def open_npz(
    path: Path, split: str | None, size: tuple[int, int] | None, channels: int | None, label: str | None
) -> Data:
    """Data of an `.npz`.

    The arrays are `images` and `labels`, `x` and `y` (or with the split as prefix or suffix: `x_train`,
    `train_images`), or `arr_0` and `arr_1`; `class_names` names the classes.

    Args:
        path: of the file.
        split: `train`, `test`, `val` or None.
        size: (height, width) in pixels, or None for that of the arrays.
        channels: 1, 3 or None for those of the arrays.
        label: the array of labels; `none` for no labels.

    Raises:
        BadInput: if the file cannot be read, has no images, or has an unused array that looks like their labels.
    """
    label = label.lower() if label and label.lower() == "none" else label
    try:
        if not zipfile.is_zipfile(path) and path.read_bytes()[:6] == b"\x93NUMPY":
            raise BadInput(f"{path} is one array, not an .npz: name it .npy")
        with np.load(path, allow_pickle=False) as archive:
            keys = {key.lower(): key for key in archive.files}
            if len(keys) < len(archive.files):
                hidden = next(key for key in archive.files if key not in keys.values())
                raise BadInput(f"{path}: the arrays {hidden!r} and {keys[hidden.lower()]!r} differ in case only")
            x, y = image_key(keys, split, path)
            images = archive[keys[x]]
            if label not in (None, "none", "folders"):
                if label not in archive.files:
                    raise BadInput(f"{path} has no array {label!r} (arrays: {', '.join(archive.files)})")
                y = label.lower()
            others = {key: archive[keys[key]] for key in keys if key != x and is_small(archive, keys[key])}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as e:
        if isinstance(e, BadInput):
            raise
        reason = (
            "it holds Python objects, not numbers" if "llow_pickle" in str(e) else f"{e} (the file may be truncated)"
        )
        raise BadInput(f"cannot read {path}: {reason}") from e
    others = {key: np.char.decode(a, "utf-8") if a.dtype.kind == "S" else a for key, a in others.items()}
    labels = None if label == "none" else others.get(y or "")
    if labels is not None and y == "arr_1" and not looks_like_labels(labels, len(images), "labels"):
        labels = None
    names_key = next((key for key in CLASS_NAMES if key in others and key != y and others[key].dtype.kind == "U"), None)
    names = None if names_key is None or labels is None else others[names_key].reshape(-1)
    if names is not None and len(names) == len(images) != 1 + max_label(labels) and names_key == "names":
        names = None  # they are names of the images
    used = {x, *([y] if labels is not None else []), *([names_key] if names is not None and names_key else [])}
    messages = []
    if label is None and labels is None:
        doubtful = [k for k, a in others.items() if k not in used and looks_like_labels(a, len(images), k)]
        other = other_splits(split)
        doubtful = [k for k in doubtful if not any(k.startswith(f"{s}_") or k.endswith(f"_{s}") for s in other)]
        if doubtful:
            raise BadInput(
                f"{path}: the array {keys[doubtful[0]]!r} could hold labels and is not named labels: set label to the "
                "array to use, or 'none'"
            )
    unused = [keys[key] for key in keys if key not in used]
    if unused:
        messages.append(f"arrays not used: {join_names(unused)}")
    if names is not None and labels is not None and len(names) < 1 + max_label(labels):
        messages.append(f"{len(names)} class names do not fit the labels, and are not used")
        names = None
    return open_array(images, labels, str(path), size, channels, None, names, messages)


def is_small(archive: Any, key: str) -> bool:
    """Whether an array has so few values, as labels and names have, that it is read to examine it."""
    member = archive.zip.getinfo(f"{key}.npy" if f"{key}.npy" in archive.zip.namelist() else key)
    return member.file_size < 2**28


def other_splits(split: str | None) -> list[str]:
    """The names of the other splits than `split`."""
    return [name for kind, names in SPLITS.items() if kind != (split or "train") for name in names]


def image_key(keys: dict[str, str], split: str | None, path: Path) -> tuple[str, str | None]:
    """The keys, in lower case, of the images of a split and of their labels, if any."""
    aliases = SPLITS[split or "train"]
    pairs = []
    for x, y in PAIRS:
        for alias in aliases:
            pairs += [(f"{x}_{alias}", f"{y}_{alias}"), (f"{alias}_{x}", f"{alias}_{y}")]
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
    """Whether an array may hold the labels of n images: by its name, or as (n,) or (n, 1) with values that repeat."""
    if not array.ndim or len(array) != n or array.ndim > 2 or array.dtype.kind not in "iubUf":
        return False
    if LABELS.search(name):
        return True
    return array.size == n and array.dtype.kind in "iubU" and len(np.unique(array)) <= max(n // 2, 1)


def max_label(labels: Any) -> int:
    """The largest label; -1 if they are no integers."""
    return int(labels.max()) if labels.dtype.kind in "iu" and labels.size else -1


def parse_labels(labels: Any, n: int, source: str, names: Sequence[str] | None) -> tuple[Tensor, Any, list[str]]:
    """Convert an array of labels to integers.

    Args:
        labels: (n,) or (n, 1): integers, booleans or floats of integral value, or names, whose classes are sorted;
            (n, K): one-hot. Integers from 1 on, without a 0, become the names of the classes.
        n: number of images.
        source: for messages.
        names: of the classes, or None.

    Returns:
        Labels int64 (n,), the class names or None, and messages.

    Raises:
        BadInput: for labels of another form or range, or equal class names.
    """
    messages: list[str] = []
    if not labels.ndim:
        raise BadInput(f"{source}: labels must be integers (n,), got a single {labels.dtype}")
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "iufb" and len(labels) == n:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()):
            raise BadInput(f"{source}: labels must be integers (n,) or one-hot, got {labels.dtype} {labels.shape}")
        labels = labels.argmax(1)
        messages.append("one-hot labels are read as class indices")
    if labels.dtype.kind == "U" and labels.size == len(labels):
        words = [normalize_name(word) for word in labels.reshape(-1).tolist()]
        classes = tuple(sorted(set(words), key=natural_key))
        return torch.tensor([classes.index(word) for word in words]), classes, messages
    integral = labels.dtype.kind in "iub" or labels.dtype.kind == "f" and np.isfinite(labels).all()
    if not integral or labels.ndim > 2 or labels.size != len(labels) or not (labels == np.floor(labels)).all():
        raise BadInput(f"{source}: labels must be integers (n,), got {labels.dtype} {labels.shape}")
    if labels.size and float(labels.max()) >= 2**63:
        raise BadInput(f"{source}: labels run to {labels.max()}; they must be 0..K-1 for K classes")
    out = torch.from_numpy(np.array(labels, np.int64).reshape(-1))
    if names is not None and len({normalize_name(str(name)) for name in names}) < len(names):
        raise BadInput(f"{source}: two classes have one name: {join_names(names)}")
    if names is not None:
        return out, tuple(map(str, names)), messages
    if len(out) == n and n and int(out.min()) == 1 and int(out.max()) <= 10_000:
        high = int(out.max())
        messages.append(f"labels run from 1 to {high}: the classes are named 1 to {high}")
        return out - 1, tuple(str(k) for k in range(1, high + 1)), messages
    return out, None, messages


def detect_value_range(images: Any, source: str) -> tuple[str, list[str]]:
    """Detect the value range of an array, from all its values.

    - `bytes`: uint8, or integers within 0..255
    - `bits`: booleans
    - `deep`: uint16 with values of 4096 or more, of which the upper 8 bits are used
    - `signed`: floats in [-1, 1], some of them negative
    - `unit`: floats in [0, 1]
    - `wide`: floats in 0..255, with up to .5 of overshoot, some of them above 16

    Returns:
        The range, as `scale_to_uint8` takes it, and messages.

    Raises:
        BadInput: for any other range, such as integers 0 and 1 only.
    """
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
        chunk = np.asarray(images[first : first + step])
        if kind.kind == "f" and not np.isfinite(chunk).all():
            raise BadInput(f"{source}: float images must lie in [-1, 1], found NaN or infinity")
        low, high = min(low, float(chunk.min())), max(high, float(chunk.max()))
    span = f"{low:.4g} to {high:.4g}"
    if kind.kind in "iu":
        if low >= 0 and high == 1:
            raise BadInput(f"{source}: {kind} images hold 0 and 1 only: use booleans, or 0 and 255")
        if low >= 0 and high <= 255:
            return "bytes", [] if kind == np.uint8 else [f"{kind} images are read as 0..255"]
        if kind.newbyteorder("=") == np.uint16 and high >= 4096:
            return "deep", ["16-bit images are reduced to 8 bits"]
        raise BadInput(f"{source}: images must be uint8, or floats in [-1, 1], got {kind} from {span}")
    if low < 0 and low >= -1.001 and high <= 1.001:
        narrow = low > -0.75 and high < 0.75
        return "signed", [f"{kind} images from {span} are read as [-1, 1]"] if narrow else []
    if low >= 0 and high <= 1.001:
        return "unit", [f"{kind} images from {span} are read as [0, 1]"]
    if low >= -0.5 and 16 < high <= 255.5:
        return "wide", [f"{kind} images from {span} are read as 0..255"]
    raise BadInput(f"{source}: float images must lie in [-1, 1], [0, 1] or 0..255, found {span}")


def scale_to_uint8(images: Any, value_range: str) -> Any:
    """Scale values of a range of `detect_value_range` to uint8."""
    if value_range == "bytes":
        return images.astype(np.uint8, copy=False)
    if value_range == "bits":
        return images.astype(np.uint8) * 255
    if value_range == "deep":
        return (images >> 8).astype(np.uint8)
    x = images.astype(np.float32)
    scaled = {"signed": lambda: 127.5 * (x + 1), "unit": lambda: 255 * x, "wide": lambda: x}[value_range]()
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def open_array(
    images: Any,
    labels: Any,
    source: str,
    size: tuple[int, int] | None,
    channels: int | None,
    label: str | None = None,
    names: Sequence[str] | None = None,
    messages: Sequence[str] = (),
) -> Data:
    """Data of a NumPy array, converted to 8 bits (`detect_value_range`).

    Args:
        images: (n, H, W), (n, H, W, C) or (n, C, H, W) with C of 1 or 3.
        labels: an array (`parse_labels`), or None.
        source: the path, for messages.
        size: (height, width) in pixels, or None for that of the array.
        channels: 1, 3 or None for those of the array.
        label: `none` drops the labels.
        names: of the classes, or None.
        messages: to add to those of the data.

    Raises:
        BadInput: for arrays of another shape or range, and for another `label`, since an array has no columns.
    """
    from PIL import Image

    if label is not None and label.lower() != "none":
        raise BadInput(f"{source} has no column {label!r}: it is an array")
    shape = images.shape
    if images.ndim == 3:
        if shape[-1] in (3, 4) and shape[1] > 4:
            raise BadInput(f"{source}: images must be (n, H, W, C) or (n, C, H, W), {shape} is one: use (1, H, W, C)")
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3):
        images = np.moveaxis(images, -1, 1)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise BadInput(f"{source}: images must be (n, H, W, C) or (n, C, H, W) with C of 1 or 3, got {shape}")
    if not images.size:
        raise BadInput(f"{source} holds no images")
    value_range, more = detect_value_range(images, source)
    messages = [*messages, *more]
    stored = int(images.shape[1])
    c, (h, w) = channels or stored, size or images.shape[2:]

    def fetch(indices: list[int]) -> Tensor:
        everything = len(indices) == len(images) and indices == list(range(len(images)))
        batch = scale_to_uint8(np.asarray(images if everything else images[indices]), value_range)
        if (h, w) != batch.shape[2:] or c != stored:
            pictures = (Image.fromarray(a[0] if stored == 1 else np.moveaxis(a, 0, -1)) for a in batch)
            batch = np.stack([np.array(center_crop(p.convert("L" if c == 1 else "RGB"), h, w)) for p in pictures])
            batch = batch[:, None] if c == 1 else np.moveaxis(batch, -1, 1)
        return torch.from_numpy(np.array(batch))

    targets, classes = None, None
    if labels is not None and label is None:
        targets, classes, more = parse_labels(labels, len(images), source, names)
        messages += more
    targets, classes = check_labels(targets, classes, len(images), source)
    if targets is not None and classes is not None:
        empty = sorted(set(range(len(classes))) - set(targets.unique().tolist()))
        if empty:
            names_of_empty = join_names(classes[k] for k in empty)
            messages.append(f"no images of {len(empty)} of {len(classes)} classes: {names_of_empty}")
    details: dict[str, Any] = {"origin": "" if targets is None else "labels", "messages": tuple(messages)}
    if len(images) * c * h * w <= sources.MEMORY:
        return Data.of(fetch(list(range(len(images)))), targets, classes, source, **details)
    return Data(len(images), (c, h, w), fetch, targets, classes, source, lazy=True, **details)
