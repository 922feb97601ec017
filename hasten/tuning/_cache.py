"""Cached tuning results: one JSON file per key."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any

from ..files import write_atomic
from ..utils.environment import cache_folder


def cached_result(key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `compute()` for this key, from the tuning cache if it is there, bit for bit.

    A cache that cannot be read or written costs time, never the result.

    Args:
        key: all that the result depends on, with a version number of the method; JSON.
        compute: returns a dict of JSON values (Python floats survive JSON exactly).

    Returns:
        The result.
    """
    text = json.dumps(key, sort_keys=True)
    path = cache_folder() / "tuning" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(path.read_text())
        if entry["key"] == json.loads(text):
            return entry["value"]
    value = json.loads(json.dumps(compute()))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"key": json.loads(text), "value": value}))
    return value
