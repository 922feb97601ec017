"""The labels of image files: from a label file next to them, or from class folders."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ..errors import BadInput
from . import label_files
from .captions import Captions
from .messages import join_names
from .names import is_number, normalize_name
from .tree import Tree

# Files that may hold labels, but are named otherwise than those that are read.
MAYBE = re.compile(
    r"\.(csv|tsv|jsonl|parquet)$|(label|class|annotation|meta|synset|target|train|val|test|list).*\.(txt|json|xml|mat|xlsx?|npy)$",
    re.IGNORECASE,
)


def find_labels(
    tree: Tree, parts: list[tuple[str, list[str]]], column: str | None, captions: Captions
) -> tuple[dict[str, str] | None, str, set[str], list[str]]:
    """Find the labels of image files.

    Args:
        tree: the files.
        parts: (common folder, names of the images) of each split.
        column: of a label file; `folders`: the class folders; `none`: no labels; None: whatever there is.
        captions: of the images, whose files and columns are no labels.

    Returns:
        The class of every image by its name, or None; the origin of the labels; the label files; messages.

    Raises:
        BadInput: if labels cannot be used, are missing for some images, or contradict one another.
    """
    column = column.lower() if column and column.lower() in ("folders", "none") else column
    names = [name for _, part in parts for name in part]
    if column == "none" or names == [""]:
        return None, "", set(), []
    files = label_files.find_label_files(tree, [prefix for prefix, _ in parts])
    captioned = captions.texts is not None  # as images of any folders may be
    folders = folder_labels(tree, parts, bool(files) or captioned or column not in (None, "folders"))
    messages = []
    if column == "folders":
        return folders, "folders", set(), [f"{name} is not used" for name in files]
    tables = [label_files.read_label_file(tree, name, column, captions.columns.get(name)) for name in files]
    messages += [line for table in tables for line in table.messages]
    labelled = [table for table in tables if table.labels is not None]
    if column is not None and not labelled:
        raise BadInput(f"{tree.root} has no {' or '.join(label_files.TABLES)} to take the column {column!r} from")
    if not labelled:
        if folders is None and files and not captioned:
            folder_labels(tree, parts, False)
        if folders and all(re.fullmatch(r"[0-9]{5,}", name) for name in set(folders.values())):
            shown = join_names(sorted(set(folders.values())))
            messages.append(f"the folders {shown} are read as classes; if they are shards, set label to 'none'")
        known = {*files, *captions.files}
        others = [] if folders else [n for n in tree.names if n not in known and MAYBE.search(PurePosixPath(n).name)]
        if others:
            messages.append(f"{join_names(others)} not read: labels are read from {', '.join(label_files.NAMES)}")
        return folders, "folders", {table.name for table in tables}, messages
    labels: dict[str, str] = {}
    origin = " and ".join(table.name for table in labelled)
    for table in labelled:
        for name, label in (table.labels or {}).items():
            if labels.setdefault(name, label) != label:
                raise BadInput(f"{tree.root}: {origin} differ: {name} is {labels[name]!r} and {label!r}")
    where = tree.where(labelled[0].name)
    missing = [name for name in names if name not in labels]
    if missing:
        raise BadInput(f"{where}: {len(names)} images but no label for {len(missing)} of them, such as {missing[0]}")
    if folders is not None and column is None:
        messages += check_class_folders(where, labels, folders)
    return {name: labels[name] for name in names}, origin, {table.name for table in tables}, messages


def folder_labels(tree: Tree, parts: list[tuple[str, list[str]]], lenient: bool) -> dict[str, str] | None:
    """The class of every image: the first folder of its name after the prefix. None if there are fewer than two.

    Args:
        tree: the files.
        parts: (prefix, names of the images) of each split.
        lenient: loose images next to class folders are no error, since labels come from elsewhere.

    Raises:
        BadInput: for loose images next to class folders.
    """
    labels: dict[str, str] = {}
    loose = []
    for prefix, names in parts:
        for name in names:
            inner = PurePosixPath(name[len(prefix) :]).parts
            if len(inner) == 1:
                loose.append(name)
            else:
                labels[name] = normalize_name(inner[0])
    classes = set(labels.values())
    if labels and loose and not lenient and len(parts) == 1:
        raise BadInput(f"{tree.root} holds class folders and loose images as well ({loose[0]}): sort it into a class")
    return None if loose or len(classes) < 2 else labels


def check_class_folders(where: str, labels: dict[str, str], folders: dict[str, str]) -> list[str]:
    """Check that class folders agree with a label file.

    They agree if every image's folder has the name of its label. Folders that are numbers, none of them a label, are
    shards; folders and labels in one-to-one correspondence are one set of classes, named by the file.

    Returns:
        Messages about folders that are not used as classes.

    Raises:
        BadInput: if they disagree.
    """
    both = [(labels[name], normalize_name(folders[name])) for name in folders if name in labels]
    if all(label.casefold() == folder.casefold() for label, folder in both):
        return []
    by_file, by_folder = {label.casefold() for label, _ in both}, {folder.casefold() for _, folder in both}
    one_to_one = len(set(both)) == len(by_file) == len(by_folder)
    if not by_file & by_folder and (all(map(is_number, by_folder)) or one_to_one):
        return [f"the folders {join_names(sorted({f for _, f in both}))} are not used as classes"]
    name = next(n for n in folders if n in labels and labels[n].casefold() != normalize_name(folders[n]).casefold())
    raise BadInput(
        f"{where} and the class folders differ: {name} lies in {folders[name]!r} and is labelled {labels[name]!r}. "
        "Set label to the column of the file to use, or to 'folders' or 'none'"
    )
