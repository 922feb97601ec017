"""Label files next to images: labels.csv, metadata.csv and metadata.jsonl, dataset.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ..errors import BadInput
from .decode import BROKEN
from .messages import join_names
from .names import normalize_name
from .tree import SUFFIXES, Tree

TABLES = ("labels.csv", "labels.tsv", "metadata.csv", "metadata.jsonl")
NAMES = (*TABLES, "dataset.json")
# Names of columns, compared in lower case and stripped; the first one that is there is used.
FILE = (
    "file", "filename", "file_name", "file name", "filepath", "file_path", "path", "image", "image_file", "image_name",
    "image_path", "img", "img_name", "image_id", "id",
)  # fmt: skip
CLASS = ("label", "labels", "class", "class_name", "classname", "class_label", "category", "target", "y", "name")
TEXT = ("text", "caption", "captions", "prompt", "description", "additional_feature")


@dataclass
class LabelFile:
    """The content of a label file.

    Args:
        name: of the file.
        labels: image -> class name, or None without classes.
        messages: what of the file is not used.
    """

    name: str
    labels: dict[str, str] | None
    messages: list[str] = field(default_factory=list)


def find_label_files(tree: Tree, prefixes: Sequence[str]) -> list[str]:
    """The label files in the folders of the images and in their parents."""
    files: dict[str, None] = {}
    by_lower = {name.lower(): name for name in tree.names}
    for prefix in prefixes:
        parents = [prefix, *(f"{parent}/" if str(parent) != "." else "" for parent in PurePosixPath(prefix).parents)]
        for folder in dict.fromkeys(parents):
            for name in NAMES:
                if (folder + name).lower() in by_lower:
                    files[by_lower[(folder + name).lower()]] = None
    return list(files)


def read_label_file(tree: Tree, place: str, column: str | None, caption: str | None = None) -> LabelFile:
    """Read the labels of one file.

    Args:
        tree: the files.
        place: name of the label file.
        column: of the classes. Default: the first of `CLASS` that is there; in a metadata file without one of these, a
            single other column whose values repeat.
        caption: the column that is read as captions, if any.

    Raises:
        BadInput: if the file cannot be read or lacks the column, for rows without a label, or two labels of one image.
    """
    if place.lower().endswith("dataset.json"):
        return read_json(tree, place, column)
    header, rows = read_rows(tree, place)
    where = tree.where(place)
    if header is None:
        file, value = 0, 1
        if any(len(row) > 2 for row in rows):
            raise BadInput(f"{where} has more than two columns and no header: name them, such as file,label")
        if column is not None and column.lower() not in CLASS:
            raise BadInput(f"{where} has no header, and so no column {column!r}")
        unused: list[str] = []
    else:
        columns = [name.strip().lower() for name in header]
        file = next((columns.index(name) for name in FILE if name in columns and name != (column or "").lower()), -1)
        if file < 0:
            raise BadInput(
                f"{where} has no column 'file' (columns: {', '.join(header)}; also read: {', '.join(FILE[1:])})"
            )
        readable = [name if header[k] != caption else TEXT[0] for k, name in enumerate(columns)]
        index = class_column(tree, place, header, readable, rows, file, column)
        unused = [name for k, name in enumerate(header) if k not in (file, index) and name != caption]
        if index is None:
            silent = caption is not None and not any(map(str.strip, unused))
            return LabelFile(place, None, [] if silent else [f"{place} has no classes: {unused_columns(unused)}"])
        value = index
        if place.lower().endswith(".jsonl"):
            odd = next((row for row in rows if row[value][:1] in ("[", "{")), None)
            if odd:
                raise BadInput(f"{where}: a label is a name or a number, got {odd[value][:80]} (one class an image)")
    short = next((row for row in rows if len(row) <= max(file, value) or not row[value].strip()), None)
    if short:
        raise BadInput(f"{where}: the row {','.join(short)!r} has no label")
    long = next((row for row in rows if header is not None and len(row) > len(header)), None)
    if long:
        raise BadInput(f"{where}: the row {','.join(long)!r} has more columns than the header ({len(header or ())})")
    labels = by_image(tree, place, [(row[file], row[value]) for row in rows])
    return LabelFile(place, labels, [f"{place}: {unused_columns(unused)}"] if any(map(str.strip, unused)) else [])


def unused_columns(names: list[str]) -> str:
    """A message about the columns that are not used."""
    text = [name for name in names if name.strip().lower() in TEXT]
    rest = [name for name in names if name not in text]
    messages = [f"captions ({', '.join(text)}) are not used"] if text else []
    rest = [name for name in rest if name.strip()]  # pandas writes its index under no name
    messages += [f"columns not used: {join_names(rest)} (choose one with label)"] if rest else []
    return "; ".join(messages) or "it has no other column than the file names"


def class_column(
    tree: Tree, place: str, header: list[str], columns: list[str], rows: list[list[str]], file: int, column: str | None
) -> int | None:
    """The index of the column of classes; None for a metadata file without one."""
    if column is not None:
        match = [k for k, name in enumerate(header) if name.strip() == column] or [
            k for k, name in enumerate(columns) if name == column.strip().lower()
        ]
        if not match:
            raise BadInput(f"{tree.where(place)} has no column {column!r} (columns: {', '.join(header)})")
        return match[0]
    known = next((columns.index(name) for name in CLASS if name in columns and columns.index(name) != file), None)
    if known is not None:
        return known
    if "metadata" not in PurePosixPath(place).name.lower():
        raise BadInput(
            f"{tree.where(place)} has no column 'label' (columns: {', '.join(header)}; also read: "
            f"{', '.join(CLASS[1:])}): set label to the one to use, or to 'none'"
        )
    others = [k for k in range(len(header)) if k != file and columns[k] not in TEXT]
    if len(others) == 1:
        values = [row[others[0]].strip() for row in rows if len(row) > others[0]]
        if values and all(values) and len(set(values)) <= len(values) / 2 and not any("." in v for v in values):
            return others[0]
    return None


def read_rows(tree: Tree, place: str) -> tuple[list[str] | None, list[list[str]]]:
    """The header (None if the first row names a file already) and the rows that are not empty."""
    where, text = tree.where(place), text_of(tree, place)
    if place.lower().endswith(".jsonl"):
        return json_lines(where, text)
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t|", key=first.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        rows = [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as e:
        raise BadInput(f"cannot read {where}: {e}") from e
    if not rows:
        raise BadInput(f"{where} is empty: remove it, or write a header file,label and a row for each image")
    if len(rows[0]) < 2:
        raise BadInput(f"{where} has one column only, {rows[0][0]!r}: columns are separated by , ; or a tab")
    names_file = rows[0][0].strip().lower().endswith(SUFFIXES) or resolved_names(tree, place)(rows[0][0]) in tree.names
    return (None, rows) if names_file else (rows[0], rows[1:])


def json_lines(where: str, text: str) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a file of one JSON object a line."""
    records: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise BadInput(f"cannot read {where}: line {number}: {e}") from e
            if not isinstance(record, dict):
                raise BadInput(f"cannot read {where}: line {number} is no JSON object")
            records.append(record)
    if not records:
        raise BadInput(f"{where} is empty: remove it, or write a line for each image")
    header = list(dict.fromkeys(key for record in records for key in record))

    def cell(value: Any) -> str:
        return "" if value is None else value if isinstance(value, str) else json.dumps(value)

    return header, [[cell(record.get(key)) for key in header] for record in records]


