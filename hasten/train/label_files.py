"""Labels that lie beside images in a file: labels.csv, metadata.csv and metadata.jsonl, dataset.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from .decode import BROKEN
from .names import normal
from .notes import listed
from .tree import SUFFIXES

if TYPE_CHECKING:
    from .tree import Tree

TABLES = ("labels.csv", "labels.tsv", "metadata.csv", "metadata.jsonl")
NAMES = (*TABLES, "dataset.json")
# Names of columns, compared in lower case without spaces around; the first that is there counts.
FILE = ("file", "filename", "file_name", "file name", "filepath", "file_path", "path", "image", "image_file",
        "image_name", "image_path", "img", "img_name", "image_id", "id")  # fmt: skip
CLASS = ("label", "labels", "class", "class_name", "classname", "class_label", "category", "target", "y", "name")
TEXT = ("text", "caption", "captions", "prompt", "description", "additional_feature")


@dataclass
class Found:
    """What a file of labels holds: by image, the class name. labels: None where it gives none.

    notes: what of it is not used.
    """

    place: str
    labels: dict[str, str] | None
    notes: list[str] = field(default_factory=list)


def read(tree: Tree, place: str, column: str | None) -> Found:
    """The labels of one file; `column`: the one asked for, by default the first of `CLASS` that is there.

    Without one of these a metadata file gives labels only by a single other column whose values repeat; labels.csv is
    refused. Raises BadInput for what cannot be read, rows without a label, and two labels of one image.
    """
    if place.lower().endswith("dataset.json"):
        return read_json(tree, place, column)
    header, rows = table(tree, place)
    where = tree.where(place)
    if header is None:
        file, value = 0, 1
        if any(len(row) > 2 for row in rows):
            raise BadInput(f"{where} has more than two columns and no header: name them, such as file,label")
        if column is not None and column.lower() not in CLASS:
            raise BadInput(f"{where} has no header, and so no column {column!r}")
        unused: list[str] = []
    else:
        plain = [name.strip().lower() for name in header]
        file = next((plain.index(name) for name in FILE if name in plain and name != (column or "").lower()), -1)
        if file < 0:
            raise BadInput(
                f"{where} has no column 'file' (columns: {', '.join(header)}; also read: {', '.join(FILE[1:])})"
            )
        found = class_column(tree, place, header, plain, rows, file, column)
        unused = [name for k, name in enumerate(header) if k not in (file, found)]
        if found is None:
            return Found(place, None, [f"{place} gives no classes: {unused_columns(unused)}"])
        value = found
        if place.lower().endswith(".jsonl"):
            odd = next((row for row in rows if row[value][:1] in ("[", "{")), None)
            if odd:
                raise BadInput(f"{where}: a label is a name or a number, found {odd[value][:80]} (one class an image)")
    short = next((row for row in rows if len(row) <= max(file, value) or not row[value].strip()), None)
    if short:
        raise BadInput(f"{where}: the row {','.join(short)!r} has no label")
    long = next((row for row in rows if header is not None and len(row) > len(header)), None)
    if long:
        raise BadInput(f"{where}: the row {','.join(long)!r} has more columns than the header ({len(header or ())})")
    labels = by_image(tree, place, [(row[file], row[value]) for row in rows])
    return Found(place, labels, [f"{place}: {unused_columns(unused)}"] if any(map(str.strip, unused)) else [])


def unused_columns(names: list[str]) -> str:
    """How columns that are passed over are named."""
    text = [name for name in names if name.strip().lower() in TEXT]
    rest = [name for name in names if name not in text]
    said = [f"captions ({', '.join(text)}) are not supported yet and not used"] if text else []
    rest = [name for name in rest if name.strip()]  # pandas writes its index under no name
    said += [f"columns not used: {listed(rest)} (choose one with label)"] if rest else []
    return "; ".join(said) or "it has no other column than the file names"


def class_column(
    tree: Tree, place: str, header: list[str], plain: list[str], rows: list[list[str]], file: int, column: str | None
) -> int | None:
    """Which column holds the class; None for a metadata file that has none."""
    if column is not None:
        match = [k for k, name in enumerate(header) if name.strip() == column] or [
            k for k, name in enumerate(plain) if name == column.strip().lower()
        ]
        if not match:
            raise BadInput(f"{tree.where(place)} has no column {column!r} (columns: {', '.join(header)})")
        return match[0]
    known = next((plain.index(name) for name in CLASS if name in plain and plain.index(name) != file), None)
    if known is not None:
        return known
    if "metadata" not in PurePosixPath(place).name.lower():
        raise BadInput(
            f"{tree.where(place)} has no column 'label' (columns: {', '.join(header)}; also read: "
            f"{', '.join(CLASS[1:])}): name the one to use with label, or 'none' for none"
        )
    others = [k for k in range(len(header)) if k != file and plain[k] not in TEXT]
    if len(others) == 1:
        values = [row[others[0]].strip() for row in rows if len(row) > others[0]]
        if values and all(values) and len(set(values)) <= len(values) / 2 and not any("." in v for v in values):
            return others[0]
    return None


def table(tree: Tree, place: str) -> tuple[list[str] | None, list[list[str]]]:
    """The header (None where the first row names a file already) and the rows that are not empty."""
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
        raise BadInput(f"{where} has one column only, {rows[0][0]!r}: columns are parted by , ; or a tab")
    names_file = rows[0][0].strip().lower().endswith(SUFFIXES) or resolve(tree, place)(rows[0][0]) in tree.names
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


def read_json(tree: Tree, place: str, column: str | None) -> Found:
    """The `dataset.json` of the dataset tools of StyleGAN and EDM: {"labels": [[file, class], ...]}, or null."""
    where = tree.where(place)
    try:
        content = json.loads(text_of(tree, place))
    except (ValueError, RecursionError) as e:
        raise BadInput(f"cannot read {where}: {e}") from e
    if not isinstance(content, dict) or "labels" not in content:
        return Found(place, None, [f"{place} is not used: it has no entry 'labels'"])
    labels = content["labels"]
    if labels and not isinstance(labels, (list, dict)):
        raise BadInput(f"{where}: labels are pairs [file, integer or name], found {str(labels)[:80]}")
    if not labels or column is not None and column.lower() not in CLASS:
        return Found(place, None, [f"{place} gives no classes"] if not labels else [])
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    for pair in pairs:
        fits = isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
        if not fits or isinstance(pair[1], bool) or not isinstance(pair[1], (int, str)):
            raise BadInput(f"{where}: labels are pairs [file, integer or name], found {str(pair)[:80]}")
    rest = [key for key in content if key != "labels"]
    return Found(place, by_image(tree, place, [(file, str(one)) for file, one in pairs]),
                 [f"{place}: entries not used: {listed(rest)}"] if rest else [])  # fmt: skip


def text_of(tree: Tree, place: str) -> str:
    """A file as text: UTF-8, or UTF-16 with its mark, as spreadsheets write it."""
    try:
        raw = tree.read(place)
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"cannot read {tree.where(place)}: it is not UTF-8 text ({e.reason})") from e
    except BROKEN as e:
        raise BadInput(f"cannot read {tree.where(place)}: {e}") from e


def resolve(tree: Tree, place: str) -> Callable[[str], str]:
    """A function from a file name as the labels spell it to one of the tree.

    A name is relative to where the labels lie, with or without its suffix; a bare name may lie in any folder if it is
    the only one.
    """
    base = place[: len(place) - len(PurePosixPath(place).name)]
    known = set(tree.names)
    spelled: dict[str, list[str]] = {}  # with composed accents, without a suffix, or without folders
    for name in tree.names:
        if name.lower().endswith(SUFFIXES):
            path = PurePosixPath(normal(name))
            for short in {str(path), str(path.with_suffix("")), f"*/{path.name}", f"*/{path.stem}"}:
                spelled.setdefault(short, []).append(name)

    def find(file: str) -> str:
        path = file.strip().replace("\\", "/")
        while path.startswith("./"):
            path = path[2:]
        if base + path in known:
            return base + path
        for short in (normal(base + path), f"*/{normal(path)}"):
            if len(spelled.get(short, ())) == 1:
                return spelled[short][0]
        return base + path

    return find


def by_image(tree: Tree, place: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Image -> class name, for files as the labels spell them."""
    find = resolve(tree, place)
    labels: dict[str, str] = {}
    for file, label in pairs:
        name, label = find(file), normal(label)
        if not label.isprintable():
            raise BadInput(
                f"{tree.where(place)}: the label {label!r} of {file} holds characters that cannot be printed"
            )
        if labels.setdefault(name, label) != label:
            raise BadInput(f"{tree.where(place)} names {file} twice, as {labels[name]!r} and as {label!r}")
    known = set(tree.names)
    lost = [name for name in labels if name not in known]
    if lost:
        more = f", and {len(lost) - 1:,} more" if len(lost) > 1 else ""
        raise BadInput(f"{tree.where(place)} names {lost[0]}, which is not there{more}")
    return labels
