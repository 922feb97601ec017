"""Class names: their order, how one is looked up, and how the classes of data are matched to those of a model."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadInput, nearest
from .notes import listed

if TYPE_CHECKING:
    from .sources import Data

__all__ = ["class_index", "class_of", "index_map", "label_indices", "match_labels", "natural", "normal", "split_labels"]


def natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key with "2" before "10"; a total order, so it is the same in every process: "01" before "1"."""
    key = []
    for part in re.split(r"([0-9]+)", name):
        digits = part.lstrip("0")
        key.append((0, len(digits), digits) if re.fullmatch(r"[0-9]+", part) else (1, 0, part))
    return [one for one in key if one[2] or one[0] == 0], name


def normal(name: str) -> str:
    """Composed accents (some file systems store them apart) and no space around."""
    return unicodedata.normalize("NFC", name).strip()


def folded(name: str) -> str:
    """`normal`, in one case."""
    return normal(name).casefold()


def is_number(name: str) -> bool:
    """Whether a name is ASCII digits alone."""
    return re.fullmatch(r"[0-9]+", normal(name)) is not None


def find(name: str, names: Sequence[str]) -> int | None:
    """The index of a name: the same one, else the only one that differs in case alone, else the only equal number.

    Raises BadInput where several differ in case alone.
    """
    for key in (normal, folded):
        found = [k for k, other in enumerate(names) if key(other) == key(name)]
        if key is folded and len(found) > 1:
            raise BadInput(f"class {name!r} could be {' or '.join(names[k] for k in found)}: give it in its own case")
        if found:
            return found[0]
    if is_number(name):
        found = [k for k, other in enumerate(names) if is_number(other) and value(other) == value(name)]
        return found[0] if len(found) == 1 else None
    return None


def value(name: str) -> str:
    """The digits of a number, without leading zeros."""
    return normal(name).lstrip("0") or "0"


def class_index(label: Any, classes: Sequence[str], null_label: int | None, owner: str) -> int:
    """The index of a class by name (in any case, also where the name is a number), "none": of the null label.

    An integer, or digits, that is no name is an index, but only where no class is named by a number.
    Raises BadInput with the choices otherwise.
    """
    names = list(classes)
    if isinstance(label, str):
        text = normal(label)
    else:
        try:
            if isinstance(label, bool) or type(label).__name__ in ("bool_", "bool"):
                raise TypeError
            text = str(operator.index(label))
        except TypeError:
            raise BadInput(f"unknown label {label!r} for {owner}: it is neither a class name nor an integer") from None
    found = find(text, names)
    if found is not None:
        return found
    if text.lower() == "none":
        if null_label is None:
            raise BadInput(f"{owner} was trained without a null label: it needs a class for every image")
        return null_label
    if is_number(text) and len(value(text)) < 10 and int(text) < len(names) and not any(map(is_number, names)):
        return int(text)
    if isinstance(label, str) and not is_number(text):
        raise BadInput(f"unknown label {label!r} for {owner}: {nearest(label, names)}")
    choices = names if any(map(is_number, names)) else [f"{k} {name}" for k, name in enumerate(names)]
    raise BadInput(f"unknown label {text} for {owner}: choices: {listed(choices, 20)}")


def label_indices(n: int, label: Any, classes: Sequence[str], null_label: int | None, owner: str) -> Tensor:
    """Labels of `n` images, (n,) int64.

    label: None: classes in turn. A name or an integer (`class_index`), or a sequence of them, taken in turn. A tensor
        or a NumPy array of integers, () or (m,): indices as the network takes them, the null label included.
    """
    if label is None:
        chosen = list(range(len(classes)))
    elif isinstance(label, Tensor) or hasattr(label, "dtype") and getattr(label.dtype, "kind", "") in "iufcb":
        given = torch.as_tensor(label).reshape(-1) if getattr(label, "ndim", 0) < 2 else None
        if given is None or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise BadInput(f"labels must be integers (m,), got {label.dtype} {tuple(label.shape)}")
        if getattr(label, "ndim", 0) == 0 and not isinstance(label, Tensor):
            chosen = [class_index(label, classes, null_label, owner)]  # a NumPy number is as an int
        else:
            chosen = given.tolist()
            wrong = next((k for k in chosen if not 0 <= k < len(classes) and k != null_label), None)
            if wrong is not None:
                raise BadInput(
                    f"label index {wrong} is not one of {owner}: indices in a tensor are 0 to {len(classes) - 1}"
                    + ("" if null_label is None else f", and {null_label} for no class")
                )
    elif isinstance(label, str):
        chosen = [class_index(label, classes, null_label, owner)]
    elif hasattr(label, "__iter__"):
        chosen = [class_index(one, classes, null_label, owner) for one in label]
    else:
        chosen = [class_index(label, classes, null_label, owner)]
    if not chosen:
        raise BadInput("label is an empty list: give one class or more")
    return torch.tensor([chosen[k % len(chosen)] for k in range(n)], dtype=torch.long)


