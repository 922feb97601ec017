"""Images from a folder or a zip: what is in it, splits, and where the labels come from."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..errors import BadInput
from .decode import Header, Unreadable, alpha, decode, header, readable
from .labels import find_labels
from .names import natural
from .notes import counted, listed, note
from .sources import MEMORY, Data
from .tree import SUFFIXES, Tree, file_tree, folder_tree, zip_tree

__all__ = ["SPLITS", "SUFFIXES", "Tree", "file_tree", "folder_tree", "open_tree", "zip_tree"]

SPLITS = {
    "train": ("train", "training", "trainval"),
    "test": ("test", "testing", "t10k"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
}
# A split within a longer name: train2017, training_set, seg_test, trainA; not testarossa.
SPLIT_WORD = re.compile(
    r"(?:^|(?<=[^A-Za-z]))((?i:trainval|training|train|testing|test|validation|valid|val|evaluation|eval))(?=$|[^a-z])"
)
IMAGES = ("images", "image", "imgs", "img", "jpegimages")  # a folder of them beside those of BESIDE
# Folders beside splits that are no classes.
BESIDE = (
    "unlabeled", "unlabelled", "unsup", "extra", "mask", "masks", "annotations", "annotation", "labels", "meta",
    "metadata", "holdout", "segmentations",
)  # fmt: skip
TRIES = 100  # images that are tried in place of one that cannot be read


def open_tree(
    tree: Tree, split: str | None, size: tuple[int, int] | None, channels: int | None, label: str | None
) -> Data:
    """Images of a folder, a zip or one file, with labels from a file of labels or from the class sub-folders."""
    able = readable()
    names = [name for name in tree.names if name.lower().endswith(able) or not name]
    if not names:
        held = f"; it holds {kinds(tree.names)}" if tree.names else ""
        raise BadInput(f"{tree.root} holds no images (looked for {', '.join(able)}{held})")
    parts, notes = choose_split(tree, names, split)
    names = [name for _, part in parts for name in part]
    skipped = [name for name in tree.names if not name.lower().endswith(able) and name]
    labels, origin, used, more = find_labels(tree, parts, label)
    skipped = [name for name in skipped if name not in used]
    headers = read_headers(tree, names)
    shape = common_shape(tree, names, headers, size, channels)
    c, h, w = shape
    notes = [*tree.notes, *notes, *more]
    if pages := [name for name, one in zip(names, headers, strict=True) if one.pages]:
        notes.append(f"several pages or frames in {counted(len(pages), 'file')}, such as {pages[0]}: the first is used")
    classes = None if labels is None else tuple(sorted(set(labels.values()), key=natural))
    targets = None
    if labels is not None and classes is not None:
        if origin == "folders" and (odd := [n for n in classes if split_of(n) or n.lower() in BESIDE]):
            notes.append(f"taken for classes: the folders {listed(odd)}; move them away if they are none")
        if origin == "folders" and (empty := without_images(tree, parts)):
            notes.append(f"no images in the folders {listed(empty)}: they are no classes")
        index = {name: k for k, name in enumerate(classes)}
        targets = torch.tensor([index[labels[name]] for name in names])
        lower = Counter(name.casefold() for name in classes)
        if alike := [name for name in classes if lower[name.casefold()] > 1]:
            notes.append(f"these classes differ in capitals alone: {listed(alike)}")
    details: dict[str, Any] = {
        "origin": origin, "skipped": f"{counted(len(skipped), 'file')} skipped: {kinds(skipped)}" if skipped else "",
        "notes": tuple(notes), "alpha": lambda k: alpha(tree, names[k]),
    }  # fmt: skip

    broken: set[int] = set()

    def attempt(k: int) -> Tensor | Unreadable:
        try:
            return decode(tree, names[k], shape, size is not None)
        except Unreadable as e:
            return e

    def replaced(k: int) -> Tensor:
        """Image k; where it cannot be read, the next of its class that can, so that a run goes on, and resumes."""
        made = attempt(k)
        if isinstance(made, Tensor):
            return made
        broken.add(k)
        if len(broken) > min(max(10, len(names) // 100), len(names) - 1):
            raise Unreadable(f"{len(broken)} images of {len(names)} cannot be read, the last: {made}")
        same = range(len(names)) if targets is None else (targets == targets[k]).nonzero().flatten().tolist()
        start = list(same).index(k) if targets is not None else k
        for step in range(1, min(len(same), TRIES)):
            other = same[(start + step) % len(same)]
            found = attempt(other)
            if isinstance(found, Tensor):
                note(f"{made}; {names[other]} is used in its place")
                return found
        raise made

    def fetch(indices: list[int]) -> Tensor:
        out = torch.empty(len(indices), c, h, w, dtype=torch.uint8)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside Python's lock
            for k, image in enumerate(pool.map(replaced, indices)):
                out[k] = image
        return out

    if len(names) * c * h * w > MEMORY:
        return Data(len(names), shape, fetch, targets, classes, tree.root, lazy=True, unreadable=broken, **details)
    out = torch.empty(len(names), c, h, w, dtype=torch.uint8)
    bad: list[tuple[str, Unreadable]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for k, image in enumerate(pool.map(attempt, range(len(names)))):
            if isinstance(image, Tensor):
                out[k] = image
            else:
                bad.append((names[k], image))
    if not bad and names != [""] and int(out.max()) == 1:
        raise BadInput(
            f"{tree.root}: the images hold 0 and 1 alone, which is black: are they masks? Scale them to 0..255"
        )
    if bad:
        rest = f"; also refused: {listed(name for name, _ in bad[1:])}" if len(bad) > 1 else ""
        raise Unreadable(f"{bad[0][1]}{rest}")
    return Data.of(out, targets, classes, tree.root, **details)


def without_images(tree: Tree, parts: list[tuple[str, list[str]]]) -> list[str]:
    """The folders beside class folders that hold no image that can be read."""
    empty = set()
    for prefix, names in parts:
        held = {name[len(prefix) :].split("/", 1)[0] for name in names}
        beside = {folder[len(prefix) :] for folder in tree.folders if folder.startswith(prefix)}
        empty |= {folder for folder in beside if "/" not in folder and folder not in held}
    return sorted(empty, key=natural)


def kinds(names: Sequence[str]) -> str:
    """Files counted by suffix; those that might hold labels by name."""
    telling = [n for n in names if n.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".parquet", ".mat", ".xml"))]
    telling = telling if len(telling) <= 5 else []
    rest = Counter(PurePosixPath(n).suffix.lower() or "no suffix" for n in names if n not in telling)
    return listed([*telling, *(f"{kind} {count:,}" for kind, count in sorted(rest.items(), key=lambda kv: -kv[1]))])


def split_of(folder: str) -> str | None:
    """The split that a folder's name stands for."""
    return next((split for split, aliases in SPLITS.items() if folder.lower() in aliases), None)


