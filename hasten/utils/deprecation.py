"""Old names that still work, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["forward", "renamed"]


def forward(old: str, new: str | Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that looks names up where they are now.

    Args:
        old: name of the module that had them.
        new: the module that has all its names now, or a mapping from each old name to its module, followed by a colon
            and the new name where that differs: `{"spell": "hasten.pick:format_spec"}`.

    Returns:
        the function to assign to `__getattr__`; it raises AttributeError for names it does not know.
    """

    def getattr_forwarded(name: str) -> Any:
        target = new if isinstance(new, str) else new.get(name)
        if target is None or name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        module, _, renamed = target.partition(":")
        value = getattr(importlib.import_module(module), renamed or name)
        where = f"{module}.{renamed}" if renamed else module
        warnings.warn(f"{old}.{name} has moved to {where}", DeprecationWarning, stacklevel=2)
        return value

    return getattr_forwarded


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that looks renamed attributes up under their new names.

    Args:
        module: its name.
        names: the new name of each old one.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {names[name]}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(module), names[name])

    return find
