"""Atomic writes of files, locks on folders that one process writes at a time, and logs of JSON lines."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from .errors import BadInput
from .utils.atomic import atomic_open, is_abandoned, remove_leftovers, temporary_path, try_lock, write_atomic
from .utils.environment import env_int, launched

__all__ = [
    "append_json_line",
    "atomic_open",
    "check_writable",
    "describe_contents",
    "first_difference",
    "holds_lock",
    "is_abandoned",
    "is_writing_process",
    "locked",
    "read_json_lines",
    "refuse_inside",
    "remove_leftovers",
    "sha256",
    "temporary_path",
    "try_lock",
    "write_atomic",
    "write_file",
]

LOCK = ".lock"

Function = TypeVar("Function", bound=Callable[..., Any])


# ---- logs of JSON lines ----


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without lines cut off by a kill, a full disk or a power failure.

    Args:
        path: of the file; without it the list is empty.
    """
    path, objects = Path(path), []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):  # also what is no UTF-8
            value = json.loads(line)
            if isinstance(value, dict):
                objects.append(value)
    return objects


def append_json_line(path: str | Path, value: dict[str, Any]) -> None:
    """Append a line. An incomplete line before it is ended first, so that it does not corrupt this one.

    Args:
        path: of the file.
        value: to append.
    """
    text = (json.dumps(value) + "\n").encode()
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else b"\n" + text
        file.write(text)


# ---- locks ----

_locks: dict[tuple[int, str], list[int]] = {}  # (process, lock file) -> [thread, depth]
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: str | Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder that is written to; it is created if necessary, and leftovers in it are removed.

    The lock is released with its process, however that ends. A folder that is still empty afterwards is removed. The
    same thread may hold it several times.

    Args:
        folder: to lock.
        wait: seconds to wait for another process.

    Raises:
        BadInput: where another process has the lock.
    """
    folder = Path(folder)
    key = (os.getpid(), os.path.realpath(folder))
    with _guard:
        own = _locks.get(key)
        if own is not None and own[0] == threading.get_ident():
            own[1] += 1
        else:
            own = None
    if own is not None:
        try:
            yield
        finally:
            own[1] -= 1
        return
    before = next((each for each in (folder, *folder.parents) if each.exists()), folder)
    end = time.monotonic() + wait
    while (descriptor := _acquire(folder)) is None and time.monotonic() < end:
        time.sleep(0.05)
    if descriptor is None:
        raise BadInput(
            f"another process{_owner(folder)} is writing to {folder}: wait until it has ended, or choose another folder"
        )
    _locks[key] = [threading.get_ident(), 1]
    try:
        remove_leftovers(folder)
        yield
    finally:
        _locks.pop(key, None)
        if os.name == "nt":
            os.close(descriptor)
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        if os.name != "nt":
            os.close(descriptor)
        created = folder
        with contextlib.suppress(OSError):
            while created != before:
                created.rmdir()
                created = created.parent


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
        acquired = try_lock(descriptor)
        if acquired is None:
            acquired = not _alive(_read_owner(file))
        same = False
        with contextlib.suppress(OSError):  # it too was removed meanwhile
            same = os.path.samestat(os.fstat(descriptor), os.stat(file))
        if acquired and same:
            _write_owner(descriptor)
            return descriptor
        os.close(descriptor)
        if not acquired:
            return None
    raise BadInput(f"cannot lock {file}")


def _write_owner(descriptor: int) -> None:
    """Write the process that holds the lock into the lock file; on a full disk it stays empty."""
    from .distributed.heartbeat import host_id

    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "home": host_id()}).encode())


def _read_owner(file: Path) -> dict[str, Any]:
    """The process that wrote the lock file."""
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(file.read_text())
        if isinstance(owner, dict):
            return owner
    return {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote a lock file is running, where files cannot be locked; assumed on another host."""
    from .distributed.heartbeat import host_id, is_alive

    if not owner:
        return False
    if owner.get("home") != list(host_id()):
        return True
    return owner.get("pid") != os.getpid() and is_alive(int(owner.get("pid", 0)))


