"""Class names: sorting, lookup, and matching the classes of data with those of a model."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput, nearest
from .messages import join_names, print_once
from .sources import Data

__all__ = [
    "class_index",
    "class_of",
    "index_map",
    "label_indices",
    "match_labels",
    "natural_key",
    "normalize_name",
    "split_labels",
]


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key with "2" before "10". The order is total ("01" before "1"), hence the same in every process."""
    key = []
    for part in re.split(r"([0-9]+)", name):
        digits = part.lstrip("0")
        key.append((0, len(digits), digits) if re.fullmatch(r"[0-9]+", part) else (1, 0, part))
    return [one for one in key if one[2] or one[0] == 0], name


def normalize_name(name: str) -> str:
    """The name in Unicode normal form C (some file systems store accents decomposed), stripped."""
    return unicodedata.normalize("NFC", name).strip()


def casefold_name(name: str) -> str:
    """`normalize_name`, case-folded."""
    return normalize_name(name).casefold()


def is_number(name: str) -> bool:
    """Whether a name consists of ASCII digits only."""
    return re.fullmatch(r"[0-9]+", normalize_name(name)) is not None


def find_class(name: str, names: Sequence[str]) -> int | None:
    """The index of a name: an equal one, else one that differs in case only, else the only equal number; or None.

    Raises:
        BadInput: if several names differ from it in case only.
    """
    for key in (normalize_name, casefold_name):
        matches = [k for k, other in enumerate(names) if key(other) == key(name)]
        if key is casefold_name and len(matches) > 1:
            raise BadInput(
                f"class {name!r} could be {' or '.join(names[k] for k in matches)}: write it in its own case"
            )
        if matches:
            return matches[0]
    if is_number(name):
        matches = [k for k, other in enumerate(names) if is_number(other) and number_key(other) == number_key(name)]
        return matches[0] if len(matches) == 1 else None
    return None


def number_key(name: str) -> str:
    """The digits of a number without leading zeros."""
    return normalize_name(name).lstrip("0") or "0"


def class_index(label: Any, classes: Sequence[str], null_label: int | None, owner: str) -> int:
    """The index of a class.

    Args:
        label: a class name in any case, `none` for the null label, or an index (an integer or digits, if no class is
            named by a number).
        classes: the names of the classes.
        null_label: the index of the null label, or None.
        owner: name of the model, for messages.

    Raises:
        BadInput: for an unknown label, with the choices.
    """
    names = list(classes)
    if isinstance(label, str):
        text = normalize_name(label)
    else:
        try:
            if isinstance(label, bool) or type(label).__name__ in ("bool_", "bool"):
                raise TypeError
            text = str(operator.index(label))
        except TypeError:
            raise BadInput(f"unknown label {label!r} for {owner}: it is neither a class name nor an integer") from None
    index = find_class(text, names)
    if index is not None:
        return index
    if text.lower() == "none":
        if null_label is None:
            raise BadInput(f"{owner} was trained without a null label: it needs a class for every image")
        return null_label
    if is_number(text) and len(number_key(text)) < 10 and int(text) < len(names) and not any(map(is_number, names)):
        return int(text)
    if isinstance(label, str) and not is_number(text):
        raise BadInput(f"unknown label {label!r} for {owner}: {nearest(label, names)}")
    choices = names if any(map(is_number, names)) else [f"{k} {name}" for k, name in enumerate(names)]
    raise BadInput(f"unknown label {text} for {owner}: choices: {join_names(choices, 20)}")


def label_indices(n: int, label: Any, classes: Sequence[str], null_label: int | None, owner: str) -> Tensor:
    """The labels of `n` images, int64 (n,).

    Args:
        n: number of images.
        label: None to cycle through the classes; a name or an integer (`class_index`), or a sequence of them to cycle
            through; or a tensor or NumPy array of integers, () or (m,), of indices as the network takes them, the null
            label included.
        classes: the names of the classes.
        null_label: the index of the null label, or None.
        owner: name of the model, for messages.

    Raises:
        BadInput: for unknown labels, indices out of range, or none at all.
    """
    if label is None:
        indices = list(range(len(classes)))
    elif isinstance(label, Tensor) or hasattr(label, "dtype") and getattr(label.dtype, "kind", "") in "iufcb":
        flat = torch.as_tensor(label).reshape(-1) if getattr(label, "ndim", 0) < 2 else None
        if flat is None or flat.is_floating_point() or flat.is_complex() or flat.dtype == torch.bool:
            raise BadInput(f"labels must be integers (m,), got {label.dtype} {tuple(label.shape)}")
        if getattr(label, "ndim", 0) == 0 and not isinstance(label, Tensor):
            indices = [class_index(label, classes, null_label, owner)]  # a NumPy scalar is like an int
        else:
            indices = flat.tolist()
            wrong = next((k for k in indices if not 0 <= k < len(classes) and k != null_label), None)
            if wrong is not None:
                raise BadInput(
                    f"label index {wrong} is not one of {owner}: indices in a tensor are 0 to {len(classes) - 1}"
                    + ("" if null_label is None else f", and {null_label} for no class")
                )
    elif isinstance(label, str):
        indices = [class_index(label, classes, null_label, owner)]
    elif hasattr(label, "__iter__"):
        indices = [class_index(one, classes, null_label, owner) for one in label]
    else:
        indices = [class_index(label, classes, null_label, owner)]
    if not indices:
        raise BadInput("label is an empty list: it needs one class or more")
    return torch.tensor([indices[k % len(indices)] for k in range(n)], dtype=torch.long)


