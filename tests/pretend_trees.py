"""For the pretended device: trees of tensors, and the line that an operation comes from.

An operation's arguments are flat, and torch's pytree functions take most of the time of small operations.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).parent
PACKAGE = f"{(HERE.parent / 'hasten').as_posix()}/"
OWN = {str(HERE / "pretend.py"), __file__}


def collect(value: Any, into: list[Tensor]) -> None:
    """Append the tensors of a tree of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        into.append(value)
    elif isinstance(value, (tuple, list)):
        for one in value:
            collect(one, into)
    elif isinstance(value, dict):
        for one in value.values():
            collect(one, into)


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A tree of tuples, lists and dicts with `change` of what is of a kind."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        return (tuple if isinstance(value, tuple) else list)([mapped(one, kind, change) for one in value])
    return {key: mapped(one, kind, change) for key, one in value.items()} if isinstance(value, dict) else value


def where() -> str:
    """The innermost line of hasten, else of diffusers, else of any other library but torch."""
    frame, others = sys._getframe(1), []
    while frame is not None:
        path = _outside_torch(frame.f_code.co_filename)
        if PACKAGE in path:
            return f"hasten/{path.rpartition(PACKAGE)[2]}:{frame.f_lineno}"
        if path:
            others.append((path, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    for mark in ("/diffusers/", "/"):
        for path, line in others:
            if mark in path:
                return f"{mark.strip('/')}/{path.rpartition(mark)[2]}:{line}"
    return "?"


@functools.cache
def _outside_torch(path: str) -> str:
    """The path of a file with slashes; "" for this device and torch's."""
    return "" if path in OWN or "/torch/" in path else Path(path).as_posix()
