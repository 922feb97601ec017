"""Classes by name, as files store them: hasten's own by their short name, others by their import path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import BadInput, nearest

ROOT = __package__.partition(".")[0]

__all__ = ["family", "is_own", "path_of"]

Base = TypeVar("Base")


def is_own(cls: type) -> bool:
    """Whether hasten itself defines the class."""
    return cls.__module__ == ROOT or cls.__module__.startswith(f"{ROOT}.")


def path_of(cls: type) -> str:
    """The import path of a class, `"my_package.schedules.Mine"`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def family(kind: str, base: type[Base], name: Any, short: Callable[[Any], str]) -> type[Base]:
    """The subclass of `base`, direct or not, of this name.

    Classes of other packages have import paths for names, so they cannot shadow hasten's. Nothing is imported: such a
    class must be defined before a file that names it is read.

    Args:
        kind: what it is, for the message.
        base: the base class.
        name: the short name of one of hasten's own classes, or the path of another.
        short: the short name of a class.

    Raises:
        BadInput: for an unknown name.
    """
    classes = _subclasses(base)
    own = {short(cls): cls for cls in classes if is_own(cls)}
    others = {path_of(cls): cls for cls in classes if not is_own(cls)}
    cls = own.get(name) or others.get(name)
    if cls is not None:
        return cls
    if isinstance(name, str) and "." in name:
        raise BadInput(f"unknown {kind} {name!r}: import the module that defines it first")
    raise BadInput(f"unknown {kind} {name!r}: {nearest(str(name), [*own, *others])}")


def _subclasses(base: type[Base]) -> list[type[Base]]:
    """The subclasses of a class, direct or not."""
    direct: list[type[Base]] = base.__subclasses__()
    return [cls for each in direct for cls in (each, *_subclasses(each))]
