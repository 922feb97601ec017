"""Data of a folder or a zip of images: splits, labels, captions, common shape, decoding."""

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
from .captions import find_captions
from .decode import Header, Unreadable, decode, read_alpha, read_header, readable_suffixes
from .labels import find_labels
from .messages import join_names, pluralize, print_once
from .names import natural_key
from .sources import MEMORY, Data, MixedSizes, NoSplits
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
IMAGES = ("images", "image", "imgs", "img", "jpegimages")  # a folder of images next to AUXILIARY ones
# Folders next to splits that are not classes.
AUXILIARY = (
    "unlabeled", "unlabelled", "unsup", "extra", "mask", "masks", "annotations", "annotation", "labels", "meta",
    "metadata", "holdout", "segmentations",
)  # fmt: skip
TRIES = 100  # candidates to replace an unreadable image


def open_tree(
    tree: Tree,
    split: str | None,
    size: tuple[int, int] | None,
    channels: int | None,
    label: str | None,
    caption: str | None = None,
) -> Data:
    """Data of a folder, a zip or one file, with labels from a label file or the class sub-folders, and captions.

    Args:
        tree: the files.
        split: `train`, `test`, `val` or None for all.
        size: (height, width) in pixels, or None for that of the images.
        channels: 1, 3 or None for those of the images.
        label: a column of the label file, `folders`, `none`, or None for the labels that there are.
        caption: a column of the metadata file, `txt`, `none`, or None for the captions that there are.

    Raises:
        BadInput: if there are no images, or labels, captions, sizes or splits are inconsistent.
        Unreadable: if images are damaged and the data is held in memory.
    """
    suffixes = readable_suffixes()
    names = [name for name in tree.names if name.lower().endswith(suffixes) or not name]
    if not names:
        content = f"; it holds {summarize_suffixes(tree.names)}" if tree.names else ""
        raise BadInput(f"{tree.root} holds no images (looked for {', '.join(suffixes)}{content})")
    parts, messages = choose_split(tree, names, split)
    names = [name for _, part in parts for name in part]
    skipped = [name for name in tree.names if not name.lower().endswith(suffixes) and name]
    captions = find_captions(tree, parts, caption)
    labels, origin, used, more = find_labels(tree, parts, label, captions)
    skipped = [name for name in skipped if name not in used and name not in captions.files]
    more += [f"captions are not used: {captions.problem}"] if captions.problem else []
    headers = read_headers(tree, names)
    shape = common_shape(tree, names, headers, size, channels)
    c, h, w = shape
    messages = [*tree.messages, *messages, *more]
    if pages := [name for name, one in zip(names, headers, strict=True) if one.pages]:
        messages.append(
            f"several pages or frames in {pluralize(len(pages), 'file')}, such as {pages[0]}: the first is used"
        )
    classes = None if labels is None else tuple(sorted(set(labels.values()), key=natural_key))
    targets = None
    if labels is not None and classes is not None:
        if origin == "folders" and (odd := [n for n in classes if split_of(n) or n.lower() in AUXILIARY]):
            messages.append(f"read as classes: the folders {join_names(odd)}; move them away if they are not")
        if origin == "folders" and (empty := empty_folders(tree, parts)):
            messages.append(f"no images in the folders {join_names(empty)}: they are not classes")
        index = {name: k for k, name in enumerate(classes)}
        targets = torch.tensor([index[labels[name]] for name in names])
        folded = Counter(name.casefold() for name in classes)
        if alike := [name for name in classes if folded[name.casefold()] > 1]:
            messages.append(f"these classes differ in case only: {join_names(alike)}")
    details: dict[str, Any] = {
        "origin": origin,
        "skipped": f"{pluralize(len(skipped), 'file')} skipped: {summarize_suffixes(skipped)}" if skipped else "",
        "messages": tuple(messages),
        "captions": None if captions.texts is None else tuple(captions.texts[name] for name in names),
        "caption_problem": captions.problem,
        "alpha": lambda k: read_alpha(tree, names[k]),
        "files": tuple(names),
    }

    unreadable: set[int] = set()

    def try_decode(k: int) -> Tensor | Unreadable:
        try:
            return decode(tree, names[k], shape, size is not None)
        except Unreadable as e:
            return e

    def decode_or_replace(k: int) -> Tensor:
        """Image k, or if it is unreadable the next readable one of its class, the same in a resumed run."""
        image = try_decode(k)
        if isinstance(image, Tensor):
            return image
        unreadable.add(k)
        if len(unreadable) > min(max(10, len(names) // 100), len(names) - 1):
            raise Unreadable(f"{len(unreadable)} images of {len(names)} cannot be read, the last: {image}")
        same = range(len(names)) if targets is None else (targets == targets[k]).nonzero().flatten().tolist()
        start = list(same).index(k) if targets is not None else k
        for step in range(1, min(len(same), TRIES)):
            other = same[(start + step) % len(same)]
            replacement = try_decode(other)
            if isinstance(replacement, Tensor):
                print_once(f"{image}; {names[other]} is used instead")
                return replacement
        raise image

    def fetch(indices: list[int]) -> Tensor:
        out = torch.empty(len(indices), c, h, w, dtype=torch.uint8)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow releases the GIL
            for k, image in enumerate(pool.map(decode_or_replace, indices)):
                out[k] = image
        return out

    if len(names) * c * h * w > MEMORY:
        return Data(len(names), shape, fetch, targets, classes, tree.root, lazy=True, unreadable=unreadable, **details)
    out = torch.empty(len(names), c, h, w, dtype=torch.uint8)
    bad: list[tuple[str, Unreadable]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for k, image in enumerate(pool.map(try_decode, range(len(names)))):
            if isinstance(image, Tensor):
                out[k] = image
            else:
                bad.append((names[k], image))
    if not bad and names != [""] and int(out.max()) == 1:
        raise BadInput(
            f"{tree.root}: the images hold 0 and 1 only, which is black: are they masks? Scale them to 0..255"
        )
    if bad:
        rest = f"; also unreadable: {join_names(name for name, _ in bad[1:])}" if len(bad) > 1 else ""
        raise Unreadable(f"{bad[0][1]}{rest}")
    return Data.of(out, targets, classes, tree.root, **details)


def empty_folders(tree: Tree, parts: list[tuple[str, list[str]]]) -> list[str]:
    """The folders next to class folders without readable images."""
    empty = set()
    for prefix, names in parts:
        used = {name[len(prefix) :].split("/", 1)[0] for name in names}
        folders = {folder[len(prefix) :] for folder in tree.folders if folder.startswith(prefix)}
        empty |= {folder for folder in folders if "/" not in folder and folder not in used}
    return sorted(empty, key=natural_key)


def summarize_suffixes(names: Sequence[str]) -> str:
    """The number of files by suffix; the names of a few that may hold labels."""
    named = [n for n in names if n.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".parquet", ".mat", ".xml"))]
    named = named if len(named) <= 5 else []
    rest = Counter(PurePosixPath(n).suffix.lower() or "no suffix" for n in names if n not in named)
    return join_names(
        [*named, *(f"{suffix} {count:,}" for suffix, count in sorted(rest.items(), key=lambda kv: -kv[1]))]
    )


def split_of(folder: str) -> str | None:
    """The split that a folder's name means, or None."""
    return next((split for split, aliases in SPLITS.items() if folder.lower() in aliases), None)


def worded_splits(tree: Tree, tops: Sequence[str]) -> dict[str, str | None]:
    """The splits of folders such as train2017 and val2017; {} if their names contain no splits.

    Raises:
        BadInput: if every name contains a split, but with different rests (trainA, trainB, testA, testB).
    """
    splits: dict[str, str | None] = {}
    rests = set()
    for top in tops:
        match = SPLIT_WORD.search(top)
        splits[top] = split_of(match[1]) if match else None
        if match:
            rests.add((top[: match.start()] + top[match.end() :]).lower())
    if "train" not in splits.values() or len(set(splits.values()) - {None}) < 2:
        return {}
    if len(rests) == 1:
        return splits
    if all(splits[top] or top.lower() in AUXILIARY for top in tops):
        raise BadInput(
            f"{tree.root}: the folders {join_names(tops)} look like splits of several sets: name one of them"
        )
    return {}


def choose_split(tree: Tree, names: list[str], split: str | None) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Choose the images of a split. A single top folder is descended into.

    Folders are splits if all are named so, or if `train` is next to another split or an `AUXILIARY` folder; also by a
    word within their names (`worded_splits`). A folder `images` next to `AUXILIARY` folders only holds all the images.

    Args:
        tree: the files.
        names: of the images.
        split: `train`, `test`, `val`, or None for all.

    Returns:
        (common folder, names) of each split, and messages.

    Raises:
        BadInput: if there is no such split, or several folders of it.
    """
    prefix, messages = "", []
    while True:
        tops = sorted({name[len(prefix) :].split("/", 1)[0] for name in names if "/" in name[len(prefix) :]})
        loose = [name for name in names if "/" not in name[len(prefix) :]]
        split_by_top = {top: split_of(top) for top in tops}
        if "train" not in split_by_top.values() or len({*split_by_top.values(), None}) <= 2:
            split_by_top = worded_splits(tree, tops) or split_by_top
        splits = {each for each in split_by_top.values() if each}
        others = [top for top in tops if not split_by_top[top]]
        only_splits = bool(splits) and not others and not loose
        auxiliary = bool(others) and all(t.lower() in AUXILIARY for t in others)
        if only_splits or "train" in splits and (len(splits) > 1 or auxiliary):
            break
        shown = [top for top in tops if top.lower() in IMAGES]
        if len(shown) == 1 < len(tops) and not loose and all(t.lower() in (*AUXILIARY, *IMAGES) for t in tops):
            messages.append(
                f"the images of {shown[0]} are used; not those of {join_names(t for t in tops if t not in shown)}"
            )
            tops = shown
            names = [name for name in names if name.startswith(f"{prefix}{shown[0]}/")]
        if len(tops) != 1 or loose:
            parts, more = nested_splits(tree, names, prefix, split)
            return parts, [*messages, *more]
        prefix += f"{tops[0]}/"
    selected = [top for top in tops if split_by_top[top] and split in (None, split_by_top[top])]
    if split is not None and not selected:
        raise BadInput(f"{tree.root} has no split {split!r}: it has {', '.join(sorted(splits))}")
    if split is not None and len(selected) > 1:
        several = ", ".join(selected)
        raise BadInput(f"{tree.root} has several folders of the split {split!r}, {several}: name one of them")
    if unused := [top for top in tops if top not in selected]:
        messages.append(f"the images of {', '.join(selected)} are used; not those of {join_names(unused)}")
    if loose:
        messages.append(f"not used: {pluralize(len(loose), 'image')} next to the folders, such as {loose[0]}")
    folders = [f"{prefix}{top}/" for top in selected]
    return [(folder, [name for name in names if name.startswith(folder)]) for folder in folders], messages


def nested_splits(
    tree: Tree, names: list[str], prefix: str, split: str | None
) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Choose among images without split folders at the top: all, or the `split` of `class/train/`, `class/test/`."""
    inner = {name: PurePosixPath(name[len(prefix) :]).parts[1:-1] for name in names}
    splits = {split_of(parts[0]) if parts else None for parts in inner.values()}
    if "train" in splits and len(splits) > 1 and None not in splits and split is not None:
        selected = [name for name in names if split_of(inner[name][0]) == split]
        if selected:
            rest = pluralize(len(names) - len(selected), "image")
            return [(prefix, selected)], [f"the class folders hold splits: {split} is used, not {rest} of others"]
    if split in (None, "train"):
        return [(prefix, names)], []
    raise NoSplits(f"{tree.root} has no split {split!r}: it has no split folders")


def read_headers(tree: Tree, names: list[str]) -> list[Header]:
    """The headers of image files, read in parallel."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: read_header(tree, name), names))


def common_shape(
    tree: Tree, names: list[str], headers: list[Header], size: tuple[int, int] | None, channels: int | None
) -> tuple[int, int, int]:
    """(C, H, W) of the images, from their headers; grey if all are. Raises BadInput for mixed sizes without `size`."""
    first = headers[0]
    for name, one in zip(names, headers, strict=True):
        if size is None and (one.height, one.width) != (first.height, first.width):
            raise MixedSizes(
                f"{tree.root} mixes sizes: {names[0]} is {first.width}x{first.height} and {name} is "
                f"{one.width}x{one.height}; set size to resize all images"
            )
    height, width = size or (first.height, first.width)
    return channels or (1 if all(one.grey for one in headers) else 3), height, width
