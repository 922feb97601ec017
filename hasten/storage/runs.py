"""Run files: the settings of an unfinished run, from which it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..files import describe_contents, first_difference


def unfinished_run(file: Path, run: dict[str, Any], read: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """The record of an unfinished run with the same settings.

    Args:
        file: the run file.
        run: the settings requested now.
        read: called with the record; raises where it cannot be used.

    Returns:
        The record, None where there is none.

    Raises:
        BadInput: where the settings differ, where the file is damaged, and where its folder holds a model without one.
    """
    out = file.parent
    if not file.is_file():
        if present := describe_contents(out):
            raise BadInput(f"{out} holds {present} already: choose another folder")
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
        f"{out} is a run with {key} {old}, requested {new}: use the same, write to another folder, or remove it"
    )
