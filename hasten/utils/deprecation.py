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
        old: the module's name. new: the module that has all its names now, or, by name, the modules that have some.
    """

    def find(name: str) -> Any:
        home = new if isinstance(new, str) else new.get(name)
        if home is None or name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        warnings.warn(f"{old}.{name} has moved to {home}", DeprecationWarning, stacklevel=2)
        return value

    return find


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