def split_labels(text: str, classes: Sequence[str] | None) -> str | list[str]:
    """A comma-separated list of labels as its entries; a class name may hold commas itself, the longest name wins.

    A text without commas, and one that is a class name as a whole, comes back as it is.
    """
    known = {folded(name) for name in classes or ()}
    if "," not in text or folded(text) in known:
        return text
    parts, chosen = text.split(","), []
    while parts:
        longest = next((k for k in range(len(parts), 1, -1) if folded(",".join(parts[:k])) in known), 1)
        chosen.append(",".join(parts[:longest]).strip())
        parts = parts[longest:]
    return chosen


def index_map(names: Sequence[str], classes: Sequence[str], source: str, owner: str) -> list[int]:
    """For every class of the data the index of the model's class of that name.

    Names match in any case. Numbers match numbers by value, and are indices where the model's classes have other names.
    Raises BadInput with both lists otherwise: classes are never matched by their order or count.
    """
    found = [find(name, classes) for name in names]
    if all(map(is_number, names)) and not any(map(is_number, classes)):
        found = [int(value(name)) if len(value(name)) < 10 else None for name in names]
        found = [k if k is not None and k < len(classes) else None for k in found]
    lost = [name for name, k in zip(names, found, strict=True) if k is None]
    if lost:
        raise BadInput(
            f"{source} has classes that {owner} does not have: {listed(lost)}; classes of the data: {listed(names)}; "
            f"of {owner}: {listed(classes)}. Name the folders or labels as the model's classes"
        )
    if len(set(found)) < len(found):
        raise BadInput(f"{source}: two of its classes, {listed(names)}, are one class of {owner}: {listed(classes)}")
    return [k for k in found if k is not None]


def class_of(index: int, classes: Sequence[str], names: Sequence[str]) -> int | None:
    """The class among `names` that is class `index` of `classes`: by name, or by index where all `names` are numbers
    and none of `classes` is."""
    found = find(classes[index], names)
    if found is None and all(map(is_number, names)) and not any(map(is_number, classes)):
        found = find(str(index), names)
    return found


def match_labels(data: Data, classes: Sequence[str] | None, owner: str, required: bool = True) -> Data:
    """Data with its labels as indices of the model's `classes`, matched by name (`index_map`).

    A model without classes gets no labels. Data without labels: refused if `required`, else they stay so.
    """
    from dataclasses import replace

    from .notes import note

    if classes is None:
        if data.labels is None:
            return data
        note(f"{data.source}: its {len(data.classes or ())} classes are not used, {owner} has none")
        return replace(data, labels=None, classes=None)
    if data.labels is None:
        if required:
            raise BadInput(
                f"{owner} has {len(classes)} classes, {data.source} has no labels: images are needed with the labels "
                "that the model knows"
            )
        note(f"{data.source}: no labels, though {owner} has {len(classes)} classes")
        return data
    index = torch.tensor(index_map(data.classes or (), classes, data.source, owner))
    labels = index[data.labels]
    empty = [name for k, name in enumerate(classes) if k not in set(labels.unique().tolist())]
    if empty:
        note(f"{data.source}: no images of {len(empty)} of the {len(classes)} classes of {owner}: {listed(empty)}")
    return replace(data, labels=labels, classes=tuple(classes))
