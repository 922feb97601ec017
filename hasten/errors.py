"""The errors that hasten raises, and the checks that suggest the nearest valid choice."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from collections.abc import Iterable
from typing import Any


class HastenError(Exception):
    """A request cannot be carried out. The message is one line that says why, and what would work."""


class BadInput(HastenError, ValueError):
    """An argument, a file or a folder is invalid."""


class NonFinite(BadInput, ArithmeticError):
    """A result, a weight or a metric is NaN or infinity. The message says where that began, if it can be determined.

    images: while sampling, the images (n, ...) up to and including the batch concerned, else None.
    """

    images: Any = None


class Notice(UserWarning):
    """A warning that needs no action: the run continues."""


def nearest(value: str, choices: Iterable[str]) -> str:
    """The end of an error message: `did you mean X? (choices: ...)`, or only the choices where none is similar.

    Args:
        value: the invalid value.
        choices: the valid ones.
    """
    choices = list(choices)
    close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    listed = f"choices: {', '.join(choices)}" if choices else "there are no choices"
    return f"did you mean {close[0]!r}? ({listed})" if close else listed


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """The value, if it is one of the choices.

    Args:
        name: of the argument, for the message.
        value: to check.
        choices: the valid values.

    Raises:
        BadInput: otherwise, naming the nearest choice.
    """
    choices = list(choices)
    if value not in choices:
        raise BadInput(f"unknown {name} {value!r}: {nearest(str(value), choices)}")
    return str(value)


def check_choices(method: Any, /, **choices: Iterable[str]) -> None:
    """Check fields of a method's dataclass: `check_choices(self, form=("ddpm", "ddim"))`.

    Args:
        method: the instance, whose class name begins the message.
        choices: by field, the valid values.

    Raises:
        BadInput: for the first field with another value, naming the nearest choice.
    """
    for name, valid in choices.items():
        value, valid = getattr(method, name), list(valid)
        if value not in valid:
            raise BadInput(f"{type(method).__name__}({name}={value!r}): {nearest(str(value), valid)}")


def check_field(what: str, name: str, fields: Iterable[str]) -> None:
    """Check the name of a field read from a file.

    Args:
        what: the object that has the fields, which begins the message.
        name: to check.
        fields: the valid names.

    Raises:
        BadInput: for a name that is not among them, naming the nearest one.
    """
    fields = list(fields)
    if name not in fields:
        raise BadInput(f"{what} has no field {name!r}: {nearest(name, fields)}")


def check_int(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """The value as an int. NumPy integers and tensors of one integer are accepted, bools are not.

    Args:
        name: of the argument, for the message.
        value: to check.
        minimum, maximum: its range, inclusive; None: no upper bound.

    Raises:
        BadInput: for what is not an integer in the range.
    """
    kind = str(getattr(value, "dtype", type(value).__name__))
    try:
        number = operator.index(value) if "bool" not in kind else None
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < minimum:
        raise BadInput(f"{name} must be a whole number of at least {minimum}, got {value!r}")
    if maximum is not None and number > maximum:
        raise BadInput(f"{name} must be a whole number of at most {maximum}, got {value!r}")
    return number


def check_number(name: str, value: Any) -> float:
    """The value as a float. NumPy numbers and tensors of one number are accepted, bools and texts are not.

    Args:
        name: of the argument, for the message.
        value: to check.

    Raises:
        BadInput: for what is not one finite number.
    """
    kind = str(getattr(value, "dtype", type(value).__name__))
    try:
        number = math.nan if "bool" in kind or isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{name} must be a finite number, got {value!r}")
    return number


def plain_numbers(method: Any) -> None:
    """Convert the fields whose defaults are floats to plain floats, in place.

    Args:
        method: a dataclass instance, which may be frozen.

    Raises:
        BadInput: where one of them is not a finite number.
    """
    for field in dataclasses.fields(method):
        if isinstance(field.default, float):
            value = check_number(f"{type(method).__name__}: {field.name}", getattr(method, field.name))
            object.__setattr__(method, field.name, value)


def check_numbers(method: Any) -> None:
    """Check the numbers in the fields of a dataclass, also those in tuples; fields of other kinds are not checked.

    A field may be infinite where its default is, or the class names it in `infinite`; negative where its default is, or
    the class names it in `negative`.

    Raises:
        BadInput: for NaN, and for other infinite or negative numbers.
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
