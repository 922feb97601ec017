"""Schedules from the dicts that files store them as."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import BadInput, check_field
from ..utils.registry import family
from . import continuous, discrete, truncated  # noqa: F401  define the schedules that files name
from .base import Schedule

__all__ = ["schedule_from_dict"]


def schedule_from_dict(spec: dict[str, Any]) -> Schedule:
    """The schedule that `Schedule.to_dict` wrote.

    Args:
        spec: `{"name": ..., field: value, ...}`. A class that hasten does not define must be imported already; nothing
            is imported here.

    Raises:
        BadInput: for an unknown name or field, and for invalid values.
    """
    fields = dict(spec)
    name = fields.pop("name", None)
    cls = family("schedule", Schedule, name, lambda cls: cls.__name__)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in fields:
        check_field(str(name), key, known)
    try:
        values = {k: schedule_from_dict(v) if isinstance(v, dict) else v for k, v in fields.items()}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise BadInput(f"schedule {name}: {error}") from error