def _owner(folder: Path) -> str:
    """The id of the process that has the lock, in brackets, where it is known."""
    pid = _read_owner(folder / LOCK).get("pid")
    return f" (number {pid})" if pid else ""


def holds_lock(argument: str, only: str | None = None, unless: str | None = None) -> Callable[[Function], Function]:
    """A decorator: the function holds the lock of the folder in one of its arguments (None: no folder).

    Under torchrun the main process holds it for all.

    Args:
        argument: name of the argument with the folder.
        only, unless: names of boolean arguments: the lock is held only where the one is true, and not where the other
            is.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            bound = signature.bind(*args, **options)
            bound.apply_defaults()
            arguments = bound.arguments
            folder = arguments[argument]
            skip = (
                folder is None
                or (only is not None and not arguments[only])
                or (unless is not None and arguments[unless])
            )
            if skip or not is_writing_process():
                return function(*args, **options)
            with locked(folder):
                return function(*args, **options)

        return cast(Function, run)

    return decorate


def is_writing_process() -> bool:
    """Whether this process writes the results: all but the non-main processes of torchrun do."""
    return launched() == 1 or env_int("RANK", 0) == 0


# ---- folders that hold something else ----


def describe_contents(folder: str | Path) -> str | None:
    """The contents of a folder that must not be overwritten, in words; None without such contents.

    Args:
        folder: to inspect.
    """
    folder = Path(folder)
    kinds = {
        "model.json": "a model",
        "model_index.json": "a pipeline of diffusers",
        "checkpoint.pt": "a run of train",
        "run.json": "a run of distill or quantize",
        "features.json": "statistics of real images",
    }
    kind = next((what for name, what in kinds.items() if (folder / name).is_file()), None)
    parts = {"stages": "stages of a run of distill", "blocks": "blocks of a run of quantize"}  # without their run.json
    return kind or next((what for name, what in parts.items() if (folder / name).is_dir()), None)


def refuse_inside(out: str | Path, data: Any, what: str = "out") -> None:
    """Raise BadInput where the output would be inside the data folder, and be read as data the next time.

    Args:
        out: the output path.
        data: the data, perhaps a folder.
        what: name of the output argument, for the message.
    """
    if not isinstance(data, (str, Path)) or not Path(data).is_dir():
        return
    place, source = Path(os.path.realpath(out)), Path(os.path.realpath(data))
    if place == source or source in place.parents:
        raise BadInput(
            f"{what} {out} lies inside the data folder {data}, which would then hold what is written: choose another"
        )


def first_difference(
    known: dict[str, Any], requested: dict[str, Any], missing: bool = True
) -> tuple[str, str, str] | None:
    """The first entry in which two configs of a run differ, compared as JSON.

    Args:
        known: the saved config; entries that only it has do not count.
        requested: the new config.
        missing: whether entries that only this one has count.

    Returns:
        the name, the saved value and the requested one; None where they agree.
    """
    known, requested = json.loads(json.dumps(known)), json.loads(json.dumps(requested))
    for key, new in requested.items():
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
    """A value as text of at most 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sha256(path: Path) -> str:
    """The SHA-256 hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_writable(path: str | Path) -> Path:
    """Create the folder of `path` and check that a file can be written there, before time is spent on its contents.

    Leftovers of the same file from a killed process are removed.

    Args:
        path: of the file.

    Raises:
        BadInput: where it cannot be written.
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
    """Write a file completely or not at all: to a temporary sibling that then takes the name.

    Args:
        path: of the file.
        data: its contents.

    Raises:
        BadInput: where it cannot be written.
    """
    path = Path(path)
    try:
        write_atomic(path, data)
    except OSError as e:
        raise BadInput(f"cannot write {path}: {e.strerror or e}") from e
    return path
