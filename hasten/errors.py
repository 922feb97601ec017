"""The errors a user may meet, and how they suggest the nearest valid choice."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable


class HastenError(Exception):
    """Something the user asked for cannot be done. The message is one line that says what, and what would work."""


class BadInput(HastenError, ValueError):
    """An argument, a file or a folder is not what it must be."""


def nearest(asked: str, choices: Iterable[str]) -> str:
    """The end of an error message: `did you mean X? (choices: ...)`, or only the choices when nothing is near."""
    choices = list(choices)
    close = difflib.get_close_matches(asked, choices, n=1, cutoff=0.5)
    listed = f"choices: {', '.join(choices)}" if choices else "there are no choices"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed


def whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """The value as an int. Refuses what is not a whole number of at least `least`, at most `most`.

    NumPy integers and tensors of one whole number are whole numbers too.
    """
    kind = str(getattr(value, "dtype", type(value).__name__))
    try:
        number = operator.index(value) if "bool" not in kind else None  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < least:
        raise BadInput(f"{name} must be a whole number of at least {least}, got {value!r}")
    if most is not None and number > most:
        raise BadInput(f"{name} must be a whole number of at most {most}, got {value!r}")
    return number
