"""Files that are written whole or not at all, folders that one process writes at a time, and logs of JSON lines."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from .errors import BadInput
from .utils.environment import env_int, launched

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
OWN = ("samples", "stages", "pairs", "blocks", "plans", "parts")  # folders that runs make in theirs
# A temporary file or folder of `temporary`, and those of older versions, which had the same name in every process.
LEFTOVER = re.compile(
    r"\.(?P<name>.+)\.[0-9a-f]+\.tmp|(checkpoint|student|log|pairs\.json|(ends|states)-\d+\.npy|\.features\.json)\.tmp"
)
OLD = 24 * 3600.0  # seconds after which a temporary file counts as left over where files cannot be locked
BUSY = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)

Function = TypeVar("Function", bound=Callable[..., Any])


# ---- whole files ----


def temporary_path(path: Path) -> Path:
    """A hidden sibling of `path` that no other process, living or dead, has taken."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}.tmp")


@contextlib.contextmanager
def atomic_open(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends, and vanishes where the block fails.

    Readers see the old file or the new one. It is on the disk (fsync) before it takes the name, and locked meanwhile,
    so that `remove_leftovers` of another process leaves it alone.
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
    """Write a whole file or none of it, on the disk before it takes its name."""
    with atomic_open(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove temporary files and folders whose writer is gone, also from the folders that runs make in theirs.

    name: only those of the file `name`, and only from the folder itself.
    """
    for place, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            found = LEFTOVER.fullmatch(entry)
            if found and name in (None, found["name"]) and is_abandoned(path := Path(place, entry)):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        path.unlink()
        top = Path(place) == Path(folder)
        folders[:] = [
            each for each in folders if name is None and (each in OWN if top else not LEFTOVER.fullmatch(each))
        ]


def is_abandoned(path: Path) -> bool:
    """Whether no process writes the temporary file or folder any more: nobody holds its lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        descriptor = None
    try:
        free = None if descriptor is None else try_lock(descriptor)
        if free is None:
            return time.time() - path.lstat().st_mtime > OLD
        return free
    except OSError:
        return False
    finally:
        if descriptor is not None:
            os.close(descriptor)


# ---- logs of JSON lines ----


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Lines that a kill, a full disk or a power failure cut are left out."""
    path, found = Path(path), []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):  # also what is no UTF-8
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def append_json_line(path: str | Path, value: dict[str, Any]) -> None:
    """Add a line. A cut line before it is ended first, so that it does not swallow this one."""
    text = (json.dumps(value) + "\n").encode()
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else b"\n" + text
        file.write(text)


# ---- locks ----

_held: dict[tuple[int, str], list[int]] = {}  # (process, lock file) -> [thread, depth]
_guard = threading.Lock()


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file without waiting: False where another process holds it, None where this cannot be told."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(descriptor, 2**30, os.SEEK_SET)  # beyond what others read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return True
    except ImportError:
        return None
    except OSError as e:
        return False if e.errno in BUSY else None


@contextlib.contextmanager
def locked(folder: str | Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder that is written, which is made where it is not there; leftovers in it are removed.

    The lock goes with its process, however that ends. A folder that is still empty afterwards is removed. The same
    thread may hold it several times.

    wait: seconds to wait for another process. Raises BadInput, in one line, where another process has the lock.
    """
    folder = Path(folder)
    key = (os.getpid(), os.path.realpath(folder))
    with _guard:
        mine = _held.get(key)
        if mine is not None and mine[0] == threading.get_ident():
            mine[1] += 1
        else:
            mine = None
    if mine is not None:
        try:
            yield
        finally:
            mine[1] -= 1
        return
    before = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    end = time.monotonic() + wait
    while (descriptor := _acquire(folder)) is None and time.monotonic() < end:
        time.sleep(0.05)
    if descriptor is None:
        raise BadInput(
            f"another process{_owner(folder)} is writing to {folder}: wait until it has ended, or choose another folder"
        )
    _held[key] = [threading.get_ident(), 1]
    try:
        remove_leftovers(folder)
        yield
    finally:
        _held.pop(key, None)
        if os.name == "nt":
            os.close(descriptor)
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        if os.name != "nt":
            os.close(descriptor)
        made = folder
        with contextlib.suppress(OSError):
            while made != before:
                made.rmdir()
                made = made.parent


def _acquire(folder: Path) -> int | None:
    """The open lock file of a folder, locked; None where another process has it."""
    file = folder / LOCK
    for _ in range(100):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # removed meanwhile by the process that held it
            continue
        except OSError as e:
            raise BadInput(f"cannot write in {folder}: {e.strerror or e}") from e
        got = try_lock(descriptor)
        if got is None:
            got = not _alive(_read_owner(file))
        same = False
        with contextlib.suppress(OSError):  # it too was removed meanwhile
            same = os.path.samestat(os.fstat(descriptor), os.stat(file))
        if got and same:
            _write_owner(descriptor)
            return descriptor
        os.close(descriptor)
        if not got:
            return None
    raise BadInput(f"cannot lock {file}")


def _write_owner(descriptor: int) -> None:
    """Write into the lock file who holds it; on a full disk it stays empty."""
    from .distributed.heartbeat import host_id

    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "home": host_id()}).encode())


