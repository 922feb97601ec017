"""Schedules from the dicts that files hold of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import BadInput, nearest
from ..utils.registry import family
from . import continuous, discrete  # noqa: F401  define the schedules that files name
from .base import Schedule

__all__ = ["schedule_from_dict"]


def schedule_from_dict(spec: dict[str, Any]) -> Schedule:
    """The schedule that `Schedule.to_dict` wrote. Raises `BadInput` on an unknown name or field.

    A class of one's own is found where it is defined in this process; nothing is imported for it.
    """
    spec = dict(spec)
    name = spec.pop("name", None)
    found = family("schedule", Schedule, name, lambda cls: cls.__name__)
    known = [f.name for f in dataclasses.fields(found)]  # type: ignore[arg-type]
    for key in spec:
        if key not in known:
            raise BadInput(f"{name} has no field {key!r}: {nearest(key, known)}")
    try:
        return found(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()})
    except TypeError as error:
        raise BadInput(f"schedule {name}: {error}") from error
