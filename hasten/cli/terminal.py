"""What the commands say: results as text or JSON, commands as they are typed, progress on stderr."""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Mapping


def print_result(result: object, text: str, json: bool) -> None:
    """The result on stdout: JSON for machines, or the text for people."""
    print(jsonlib.dumps(finite(result), indent=2, allow_nan=False) if json else text, flush=True)


def finite(value: object) -> object:
    """The same for JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def plain_value(value: object) -> str:
    """A JSON value on one line, strings without their quotes, long ones cut."""
    text = value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
