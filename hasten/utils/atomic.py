"""Files that are written completely or not at all, and their leftovers."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["atomic_open", "is_abandoned", "remove_leftovers", "temporary_path", "try_lock", "write_atomic"]

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


SUBFOLDERS = ("samples", "stages", "pairs", "blocks", "plans", "parts")  # subfolders of a run
# A temporary file or folder of `temporary_path`, and those of older versions, with one name for all processes.
LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.[0-9a-f]+\.tmp|(checkpoint|student|log|pairs\.json|(ends|states)-\d+\.npy|\.features\.json)\.tmp"
)
MAX_AGE = 24 * 3600.0  # seconds after which a temporary file is left over, where files cannot be locked
BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


def temporary_path(path: Path) -> Path:
    """A hidden sibling of `path` that no other process, running or not, uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tmp")


@contextlib.contextmanager
def atomic_open(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends, and is removed where the block fails.

    Readers see the old file or the new one. It is synced to disk (fsync) before it takes the name, and locked
    meanwhile, so that `remove_leftovers` of another process does not remove it.

    Args:
        path: of the file.
    """
    path = Path(path)
    part = temporary_path(path)
    try:
        with open(part, "xb") as file:
            try_lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name != "nt":
                os.replace(part, path)
        if os.name == "nt":  # where an open file cannot be renamed
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file completely or not at all, synced to disk before it takes its name.

    Args:
        path: of the file.
        data: its contents; text is encoded as UTF-8.
    """
    with atomic_open(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove temporary files and folders of processes that have ended, also in the subfolders of runs.

    Args:
        folder: to clean up.
        name: only those of the file `name`, and only in the folder itself.
    """
    for place, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            match = LEFTOVER.fullmatch(entry)
            if match and name in (None, match["name"]) and is_abandoned(path := Path(place, entry)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()
        top = Path(place) == Path(folder)
        folders[:] = [
            each for each in folders if name is None and (each in SUBFOLDERS if top else not LEFTOVER.fullmatch(each))
        ]


def is_abandoned(path: Path) -> bool:
    """Whether no process writes a temporary file or folder any more: its lock is free."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        descriptor = None
    try:
        free = None if descriptor is None else try_lock(descriptor)
        if free is None:
            return time.time() - path.lstat().st_mtime > MAX_AGE
        return free
    except OSError:
        return False
    finally:
        if descriptor is not None:
            os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file without waiting.

    Args:
        descriptor: of the file.

    Returns:
        False where another process has locked it, None where locks are not supported.
    """
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt: Any = importlib.import_module("msvcrt")  # Windows
            os.lseek(descriptor, 2**30, os.SEEK_SET)  # beyond what others read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        return True
    except ImportError:
        return None
    except OSError as e:
        return False if e.errno in BUSY else None