def read_json(tree: Tree, place: str, column: str | None) -> LabelFile:
    """Read the `dataset.json` of the dataset tools of StyleGAN and EDM: {"labels": [[file, class], ...]}, or null."""
    where = tree.where(place)
    try:
        content = json.loads(text_of(tree, place))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"cannot read {where}: {e}") from e
    if not isinstance(content, dict) or "labels" not in content:
        return LabelFile(place, None, [f"{place} is not used: it has no entry 'labels'"])
    labels = content["labels"]
    if labels and not isinstance(labels, (list, dict)):
        raise BadInput(f"{where}: labels are pairs [file, integer or name], got {str(labels)[:80]}")
    if not labels or column is not None and column.lower() not in CLASS:
        return LabelFile(place, None, [f"{place} has no classes"] if not labels else [])
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    for pair in pairs:
        fits = isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
        if not fits or isinstance(pair[1], bool) or not isinstance(pair[1], (int, str)):
            raise BadInput(f"{where}: labels are pairs [file, integer or name], got {str(pair)[:80]}")
    rest = [key for key in content if key != "labels"]
    labelled = by_image(tree, place, [(file, str(one)) for file, one in pairs])
    return LabelFile(place, labelled, [f"{place}: entries not used: {join_names(rest)}"] if rest else [])


def text_of(tree: Tree, place: str) -> str:
    """The text of a file: UTF-8, or UTF-16 with a byte order mark, as spreadsheets write it."""
    try:
        raw = tree.read(place)
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"cannot read {tree.where(place)}: it is not UTF-8 text ({e.reason})") from e
    except BROKEN as e:
        raise BadInput(f"cannot read {tree.where(place)}: {e}") from e


def resolved_names(tree: Tree, place: str) -> Callable[[str], str]:
    """A function from a file name in the label file `place` to one of the tree.

    Names are relative to the label file, with or without suffix; a bare name may be in any folder if it is unique.
    """
    base = place[: len(place) - len(PurePosixPath(place).name)]
    known = set(tree.names)
    spellings: dict[str, list[str]] = {}  # in normal form, without suffix, or without folders
    for name in tree.names:
        if name.lower().endswith(SUFFIXES):
            path = PurePosixPath(normalize_name(name))
            for short in {str(path), str(path.with_suffix("")), f"*/{path.name}", f"*/{path.stem}"}:
                spellings.setdefault(short, []).append(name)

    def resolve_name(file: str) -> str:
        path = file.strip().replace("\\", "/")
        while path.startswith("./"):
            path = path[2:]
        if base + path in known:
            return base + path
        for short in (normalize_name(base + path), f"*/{normalize_name(path)}"):
            if len(spellings.get(short, ())) == 1:
                return spellings[short][0]
        return base + path

    return resolve_name


def by_image(tree: Tree, place: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Image -> class name, of (file, label) pairs as the label file `place` spells them."""
    resolve_name = resolved_names(tree, place)
    labels: dict[str, str] = {}
    for file, label in pairs:
        name, label = resolve_name(file), normalize_name(label)
        if not label.isprintable():
            raise BadInput(
                f"{tree.where(place)}: the label {label!r} of {file} holds characters that cannot be printed"
            )
        if labels.setdefault(name, label) != label:
            raise BadInput(f"{tree.where(place)} names {file} twice, as {labels[name]!r} and as {label!r}")
    check_names(tree, place, labels)
    return labels


def check_names(tree: Tree, place: str, names: Iterable[str]) -> None:
    """Raise BadInput if the label file `place` names files that do not exist."""
    known = set(tree.names)
    missing = [name for name in names if name not in known]
    if missing:
        more = f", and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise BadInput(f"{tree.where(place)} names {missing[0]}, which does not exist{more}")
