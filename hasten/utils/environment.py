"""The environment of the process: its launcher, standard streams, cache folder, and out-of-memory errors."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import BadInput

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun, needed by torch.distributed
# Messages of torch, its libraries and Python where memory runs out, in lower case.
MEMORY = (
    "out of memory",
    "defaultcpuallocator",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "alloc_failed",
    "unable to allocate",
)


def launched() -> int:
    """The number of processes that the launcher (torchrun) started; 1 without one.

    A cluster may leave RANK and WORLD_SIZE in the environment of a shell that no launcher started: without MASTER_ADDR
    and MASTER_PORT there is no process group to join, and the process runs alone.
    """
    if not all(os.environ.get(name) for name in LAUNCHER):
        return 1
    return env_int("WORLD_SIZE", 1)


def env_int(name: str, default: int) -> int:
    """An integer from the environment.

    Args:
        name: of the variable.
        default: where it is not set.

    Raises:
        BadInput: for other text.
    """
    text = os.environ.get(name) or str(default)
    try:
        return int(text)
    except ValueError as e:
        raise BadInput(f"${name} must be a whole number, found {text!r}: start the processes with torchrun") from e


def without_launcher() -> str | None:
    """A warning where the environment names several processes but no launcher; else None."""
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    world = os.environ.get("WORLD_SIZE", "1")
    if not missing or "WORLD_SIZE" in missing or world in ("1", "0"):
        return None
    return (
        f"WORLD_SIZE is {world}, but {' and '.join(missing)} not set: running as one process (torchrun starts several)"
    )


def is_terminal(stream: Any) -> bool:
    """Whether a standard stream is open and a terminal."""
    try:
        return stream is not None and stream.isatty()
    except (ValueError, OSError):  # closed
        return False


def open_standard_streams() -> None:
    """Open the closed standard streams of a process (cron, services) on the null device.

    Otherwise the next file to be opened gets the descriptor of a closed stream, and receives what libraries print.
    Characters that the encoding of stdout lacks are then written as escapes rather than raising an error.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_RDWR)
                if opened != descriptor:
                    os.dup2(opened, descriptor)
                    os.close(opened)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(AttributeError, ValueError, OSError):
        stdout: Any = sys.stdout
        stdout.reconfigure(errors="backslashreplace")


def cache_folder() -> Path:
    """The cache folder: $HASTEN_CACHE, or `hasten` in $XDG_CACHE_HOME or in ~/.cache.

    Without a home directory it is a folder of the user's own in the system's temporary folder.
    """
    own = os.environ.get("HASTEN_CACHE", "").strip()
    if own:
        return Path(os.path.expanduser(own))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the XDG standard requires
        home = os.path.expanduser("~")
        base = os.path.join(home, ".cache") if os.path.isabs(home) and home != os.sep else ""
    if base:
        return Path(base) / "hasten"
    user = os.getuid() if hasattr(os, "getuid") else 0
    place = Path(tempfile.gettempdir()) / f"hasten-{user}"
    with contextlib.suppress(OSError):
        if hasattr(os, "getuid") and place.lstat().st_uid != user:  # somebody else's
            return place.with_name(f"{place.name}-{os.getpid()}")
    return place


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory has run out, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in MEMORY)
