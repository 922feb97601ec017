"""The captions of image files: from a metadata file next to them, or from a `.txt` beside each image."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ..errors import BadInput
from . import label_files
from .messages import pluralize
from .tree import SUFFIXES, Tree

BESIDE = "txt"  # the value of `caption` for the files beside the images
NUMBERS = re.compile(r"[-+\d.eE\s]*")  # boxes and class numbers of detection data, not captions


@dataclass
class Captions:
    """The captions of image files.

    Args:
        texts: image -> caption; None without captions.
        files: that were read as captions.
        columns: metadata file -> its column of captions.
        problem: why the captions that there are cannot be used.
    """

    texts: dict[str, str] | None = None
    files: set[str] = field(default_factory=set)
    columns: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def find_captions(tree: Tree, parts: list[tuple[str, list[str]]], column: str | None) -> Captions:
    """Find the captions of image files.

    Args:
        tree: the files.
        parts: (common folder, names of the images) of each split.
        column: of a metadata file; `txt`: the files beside the images; `none`: no captions; None: whatever there is.

    Returns:
        The captions. With `column` None, captions that cannot be used are a `problem`, since images and labels can be
        used without them.

    Raises:
        BadInput: with `column`, if captions cannot be used, are missing for some images, or contradict one another.
    """
    names = [name for _, part in parts for name in part]
    if column is not None and column.lower() == "none":
        return Captions()
    if names == [""]:
        if column is not None:
            raise BadInput(f"{tree.root} is one image, and has no captions")
        return Captions()
    try:
        return read_captions(tree, parts, names, column)
    except BadInput as e:
        if column is not None:
            raise
        return Captions(problem=str(e))


def read_captions(tree: Tree, parts: list[tuple[str, list[str]]], names: list[str], column: str | None) -> Captions:
    """`find_captions`, which raises BadInput for captions that cannot be used."""
    found = Captions()
    listed: dict[str, tuple[str, str]] = {}  # image -> caption and its file
    if column is None or column.lower() != BESIDE:
        for file, name, texts in metadata_captions(tree, parts, column):
            found.columns[file] = name
            for image, text in texts.items():
                if listed.setdefault(image, (text, file))[0] != text:
                    two = f"{listed[image][0][:60]!r} in {listed[image][1]} and {text[:60]!r} in {file}"
                    raise BadInput(f"{tree.root}: two captions of {image}, {two}")
    beside = {} if column is not None and column.lower() != BESIDE else text_files(tree, names)
    if column is not None and not listed and not beside:
        raise BadInput(
            f"{tree.root} holds no .txt beside its images"
            if column.lower() == BESIDE
            else f"{tree.root} has no metadata.jsonl or metadata.csv with a column {column!r} to take captions from"
        )
    inside = {name: listed[name] for name in names if name in listed}
    if listed and beside:
        check_both(tree, names, inside, beside)
    captions = {**{name: text for name, (text, _) in inside.items()}, **{k: text for k, (text, _) in beside.items()}}
    if not listed and not beside:
        return found
    missing = [name for name in names if name not in captions]
    if missing:
        where = tree.where(next(iter(found.columns))) if listed else tree.root
        raise BadInput(
            f"{where}: {len(names):,} images but no {'caption' if listed else '.txt with a caption'} for "
            f"{len(missing):,} of them, such as {missing[0]}"
        )
    if not any(captions.values()):
        raise BadInput(f"{tree.root}: all captions are empty")
    found.texts = captions
    found.files = {
        *found.columns,
        *(file for _, file in beside.values()),
        *unused_caption_files(tree, parts, found, beside),
    }
    return found


def unused_caption_files(
    tree: Tree, parts: list[tuple[str, list[str]]], found: Captions, beside: dict[str, tuple[str, str]]
) -> list[str]:
    """The caption files of splits that are not used: their images are not named as skipped either."""
    outside = [name for name in tree.names if not name.startswith(tuple(prefix for prefix, _ in parts))]
    metadata = {PurePosixPath(name).name.lower() for name in found.columns}
    stems = {name[: name.rfind(".")] for name in outside if name.lower().endswith(SUFFIXES)} if beside else set()
    return [
        name
        for name in outside
        if PurePosixPath(name).name.lower() in metadata or (name.lower().endswith(".txt") and name[:-4] in stems)
    ]


def check_both(
    tree: Tree, names: list[str], inside: dict[str, tuple[str, str]], beside: dict[str, tuple[str, str]]
) -> None:
    """Raise BadInput where a metadata file and the files beside the images have captions that do not agree."""
    choose = f"set caption to the column to use, or to {BESIDE!r}"
    if len(inside) < len(names):
        rest = pluralize(len(names) - len(inside), "other image")
        raise BadInput(
            f"{tree.root}: {len(inside):,} captions are in a metadata file and those of {rest} are not, while "
            f"{pluralize(len(beside), 'image')} of {len(names):,} have a .txt: {choose}"
        )
    for name, (text, file) in beside.items():
        if inside[name][0] != text:
            two = f"{inside[name][0][:60]!r} in {inside[name][1]} and {text[:60]!r} in {file}"
            raise BadInput(f"{tree.root}: two captions of {name}, {two}: {choose}")


def metadata_captions(
    tree: Tree, parts: list[tuple[str, list[str]]], column: str | None
) -> list[tuple[str, str, dict[str, str]]]:
    """(file, column, image -> caption) of each metadata file that has captions."""
    folders = {f"{parent}/" if (parent := str(PurePosixPath(n).parent)) != "." else "" for _, p in parts for n in p}
    found = []
    for file in label_files.find_label_files(tree, [*(prefix for prefix, _ in parts), *sorted(folders)]):
        if not file.lower().endswith(label_files.TABLES):
            continue
        header, rows = label_files.read_rows(tree, file)
        columns = [name.strip().lower() for name in header or ()]
        own = (column or "").strip().lower()
        images = next((columns.index(name) for name in label_files.FILE if name in columns and name != own), -1)
        text = caption_column(header or [], columns, images, column)
        if images < 0 or text is None or header is None:
            continue
        where = tree.where(file)
        for row in rows:
            if len(row) > len(header):
                raise BadInput(
                    f"{where}: the row {','.join(row)[:80]!r} has more columns than the header ({len(header)}): quote "
                    "texts that contain the separator"
                )
        pairs = [(row[images], row[text].strip() if len(row) > text else "") for row in rows if len(row) > images]
        if file.lower().endswith(".jsonl") and (odd := next((t for _, t in pairs if is_json_container(t)), None)):
            raise BadInput(f"{where}: a caption is a text, got {odd[:80]} (one caption an image)")
        found.append((file, header[text], captions_by_image(tree, file, pairs)))
    return found


def caption_column(header: list[str], columns: list[str], images: int, column: str | None) -> int | None:
    """The index of the column of captions, or None."""
    if column is None:
        return next((columns.index(n) for n in label_files.TEXT if n in columns and columns.index(n) != images), None)
    exact = [k for k, name in enumerate(header) if name.strip() == column]
    return next(iter([*exact, *(k for k, name in enumerate(columns) if name == column.strip().lower())]), None)


def is_json_container(text: str) -> bool:
    """Whether a cell of a JSON line was a list or an object."""
    if text[:1] not in ("[", "{"):
        return False
    try:
        return isinstance(json.loads(text), (list, dict))
    except ValueError:
        return False


def captions_by_image(tree: Tree, place: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Image -> caption, of (file, caption) pairs as the metadata file `place` spells them."""
    resolve_name = label_files.resolved_names(tree, place)
    captions: dict[str, str] = {}
    for file, text in pairs:
        name = resolve_name(file)
        if captions.setdefault(name, text) != text:
            raise BadInput(
                f"{tree.where(place)}: two captions of {file}, {captions[name][:60]!r} and {text[:60]!r}: "
                "keep one row for each image"
            )
    label_files.check_names(tree, place, captions)
    return captions


def text_files(tree: Tree, names: list[str]) -> dict[str, tuple[str, str]]:
    """Image -> (text, file) of the `.txt` beside it; {} if these hold numbers only, as detection data has them."""
    files = {name[:-4]: name for name in tree.names if name.lower().endswith(".txt")}
    beside = {name: files[stem] for name in names if (stem := name[: name.rfind(".")]) in files}
    texts = {file: label_files.text_of(tree, file).strip() for file in dict.fromkeys(beside.values())}
    written = [text for text in texts.values() if text]
    if written and all(NUMBERS.fullmatch(text) for text in written):
        return {}
    return {name: (texts[file], file) for name, file in beside.items()}