def worded_splits(tree: Tree, tops: Sequence[str]) -> dict[str, str | None]:
    """The splits of folders such as train2017 and val2017; {} where their names hold no splits.

    Raises BadInput where every folder's name holds one, but beside different words (trainA, trainB, testA, testB).
    """
    found: dict[str, str | None] = {}
    rests = set()
    for top in tops:
        match = SPLIT_WORD.search(top)
        found[top] = split_of(match[1]) if match else None
        if match:
            rests.add((top[: match.start()] + top[match.end() :]).lower())
    if "train" not in found.values() or len(set(found.values()) - {None}) < 2:
        return {}
    if len(rests) == 1:
        return found
    if all(found[top] or top.lower() in BESIDE for top in tops):
        raise BadInput(f"{tree.root}: the folders {listed(tops)} look like splits of several sets: name one of them")
    return {}


def choose_split(tree: Tree, names: list[str], split: str | None) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """The images of the asked split as (the folder they share, names), and notes; a lone top folder is looked through.

    Folders are splits where all are, or where `train` stands beside another split or a folder of `BESIDE`; also by a
    word within their names (`worded_splits`). A folder `images` beside folders of `BESIDE` alone holds all the images.
    None: all splits, each with its folder.
    """
    prefix, notes = "", []
    while True:
        tops = sorted({name[len(prefix) :].split("/", 1)[0] for name in names if "/" in name[len(prefix) :]})
        loose = [name for name in names if "/" not in name[len(prefix) :]]
        found = {top: split_of(top) for top in tops}
        found = (
            found
            if "train" in found.values() and len({*found.values(), None}) > 2
            else (worded_splits(tree, tops) or found)
        )
        splits = {kind for kind in found.values() if kind}
        others = [top for top in tops if not found[top]]
        whole = bool(splits) and not others and not loose
        if whole or "train" in splits and (len(splits) > 1 or others and all(t.lower() in BESIDE for t in others)):
            break
        shown = [top for top in tops if top.lower() in IMAGES]
        if len(shown) == 1 < len(tops) and not loose and all(t.lower() in (*BESIDE, *IMAGES) for t in tops):
            notes.append(f"the images of {shown[0]} are used; not those of {listed(t for t in tops if t != shown[0])}")
            tops = shown
            names = [name for name in names if name.startswith(f"{prefix}{shown[0]}/")]
        if len(tops) != 1 or loose:
            chosen_parts, more = nested_splits(tree, names, prefix, split)
            return chosen_parts, [*notes, *more]
        prefix += f"{tops[0]}/"
    chosen = [top for top in tops if found[top] and split in (None, found[top])]
    if split is not None and not chosen:
        raise BadInput(f"{tree.root} has no split {split!r}: it has {', '.join(sorted(splits))}")
    if split is not None and len(chosen) > 1:
        raise BadInput(f"{tree.root} has several folders of the split {split!r}, {', '.join(chosen)}: name one of them")
    if unused := [top for top in tops if top not in chosen]:
        notes.append(f"the images of {', '.join(chosen)} are used; not those of {listed(unused)}")
    if loose:
        notes.append(f"not used: {counted(len(loose), 'image')} beside the folders, such as {loose[0]}")
    places = [f"{prefix}{top}/" for top in chosen]
    return [(place, [name for name in names if name.startswith(place)]) for place in places], notes


