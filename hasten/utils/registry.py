"""Classes by name, as files write them: hasten's own by their short name, others by where they are defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import BadInput, nearest

ROOT = __package__.partition(".")[0]

__all__ = ["family", "is_own", "path_of"]


def is_own(cls: type) -> bool:
    """Whether hasten itself defines the class."""
    return cls.__module__ == ROOT or cls.__module__.startswith(f"{ROOT}.")


def path_of(cls: type) -> str:
    """Where a class is defined, `"my_package.schedules.Mine"`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def family(kind: str, base: type, name: Any, short: Callable[[Any], str]) -> type:
    """The subclass of `base`, direct or not, of this name: hasten's own by `short`, others by their `path_of`.

    Nobody's class takes the name of another one. Nothing is imported: a class of one's own must be defined before a
    file that names it is read.

    Raises BadInput for an unknown name.
    """
    classes: list[type] = _below(base)
    own = {short(cls): cls for cls in classes if is_own(cls)}
    others = {path_of(cls): cls for cls in classes if not is_own(cls)}
    found = own.get(name) or others.get(name)
    if found is not None:
        return found
    if isinstance(name, str) and "." in name:
        raise BadInput(f"unknown {kind} {name!r}: import the module that defines it first")
    raise BadInput(f"unknown {kind} {name!r}: {nearest(str(name), [*own, *others])}")


def _below(base: type) -> list[type]:
    found: list[type] = []
    below: list[type] = base.__subclasses__()
    for cls in below:
        found += [cls, *_below(cls)]
    return found
