"""Runs that were recorded in a folder before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import describe_contents, first_difference


def earlier(file: Path, run: dict[str, Any], read: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """What an unfinished run wrote down in `file`, if it was asked the same as `run`; None if there is none.

    Raises BadInput where it was asked for something else, where the file is damaged, and where its folder holds a
    model that no such run made. read: is given what was found, and raises where it cannot be used.
    """
    out = file.parent
    if not file.is_file():
        if found := describe_contents(out):
            raise BadInput(f"{out} holds {found} already: choose another folder")
        return None
    try:
        known = json.loads(file.read_text())
        different = first_difference(known, run)
        if different is None:
            read(known)
            return known
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise BadInput(f"cannot read {file}: {e}") from e
    key, old, new = different
    raise BadInput(
        f"{out} is a run with {key} {old}, asked for {new}: ask for the same, write to another folder, or remove it"
    )
