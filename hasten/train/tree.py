"""A folder, a zip or a file as a list of file names with functions to read them."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from ..errors import BadInput
from .messages import pluralize

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".heic", ".heif", ".tga", ".qoi",
)  # fmt: skip
HIDDEN = re.compile(r"(^|/)(\.|__MACOSX(/|$)|@eaDir(/|$))")


@dataclass(frozen=True)
class Tree:
    """A folder or a zip as a sorted list of file names.

    Args:
        root: the path, for messages.
        names: the files, relative to the root.
        read: name -> content.
        open: name -> binary stream.
        messages: what was skipped.
        folders: all of them, empty ones too.
        ranges: the value ranges of float images found so far, with the first file of each.
    """

    root: str
    names: tuple[str, ...]
    read: Callable[[str], bytes] = field(repr=False)
    open: Callable[[str], IO[bytes]] = field(repr=False)
    messages: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    ranges: dict[str, str] = field(default_factory=dict, repr=False)

    def where(self, name: str) -> str:
        """The path of a file, for messages."""
        return f"{self.root}/{name}" if name else self.root


def folder_tree(path: Path) -> Tree:
    """Every file below `path` but hidden ones; links are followed, except circular ones."""
    names: list[str] = []
    messages: list[str] = []
    inside: list[str] = []

    def failed(error: OSError) -> None:
        raise BadInput(f"cannot read {error.filename}: {error.strerror}") from error

    above: dict[str, tuple[str, ...]] = {str(path): (os.path.realpath(path),)}
    for place, folders, files in os.walk(path, onerror=failed, followlinks=True):
        chain = above.pop(place)
        for name in [*folders]:
            inner = os.path.join(place, name)
            real = os.path.realpath(inner) if os.path.islink(inner) else os.path.join(chain[-1], name)
            if HIDDEN.search(name):
                folders.remove(name)
            elif real in chain:
                folders.remove(name)
                messages.append(f"{os.path.relpath(inner, path)} links to a folder that holds it: not followed")
            else:
                above[inner] = (*chain, real)
                inside.append(os.path.relpath(inner, path).replace(os.sep, "/"))
        for name in files:
            file = os.path.join(place, name)
            relative = os.path.relpath(file, path).replace(os.sep, "/")
            if HIDDEN.search(name):
                continue
            if os.path.isfile(file):
                names.append(relative)
            elif name.lower().endswith(SUFFIXES):
                link = os.path.islink(file) and not os.path.exists(file)
                messages.append(f"{relative} {'links to a missing file' if link else 'is no file'}: skipped")
    return Tree(
        str(path),
        tuple(sorted(names)),
        lambda name: (path / name).read_bytes(),
        lambda name: (path / name).open("rb"),
        tuple(messages),
        tuple(sorted(inside)),
    )


def file_tree(path: Path) -> Tree:
    """A single image file, whose name is empty."""
    return Tree(str(path), ("",), lambda name: path.read_bytes(), lambda name: path.open("rb"))


def zip_tree(path: Path) -> Tree:
    """Every member of a zip but hidden ones and those of macOS.

    Names are normalised: `/` between folders, no leading `/`, `.` or `..`, and UTF-8 if they decode as such.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as e:
        raise BadInput(f"{path} is not a zip file that can be read ({e}): it may be truncated") from e
    members: dict[str, zipfile.ZipInfo] = {}
    inside: set[str] = set()
    links = repeated = 0
    for info in archive.infolist():
        raw = info.filename
        if not info.flag_bits & 0x800 and not raw.isascii():
            with suppress(UnicodeError):
                raw = raw.encode("cp437").decode("utf-8")
        name = "/".join(part for part in raw.replace("\\", "/").split("/") if part not in ("", ".", ".."))
        if not name or HIDDEN.search(name):
            continue
        inside.update(str(parent) for parent in PurePosixPath(name).parents if str(parent) != ".")
        if raw.endswith(("/", "\\")):
            inside.add(name)
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            links += 1
            continue
        repeated += name in members
        members[name] = info
    supported = {0, 8, 12, 14} | {getattr(zipfile, "ZIP_ZSTANDARD", 0)}
    for name, info in members.items():
        if info.flag_bits & 1:
            raise BadInput(f"{path} is encrypted ({name}): unpack it and name the folder")
        if info.compress_type not in supported:
            kind = getattr(zipfile, "compressor_names", {}).get(info.compress_type, "unknown")
            raise BadInput(
                f"{path}: {name} has a compression that Python cannot read (method {info.compress_type}, {kind}): "
                "unpack it and name the folder, or pack it again with deflate"
            )
    messages = [f"skipped: {pluralize(links, 'symbolic link')} in the zip"] if links else []
    messages += [f"in the zip twice, the last is used: {pluralize(repeated, 'name')}"] if repeated else []
    return Tree(
        str(path),
        tuple(sorted(members)),
        lambda name: archive.read(members[name]),
        lambda name: archive.open(members[name]),
        tuple(messages),
        tuple(sorted(inside)),
    )