def _read_owner(file: Path) -> dict[str, Any]:
    """Who wrote the lock file."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text())
        if isinstance(found, dict):
            return found
    return {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock file lives, where files cannot be locked. Of another machine: it may."""
    from .distributed.heartbeat import host_id, is_alive

    if not owner:
        return False
    if owner.get("home") != list(host_id()):
        return True
    return owner.get("pid") != os.getpid() and is_alive(int(owner.get("pid", 0)))


def _owner(folder: Path) -> str:
    """The number of the process that has the lock, in brackets, where it is known."""
    pid = _read_owner(folder / LOCK).get("pid")
    return f" (number {pid})" if pid else ""


def holds_lock(argument: str, only: str | None = None, unless: str | None = None) -> Callable[[Function], Function]:
    """A decorator: the function holds the lock of the folder that its argument `argument` names (None: no folder).

    only, unless: names of boolean arguments: the lock is held only where the one is true, not where the other is.
    Under torchrun the first process holds it for all.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            given = bound.arguments
            folder = given[argument]
            skip = folder is None or (only is not None and not given[only]) or (unless is not None and given[unless])
            if skip or not is_writing_process():
                return function(*args, **options)
            with locked(folder):
                return function(*args, **options)

        return run  # type: ignore[return-value]

    return decorate


def is_writing_process() -> bool:
    """Whether this process writes the results: all do but those that torchrun started beside the first."""
    return launched() == 1 or env_int("RANK", 0) == 0


# ---- folders that hold something else ----


def describe_contents(folder: str | Path) -> str | None:
    """What a folder holds that must not be written over, in words; None where there is nothing of the kind."""
    folder = Path(folder)
    kinds = {
        "model.json": "a model", "model_index.json": "a pipeline of diffusers", "checkpoint.pt": "a run of train",
        "run.json": "a run of distill or quantize", "features.json": "statistics of real images",
    }  # fmt: skip
    found = next((what for name, what in kinds.items() if (folder / name).is_file()), None)
    parts = {"stages": "stages of a run of distill", "blocks": "blocks of a run of quantize"}  # without their run.json
    return found or next((what for name, what in parts.items() if (folder / name).is_dir()), None)


def refuse_inside(out: str | Path, data: Any, what: str = "out") -> None:
    """BadInput where what is written would lie among the data that is read, and be read with it the next time."""
    if not isinstance(data, (str, Path)) or not Path(data).is_dir():
        return
    place, source = Path(os.path.realpath(out)), Path(os.path.realpath(data))
    if place == source or source in place.parents:
        raise BadInput(
            f"{what} {out} lies inside the data folder {data}, which would then hold what is written: choose another"
        )


def first_difference(known: dict[str, Any], asked: dict[str, Any], missing: bool = True) -> tuple[str, str, str] | None:
    """The first entry in which two descriptions of a run differ: its name, the value in `known`, the one in `asked`.

    None where they agree, compared as JSON. Entries of `known` alone do not count; missing: those of `asked` alone do.
    """
    known, asked = json.loads(json.dumps(known)), json.loads(json.dumps(asked))
    for key, new in asked.items():
        if key not in known and not missing:
            continue
        old = known.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = first_difference(old, new, missing)
            if inner is not None:
                return f"{key}.{inner[0]}", inner[1], inner[2]
        elif old != new:
            return key, _shortened(old), _shortened(new)
    return None


def _shortened(value: Any) -> str:
    """A value in few letters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_writable(path: str | Path) -> Path:
    """Make the folder of `path` and check that a file can be written there, before the time is spent to fill it.

    What a killed process left of the same file is removed. Raises BadInput in one line where it cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"cannot write {path}: it is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        probe = temporary_path(path)
        probe.touch(exist_ok=False)
        probe.unlink(missing_ok=True)
    except OSError as e:
        raise BadInput(f"cannot write {path}: {e.strerror or e}") from e
    return path


def write_file(path: str | Path, data: bytes) -> Path:
    """Write a whole file or none of it: into a temporary sibling that then takes the name."""
    path = Path(path)
    try:
        write_atomic(path, data)
    except OSError as e:
        raise BadInput(f"cannot write {path}: {e.strerror or e}") from e
    return path
