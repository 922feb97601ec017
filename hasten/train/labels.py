"""Where the labels of images come from: a file beside them, or the folders that they lie in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ..errors import BadInput
from . import label_files
from .names import is_number, normal
from .notes import listed

if TYPE_CHECKING:
    from .tree import Tree

# Files that may hold labels, but under other names than those that are read.
MAYBE = re.compile(
    r"\.(csv|tsv|jsonl|parquet)$|(label|class|annotation|meta|synset|target|train|val|test|list).*\.(txt|json|xml|mat|xlsx?|npy)$",
    re.IGNORECASE,
)


def find_labels(
    tree: Tree, parts: list[tuple[str, list[str]]], column: str | None
) -> tuple[dict[str, str] | None, str, set[str], list[str]]:
    """The class of every image or None, where they come from, the files that were read, and notes.

    column: of a file of labels; "folders": the class folders; "none": no labels; None: what there is.
    """
    column = column.lower() if column and column.lower() in ("folders", "none") else column
    names = [name for _, part in parts for name in part]
    if column == "none" or names == [""]:
        return None, "", set(), []
    files = label_places(tree, [prefix for prefix, _ in parts])
    folders = folder_labels(tree, parts, bool(files) or column not in (None, "folders"))
    notes = []
    if column == "folders":
        return folders, "folders", set(), [f"{place} is not used" for place in files]
    read = [label_files.read(tree, place, column) for place in files]
    notes += [line for one in read for line in one.notes]
    giving = [one for one in read if one.labels is not None]
    if column is not None and not giving:
        raise BadInput(f"{tree.root} has no {' or '.join(label_files.TABLES)} to take the column {column!r} from")
    if not giving:
        if folders is None and files:
            folder_labels(tree, parts, False)
        if folders and all(re.fullmatch(r"[0-9]{5,}", name) for name in set(folders.values())):
            shown = listed(sorted(set(folders.values())))
            notes.append(f"the folders {shown} are taken for classes; if they are shards, give label 'none'")
        others = [] if folders else [n for n in tree.names if n not in files and MAYBE.search(PurePosixPath(n).name)]
        if others:
            notes.append(f"{listed(others)} not read: labels are read from {', '.join(label_files.NAMES)}")
        return folders, "folders", {one.place for one in read}, notes
    labels: dict[str, str] = {}
    for one in giving:
        for name, label in (one.labels or {}).items():
            if labels.setdefault(name, label) != label:
                raise BadInput(f"{tree.root}: {' and '.join(g.place for g in giving)} differ: {name} is "
                               f"{labels[name]!r} and {label!r}")  # fmt: skip
    where = tree.where(giving[0].place)
    missing = [name for name in names if name not in labels]
    if missing:
        raise BadInput(f"{where}: {len(names)} images but no label for {len(missing)} of them, such as {missing[0]}")
    if folders is not None and column is None:
        notes += check_against_folders(where, labels, folders)
    origin = " and ".join(one.place for one in giving)
    return {name: labels[name] for name in names}, origin, {one.place for one in read}, notes


def label_places(tree: Tree, prefixes: Sequence[str]) -> list[str]:
    """The files of labels in the folders of the images and in those above them."""
    places: dict[str, None] = {}
    by_lower = {name.lower(): name for name in tree.names}
    for prefix in prefixes:
        above = [prefix, *(f"{parent}/" if str(parent) != "." else "" for parent in PurePosixPath(prefix).parents)]
        for folder in dict.fromkeys(above):
            for name in label_files.NAMES:
                if (folder + name).lower() in by_lower:
                    places[by_lower[(folder + name).lower()]] = None
    return list(places)


def folder_labels(tree: Tree, parts: list[tuple[str, list[str]]], lenient: bool) -> dict[str, str] | None:
    """The class of an image is the first folder of its name after the prefix; None where there are not two of them.

    lenient: loose images beside class folders are no error, as labels come from elsewhere.
    """
    labels: dict[str, str] = {}
    loose = []
    for prefix, names in parts:
        for name in names:
            inner = PurePosixPath(name[len(prefix) :]).parts
            if len(inner) == 1:
                loose.append(name)
            else:
                labels[name] = normal(inner[0])
    classes = set(labels.values())
    if labels and loose and not lenient and (len(parts) == 1):
        raise BadInput(f"{tree.root} holds class folders and loose images as well ({loose[0]}): sort it into a class")
    return None if loose or len(classes) < 2 else labels


def check_against_folders(where: str, labels: dict[str, str], folders: dict[str, str]) -> list[str]:
    """Notes on class folders that a file of labels stands beside; BadInput where the two do not say the same.

    They do where every image's folder bears the name of its label. Folders that are numbers, none of them a label, are
    shards; folders and labels that are in one-to-one correspondence are one set of classes, named by the file.
    """
    both = [(labels[name], normal(folders[name])) for name in folders if name in labels]
    if all(label.casefold() == folder.casefold() for label, folder in both):
        return []
    named, kept = {label.casefold() for label, _ in both}, {folder.casefold() for _, folder in both}
    if not named & kept and (all(map(is_number, kept)) or len(set(both)) == len(named) == len(kept)):
        return [f"the folders {listed(sorted({f for _, f in both}))} are not used as classes"]
    name = next(n for n in folders if n in labels and labels[n].casefold() != normal(folders[n]).casefold())
    raise BadInput(
        f"{where} and the class folders differ: {name} lies in {folders[name]!r} and is labelled {labels[name]!r}. "
        "Give label: the column of the file to use, or 'folders', or 'none'"
    )
