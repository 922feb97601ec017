"""A corpus of speech with its text: LJSpeech's layout, as a folder or as a zip."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from torch import Tensor

from ..errors import BadInput
from .files import read_audio

__all__ = ["Clip", "open_corpus"]

FOLDERS = ("wavs", "flac", "wav", "audio", "clips", "")
SUFFIXES = (".wav", ".flac", ".ogg", "")
TEXT_COLUMNS = ("text", "transcript", "sentence", "normalized")


@dataclass(frozen=True)
class Clip:
    """A sound with its text.

    Args:
        name: of the sound.
        text: what is said, as written.
        speaker: its name, or "".
        split: "train", "val", "test", or "" where the corpus has no splits.
        read: `read(sample_rate) -> samples (n,)`.
    """

    name: str
    text: str
    speaker: str = ""
    split: str = ""
    read: Callable[[int], Tensor] = field(repr=False, compare=False, default=lambda rate: Tensor())


def open_corpus(path: str | Path, split: str | None = "train") -> list[Clip]:
    """The clips of a corpus: `metadata.csv` beside `wavs/` (or `flac/`), columns separated by a bar.

    Without a header the columns are those of LJSpeech: name, text, normalised text. A header names them: `id`, `text`,
    and if there are any `speaker` and `split`. Sounds are read when they are needed.

    Args:
        path: a folder, or a zip of one.
        split: of the clips; all where the corpus has no splits. None: all.

    Raises:
        BadInput: for a path without a metadata.csv, lines that cannot be read, and sounds that are not there.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"there is no {path}: speech is a folder or a zip with metadata.csv and wavs/")
    if path.is_dir():
        files = {str(p.relative_to(path).as_posix()) for p in path.rglob("*") if p.is_file()}

        def opened(name: str) -> bytes:
            return (path / name).read_bytes()

    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        files = set(archive.namelist())

        def opened(name: str) -> bytes:
            return archive.read(name)

    else:
        raise BadInput(f"{path} is neither a folder nor a zip: speech is one with metadata.csv and wavs/")
    tables = sorted((name for name in files if PurePosixPath(name).name == "metadata.csv"), key=len)
    if not tables:
        raise BadInput(
            f"{path} has no metadata.csv: speech is a folder or a zip with metadata.csv (name|text) and wavs/"
        )
    try:
        lines = opened(tables[0]).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}/{tables[0]} is no UTF-8 text: {e}") from e
    root = str(PurePosixPath(tables[0]).parent)
    clips = []
    for number, row in enumerate(metadata_rows(lines), 1):
        if row.get("text", "").strip() == "":
            raise BadInput(f"{path}/{tables[0]}: entry {number} has no text: {'|'.join(row.values())[:60]!r}")
        file = sound_of(row["id"], "" if root == "." else root + "/", files)
        if file is None:
            raise BadInput(
                f"{path} has no sound for {row['id']!r}: looked for wavs/{row['id']}.wav and flac/{row['id']}.flac"
            )
        read = lambda rate, file=file: read_audio(opened(file), rate)[0]  # noqa: E731
        clips.append(Clip(row["id"], row["text"].strip(), row.get("speaker", ""), row.get("split", ""), read))
    if split is not None and any(clip.split for clip in clips):
        known = sorted({clip.split for clip in clips})
        clips = [clip for clip in clips if clip.split == split]
        if not clips:
            raise BadInput(f"{path} has no clips of the split {split!r}: it has {', '.join(known)}")
    if not clips:
        raise BadInput(f"{path}/{tables[0]} names no clips")
    return clips


def metadata_rows(lines: Iterable[str]) -> list[dict[str, str]]:
    """The entries of a metadata.csv, each with at least `id` and `text`."""
    table = [row for row in csv.reader(lines, delimiter="|", quoting=csv.QUOTE_NONE) if row]
    if not table:
        return []
    head = [name.strip().lower() for name in table[0]]
    if head[0] in ("id", "file", "file_name", "name") and len(head) > 1:
        text = next((name for name in TEXT_COLUMNS if name in head), head[1])
        return [{**dict(zip(head, row)), "id": row[0], "text": dict(zip(head, row)).get(text, "")} for row in table[1:]]
    return [
        {"id": row[0], "text": row[-1] if len(row) > 2 and row[-1] else row[1] if len(row) > 1 else ""} for row in table
    ]


def sound_of(name: str, root: str, files: set[str]) -> str | None:
    """The file of a sound; None where there is none."""
    for folder in FOLDERS:
        for suffix in SUFFIXES:
            file = f"{root}{folder}{'/' if folder else ''}{name}{suffix}"
            if file in files:
                return file
    return None
