"""The errors a user may meet, and how they suggest the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class HastenError(Exception):
    """Something the user asked for cannot be done. The message is one line that says what, and what would work."""


class BadInput(HastenError, ValueError):
    """An argument, a file or a folder is not what it must be."""


class NonFinite(BadInput, ArithmeticError):
    """A result, a weight or a figure is NaN or infinity. The message says where that began, where it can be found.

    images: of a sampling, the images (n, ...) up to and with the batch that has them, else None.
    """

    images: Any = None


class Notice(UserWarning):
    """Something that goes on, but that the user should know."""


def nearest(asked: str, choices: Iterable[str]) -> str:
    """The end of an error message: `did you mean X? (choices: ...)`, or only the choices when nothing is near."""
    choices = list(choices)
    close = difflib.get_close_matches(asked, choices, n=1, cutoff=0.5)
    listed = f"choices: {', '.join(choices)}" if choices else "there are no choices"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed


def whole(name: str, value: object, least: int) -> None:
    """Refuse an argument that is not a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadInput(f"{name} must be a whole number of at least {least}, got {value!r}")
