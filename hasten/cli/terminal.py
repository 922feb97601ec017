"""Output of the commands on stdout, as text or JSON."""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Mapping


def print_result(result: object, text: str, json: bool) -> None:
    """Print the result of a command.

    Args:
        result: What JSON shows.
        text: What is printed otherwise.
        json: Whether to print JSON.
    """
    print(jsonlib.dumps(finite(result), indent=2, allow_nan=False) if json else text, flush=True)


def finite(value: object) -> object:
    """The value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def plain_value(value: object) -> str:
    """A JSON value on one line of at most 200 characters, strings without quotes."""
    text = value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
