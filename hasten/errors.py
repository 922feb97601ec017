"""The errors a user may meet, and how they suggest the nearest valid choice."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
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


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """The value, which must be one of the choices.

    Args:
        name: of the argument, for the message. choices: what it may be.

    Raises:
        BadInput: naming the nearest choice.
    """
    choices = list(choices)
    if value not in choices:
        raise BadInput(f"unknown {name} {value!r}: {nearest(str(value), choices)}")
    return str(value)


def check_int(name: str, value: object, least: int, most: int | None = None) -> int:
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


def check_number(name: str, value: object) -> float:
    """The value as a float. Refuses what is not one finite number, also of NumPy or in a tensor."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    try:
        found = math.nan if "bool" in kind or isinstance(value, (str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadInput(f"{name} must be a finite number, got {value!r}")
    return found


def plain_numbers(method: Any) -> None:
    """Make the fields whose defaults are floats plain floats, in place. Raises BadInput where one is not finite."""
    for field in dataclasses.fields(method):
        if isinstance(field.default, float):
            value = check_number(f"{type(method).__name__}: {field.name}", getattr(method, field.name))
            object.__setattr__(method, field.name, value)


def check_numbers(method: Any) -> None:
    """Refuse numbers in the fields of a dataclass that are not numbers, not finite or negative.

    A field may be infinite where its default is, or the class names it in `infinite`; negative where its default is, or
    the class names it in `negative`. Whole numbers are looked at too, fields of other kinds are not.
    """
    for field in dataclasses.fields(method):
        default = field.default if isinstance(field.default, (int, float, tuple)) else None
        for value in _numbers(getattr(method, field.name)):
            infinite = field.name in getattr(method, "infinite", ()) or any(math.isinf(d) for d in _numbers(default))
            negative = field.name in getattr(method, "negative", ()) or any(d < 0 for d in _numbers(default))
            if math.isnan(value) or (math.isinf(value) and not infinite) or (value < 0 and not negative):
                rule = "a number" if negative and infinite else "a finite number" if negative else "a number >= 0"
                rule = "a finite number >= 0" if not negative and not infinite else rule
                raise BadInput(f"{type(method).__name__}: {field.name} must be {rule}, found {value:g}")


def _numbers(value: Any) -> list[float]:
    """The numbers in a field: itself, or those of a tuple."""
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []
