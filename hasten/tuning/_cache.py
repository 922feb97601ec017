"""Results of tuning that are remembered: one JSON file for each question that was ever asked."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any

from ..files import write_atomic
from ..utils.environment import cache_folder


def cached_result(key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make()` gave for this key, from hasten's folder of the user's cache where it is there, bit for bit.

    Args:
        key: all that the result depends on, with a version number of the method; JSON.
        make: gives a dict that JSON can hold (Python floats survive it exactly).

    A cache that cannot be read or written costs time, never the result.
    """
    text = json.dumps(key, sort_keys=True)
    place = cache_folder() / "tuning" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(place.read_text())
        if told["key"] == json.loads(text):
            return told["value"]
    value = json.loads(json.dumps(make()))
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps({"key": json.loads(text), "value": value}))
    return value