def split_labels(text: str, classes: Sequence[str] | None) -> str | list[str]:
    """Split a comma-separated list of labels. Class names may contain commas; the longest match is taken.

    A text without commas, or that is a class name itself, is returned unchanged.
    """
    known = {casefold_name(name) for name in classes or ()}
    if "," not in text or casefold_name(text) in known:
        return text
    parts, labels = text.split(","), []
    while parts:
        longest = next((k for k in range(len(parts), 1, -1) if casefold_name(",".join(parts[:k])) in known), 1)
        labels.append(",".join(parts[:longest]).strip())
        parts = parts[longest:]
    return labels


def index_map(names: Sequence[str], classes: Sequence[str], source: str, owner: str) -> list[int]:
    """For every class of the data the index of the model's class of that name.

    Names match in any case. Numbers match numbers by value, and are indices if the model's classes are not numbers.
    Classes are never matched by their order or number.

    Args:
        names: the classes of the data.
        classes: the classes of the model.
        source: the data, for messages.
        owner: the model, for messages.

    Raises:
        BadInput: with both lists, if a class is not found or two match the same.
    """
    indices = [find_class(name, classes) for name in names]
    if all(map(is_number, names)) and not any(map(is_number, classes)):
        indices = [int(number_key(name)) if len(number_key(name)) < 10 else None for name in names]
        indices = [k if k is not None and k < len(classes) else None for k in indices]
    unknown = [name for name, k in zip(names, indices, strict=True) if k is None]
    if unknown:
        raise BadInput(
            f"{source} has classes that {owner} does not have: {join_names(unknown)}; classes of the data: "
            f"{join_names(names)}; of {owner}: {join_names(classes)}. Name the folders or labels as the model's classes"
        )
    if len(set(indices)) < len(indices):
        raise BadInput(
            f"{source}: two of its classes, {join_names(names)}, are one class of {owner}: {join_names(classes)}"
        )
    return [k for k in indices if k is not None]


def class_of(index: int, classes: Sequence[str], names: Sequence[str]) -> int | None:
    """The index in `names` of class `index` of `classes`, or None.

    Classes match by name, or by index if all `names` are numbers and none of `classes` is.
    """
    match = find_class(classes[index], names)
    if match is None and all(map(is_number, names)) and not any(map(is_number, classes)):
        match = find_class(str(index), names)
    return match


def match_labels(data: Data, classes: Sequence[str] | None, owner: str, required: bool = True) -> Data:
    """The data with labels that are indices of a model's classes, matched by name (`index_map`).

    Args:
        data: the data. Its labels are dropped if the model has no classes.
        classes: of the model, or None.
        owner: the model, for messages.
        required: data without labels is an error, if the model has classes.

    Raises:
        BadInput: if labels are missing, or classes do not match.
    """

    if classes is None:
        if data.labels is None:
            return data
        print_once(f"{data.source}: its {len(data.classes or ())} classes are not used, {owner} has none")
        return replace(data, labels=None, classes=None)
    if data.labels is None:
        if required:
            raise BadInput(
                f"{owner} has {len(classes)} classes, {data.source} has no labels: it needs images with labels of "
                "these classes"
            )
        print_once(f"{data.source}: no labels, though {owner} has {len(classes)} classes")
        return data
    index = torch.tensor(index_map(data.classes or (), classes, data.source, owner))
    labels = index[data.labels]
    empty = [name for k, name in enumerate(classes) if k not in set(labels.unique().tolist())]
    if empty:
        print_once(
            f"{data.source}: no images of {len(empty)} of the {len(classes)} classes of {owner}: {join_names(empty)}"
        )
    return replace(data, labels=labels, classes=tuple(classes))