def nested_splits(
    tree: Tree, names: list[str], prefix: str, split: str | None
) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Images without split folders at the top: all of them, but of `class/train/`, `class/test/` the asked split."""
    inner = {name: PurePosixPath(name[len(prefix) :]).parts[1:-1] for name in names}
    kinds = {split_of(parts[0]) if parts else None for parts in inner.values()}
    if "train" in kinds and len(kinds) > 1 and None not in kinds and split is not None:
        chosen = [name for name in names if split_of(inner[name][0]) == split]
        if chosen:
            rest = counted(len(names) - len(chosen), "image")
            return [(prefix, chosen)], [f"the class folders hold splits: {split} is used, not {rest} of others"]
    if split in (None, "train"):
        return [(prefix, names)], []
    raise BadInput(f"{tree.root} has no split {split!r}: it has no split folders")


def read_headers(tree: Tree, names: list[str]) -> list[Header]:
    """The headers of image files, some at a time."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: header(tree, name), names))


def common_shape(
    tree: Tree, names: list[str], headers: list[Header], size: tuple[int, int] | None, channels: int | None
) -> tuple[int, int, int]:
    """(C, H, W) of all the images, from their headers; grey only when all are."""
    first = headers[0]
    for name, one in zip(names, headers, strict=True):
        if size is None and (one.height, one.width) != (first.height, first.width):
            raise BadInput(
                f"{tree.root} mixes sizes: {names[0]} is {first.width}x{first.height} and {name} is "
                f"{one.width}x{one.height}; give a size to bring all to one"
            )
    height, width = size or (first.height, first.width)
    return channels or (1 if all(one.grey for one in headers) else 3), height, width
